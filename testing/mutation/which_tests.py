"""Which tests notice a change of a file: those that stand closest first, since a mutant is run until one of them fails."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The first row whose pattern matches the path counts. `{0}` is what the pattern's first group matched, `{operator}` the folder
# of a kernel; of what a row names, what exists is run. No row names a test and its file too: pytest would run the file alone.
_ROWS = (
    (
        r"tilelang_ext/passes/(accesses|evaluate|overlap|uniformity)",
        "passes/test_missing_barriers passes/test_updates passes metal/test_barriers rocm/test_barriers",
    ),
    (r"tilelang_ext/passes/(block_scaled_gemm|expand_block_scaled)", "language/test_gemm_blockscaled metal/test_arguments"),
    (
        r"tilelang_ext/passes/(layouts|plain_layouts|staged_operands|launched_blocks)",
        "passes/test_layouts passes/test_updates metal/test_reduce passes",
    ),
    (r"tilelang_ext/passes/joined_guards", "cuda/test_repairs"),
    (r"tilelang_ext/passes/scalar_atomics", "cuda/test_repairs metal/test_threads rocm/test_threads cpu"),
    (r"tilelang_ext/passes/outside", "simulator/test_outside simulator metal/test_arguments"),
    (
        r"tilelang_ext/passes/(foreign_calls|plain_words|vector_lanes)",
        "language/test_table::test_refused_on_every_target cpu language",
    ),
    (
        r"tilelang_ext/passes/(\w+)",
        "passes/test_{0} metal/test_{0} metal/test_threads cpu/test_arithmetic cpu/test_views_and_functions "
        "rocm/test_arithmetic rocm/test_threads passes cpu metal/test_arithmetic metal/test_upstream_defects",
    ),
    (
        r"tilelang_ext/program/",
        "test_program test_several_kernels launch/test_plan metal/test_run simulator/test_errors",
    ),
    (r"tilelang_ext/simulator/(hip|tokens)", "simulator/test_hip_errors simulator/test_hip_findings simulator"),
    (
        r"tilelang_ext/simulator/(launch|report)",
        "simulator/test_outside simulator/test_debugging simulator/test_errors simulator",
    ),
    (r"tilelang_ext/(simulator/|simulation)", "simulator/test_errors simulator/test_language simulator"),
    (r"tilelang_ext/cuda/(\w+)", "cuda/test_{0} cuda/test_repairs cuda/test_codes cuda"),
    (r"tilelang_ext/cpu/one_thread_blocks", "cpu/test_vectors cpu/test_backend cpu/test_views_and_functions cpu"),
    (r"tilelang_ext/cpu/scans", "cpu/test_tile_programs cpu"),
    (r"tilelang_ext/cpu/operators", "passes/test_single_rounds cpu/test_arithmetic cpu"),
    (r"tilelang_ext/cpu/(pipeline|backend)", "cpu/test_backend cpu"),
    (r"tilelang_ext/cpu/(\w+)", "cpu/test_{0} cpu"),
    (r"tilelang_ext/(rocm|metal)/all_reduce", "passes/test_reduction_groups {0}"),
    (r"tilelang_ext/rocm/(\w+)", "rocm/test_{0} rocm/test_repairs rocm/test_spelling rocm/test_values rocm"),
    (r"tilelang_ext/metal/one_instruction", "metal/test_metal4 metal"),
    (r"tilelang_ext/metal/(program|run|backend)", "metal/test_run test_registration metal"),
    (r"tilelang_ext/metal/(memory_limit|threadgroup_memory)", "metal/test_errors metal/test_codegen_text metal"),
    (r"tilelang_ext/metal/parameter_order", "test_several_kernels metal/test_arguments metal"),
    (r"tilelang_ext/metal/(\w+)", "metal/test_{0} metal/test_gemm metal/test_reduce metal/test_arguments metal"),
    (r"tilelang_ext/language/bounds", "language/test_upstreams_limits"),
    (r"tilelang_ext/language/moe", "language/test_moe_tiles language"),
    (r"tilelang_ext/language/mx_quantize", "language/test_mxfp4_quantize language"),
    (
        r"tilelang_ext/language/(scaled_product|block_scaled)",
        "language/test_fp8_scaled_matmul rocm/test_block_scaled language/test_gemm_blockscaled language",
    ),
    (r"tilelang_ext/language/tile", "language/test_mxfp4_dequant language/test_messages language"),
    (
        r"tilelang_ext/language/(\w+)",
        "language/test_{0} language/test_scales language/test_messages language/test_gemm_blockscaled language",
    ),
    (r"tilelang_ext/launch/(\w+)", "launch/test_{0} launch"),
    (r"tilelang_ext/kernels/__init__", "test_public_names"),
    (r"tilelang_ext/kernels/\w+/sm90_", "kernels/{operator}/test_plan kernels/{operator}/test_sm90 kernels/{operator}"),
    (
        r"tilelang_ext/kernels/\w+/(\w+)",
        "kernels/{operator}/test_{0} kernels/{operator}/test_plan kernels/{operator}/test_operator "
        "kernels/{operator}/test_{operator} kernels/{operator}",
    ),
    (r"tilelang_ext/codes", "language/test_mxfp4_dequant language/test_mxfp4_quantize cpu/test_narrow_floats formats"),
    (r"tilelang_ext/formats", "formats cpu/test_narrow_floats"),
    (r"tilelang_ext/(quantization|reference|checkpoints)", "formats"),
    (r"tilelang_ext/export/", "export"),
    (r"tilelang_ext/(\w+)", "test_{0} test_registration test_public_names test_ahead export kernels/mxfp4_moe/test_mlx"),
    (
        r"src/launch/(\w+)",
        "launch/test_{0} launch/test_direct launch/test_plan launch/test_plan_memory launch/test_plan_targets launch",
    ),
    (
        r"src/metal/(prelude_threads|prelude_simdgroups|tile_operators)",
        "metal/test_codegen_operations metal/test_warp_functions metal/test_reduce metal/test_barriers metal",
    ),
    (r"src/metal/prelude_matrices", "metal/test_metal4 metal/test_gemm metal"),
    (
        r"src/metal/",
        "metal/test_codegen_text metal/test_codegen_formats metal/test_codegen_operations metal/test_codegen_types metal",
    ),
    (r"src/simulator/hip/(matrix|architecture|fp8)", "simulator/test_hip_matrix rocm/test_fp8_casts simulator"),
    (r"src/simulator/hip/", "simulator/test_hip_wave simulator/test_hip_findings simulator"),
    (r"src/simulator/metal/", "simulator/test_language simulator/test_numerics simulator/test_debugging simulator"),
    (r"src/simulator/", "simulator/test_findings simulator/test_hip_findings simulator/test_numerics simulator"),
    (r"src/rocm/include/", "rocm/test_compile rocm/test_compile_repairs rocm"),
)


def tests_of(path: str) -> list[str]:
    """Files and folders of tests, relative to the root, each once."""
    for pattern, names in _ROWS:
        if match := re.match(pattern, path):
            operator = path.split("/")[2] if path.startswith("tilelang_ext/kernels/") else ""
            wanted = [name.format(*match.groups(), operator=operator) for name in names.split()]
            paths = [f"testing/{name}" if "test_" not in name else _file_of(name) for name in wanted]
            return [path for path in dict.fromkeys(paths) if (ROOT / path.partition("::")[0]).exists()]
    return []


def _file_of(name: str) -> str:
    """The file of a row's name, and the test in it if the row names one."""
    file, separator, test = name.partition("::")
    return f"testing/{file}.py{separator}{test}"

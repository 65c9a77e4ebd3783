"""HIP: each fault that can hide behind right numbers is planted in a clean text and found at its line."""

import pytest
import torch
from numeric import assert_close, measure
from simulator.hip_kernels import gemm, operands, target
from simulator.hip_texts import ASYNC, EXCHANGE, GEMM, HISTOGRAM, ROW_SUM, TEMPLATES, run, run_exchange, run_gemm
from simulator.kernels import line_of, plant

from tilelang_ext.rocm import program
from tilelang_ext.simulator import CompileError, execute_hip

TOP, TILES = "__syncthreads();  // top", "__syncthreads();  // tiles"
LOAD_A, STORE_B, MFMA = "a[i] = *(half_x4*)", "*(uint4*)(b_s", "c[i][j] = __builtin"


def kinds_at(report, line):
    return {f.kind for f in report.findings if f.line == line}


@pytest.mark.parametrize("seed", range(3))
def test_clean(seed):
    report, c, reference = run_gemm(seed=seed)
    assert_close(c, reference, dtype="float32")
    assert report.findings == ()


def test_missing_barrier_before_the_product():
    source = plant(GEMM, TILES, "")
    report, _, _ = run_gemm(source)
    assert kinds_at(report, line_of(source, LOAD_A)) & {"race", "uninitialised"}
    assert any(f.kind == "race" for f in report.findings)


def test_missing_barrier_at_the_loop_top():
    source = plant(GEMM, TOP, "")
    report, _, _ = run_gemm(source)
    assert "race" in kinds_at(report, line_of(source, STORE_B))


def test_read_past_a_device_buffer():
    source = plant(GEMM, "(B + row * K + k + column)", "(B + row * K + k + column + 32)")
    report, _, _ = run_gemm(source)
    (finding,) = report.findings
    assert (finding.kind, finding.line) == ("out of bounds", line_of(source, STORE_B))
    assert "of buffer 'B' of 8192 bytes" in finding.message
    assert finding.text == source.splitlines()[finding.line - 1]


def test_small_shared_array():
    source = plant(GEMM, "a_s[64 * 32]", "a_s[64 * 32 - 8]")
    report, c, reference = run_gemm(source)
    assert_close(c, reference, dtype="float32")  # the numbers are right all the same
    assert "out of bounds" in kinds_at(report, line_of(source, LOAD_A))
    assert any("LDS array 'a_s' of 4080 bytes" in f.message for f in report.findings)


def test_uninitialised_lds():
    source = plant(GEMM, "      *(uint4*)(b_s", "      if (row != 9) *(uint4*)(b_s")
    report, _, _ = run_gemm(source)
    assert kinds_at(report, line_of(source, "b[j] = *(half_x4*)")) == {"uninitialised"}


def test_divergent_barrier():
    source = plant(GEMM, TILES, "if (threadIdx.x != 77) " + TILES)
    report, _, _ = run_gemm(source)
    lines = {f.line for f in report.findings if f.kind == "divergence"}
    assert lines & {line_of(source, "// tiles"), line_of(source, MFMA), line_of(source, "// top")}


def test_product_skipped_by_one_lane():
    source = plant(GEMM, MFMA, "if (lane != 37) " + MFMA)
    report, _, _ = run_gemm(source)
    (finding,) = [f for f in report.findings if f.line == line_of(source, MFMA)]
    assert finding.kind == "divergence"
    assert "wave operation reached by 63 of 64 lanes; lane 37 is missing" in finding.message


def test_one_lane_returns_early():
    source = plant(GEMM, "  for (int k = 0;", "  if (threadIdx.x == 40) return;\n  for (int k = 0;")
    report, _, _ = run_gemm(source)
    assert "divergence" in kinds_at(report, line_of(source, MFMA))
    barrier = [f for f in report.findings if f.line == line_of(source, "// top")]
    assert "127 of 128 threads" in barrier[0].message


def test_swapped_operands_break_numerics():
    source = plant(GEMM, "f16(a[i], b[j],", "f16(b[j], a[i],")
    report, c, reference = run_gemm(source)
    assert report.findings == ()
    assert measure(c, reference).max > 0.1


def test_wrong_lane_of_the_result_breaks_numerics():
    source = plant(GEMM, "lane / 16 * 4 + e) * 64", "lane / 16 + e * 4) * 64")
    report, c, reference = run_gemm(source)
    assert report.findings == ()
    assert measure(c, reference).max > 0.1


def test_exchange_inside_a_wave():
    report, y = run_exchange()
    assert report.findings == ()
    assert torch.equal(y, (torch.arange(64) ^ 1).int() * 3)
    report, _ = run_exchange(plant(EXCHANGE, "  __builtin_amdgcn_wave_barrier();\n", ""))
    assert "race" in {f.kind for f in report.findings}


def test_waves_of_32_do_not_order_each_other():
    """What is one wave on CDNA is two on RDNA."""
    source = plant(EXCHANGE, "lane ^ 1", "lane ^ 32")
    assert run_exchange(source)[0].findings == ()
    report, _ = run_exchange(source, arch="gfx1100")
    assert {f.kind for f in report.findings} & {"race", "uninitialised"}


def test_plain_write_beside_atomics_is_a_race():
    atomic = "  AtomicAdd(total,"
    source = plant(HISTOGRAM, atomic, "  if (i == 3) *total = 0;\n" + atomic)
    x = torch.zeros(64, dtype=torch.int32)
    bins, total, most = torch.zeros(16, dtype=torch.int32), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    assert run(HISTOGRAM, "histogram", [x, bins, total, most]).findings == ()
    report = run(source, "histogram", [x, bins, total, most])
    assert "race" in {f.kind for f in report.findings}


def test_two_groups_write_one_element():
    source = plant(ROW_SUM, "y[blockIdx.x] = total", "y[blockIdx.x / 2] = total")
    report = run(source, "row_sum", [torch.arange(1024.0).view(4, 256), torch.zeros(4), 0.0], grid=4, threads=256)
    (finding,) = report.findings
    assert (finding.kind, finding.line) == ("race", line_of(source, "= total + bias"))


def test_shuffle_from_a_lane_that_is_not_there():
    source = plant(ROW_SUM, "const float total =", "const float total = threadIdx.x == 200 ? own :")
    report = run(source, "row_sum", [torch.ones(1, 256), torch.zeros(1), 0.0], threads=256)
    assert "operand" in kinds_at(report, line_of(source, "const float total"))


def test_loads_to_lds_in_flight():
    """Without the wait, what was asked for is not there yet."""
    x, y = torch.arange(128, dtype=torch.int32), torch.full((128,), -1, dtype=torch.int32)
    assert run(ASYNC, "copy", [x, y], threads=128).findings == ()
    assert torch.equal(y, (torch.arange(128) ^ 64).int())
    for old, new in (("_wait<0>();", "_commit();"), ("_wait<0>();", "_commit(); __syncthreads();"), ("_wait<0>", "_wait<1>")):
        source = plant(ASYNC, old, new)
        report = run(source, "copy", [x, y], threads=128)
        assert kinds_at(report, line_of(source, "y[threadIdx.x] =")) == {"uninitialised"}


def test_wait_leaves_the_newest_loads_in_flight():
    load = "tl::cp_async_gs<4>(box + threadIdx.x / 64 * 64 + threadIdx.x % 64, x + threadIdx.x);"
    x, y = torch.arange(128, dtype=torch.int32), torch.full((128,), -1, dtype=torch.int32)
    for first, wait, kinds in ((True, 1, set()), (True, 2, {"uninitialised"}), (False, 1, {"uninitialised"})):
        source = plant(ASYNC, "int box[128];", "int box[128], other[128];")
        loads = [load, load.replace("box", "other")]
        source = plant(source, load, " ".join(loads if first else loads[::-1]))
        report = run(plant(source, "_wait<0>", f"_wait<{wait}>"), "copy", [x, y], threads=128)
        assert {f.kind for f in report.findings} == kinds, (first, wait)


def test_loads_to_lds_past_the_range_of_their_resource_are_zero():
    source = plant(
        ASYNC,
        "tl::cp_async_gs<4>(box + threadIdx.x / 64 * 64 + threadIdx.x % 64, x + threadIdx.x);",
        "tl::async_buffer_load_dword_v(box + threadIdx.x / 64 * 64, tl::make_wave_buffer_resource(x, 400), threadIdx.x * 4);",
    ).replace("tl::make_wave", "make_wave")
    x, y = torch.arange(1, 129, dtype=torch.int32), torch.full((128,), -1, dtype=torch.int32)
    assert run(source, "copy", [x, y], threads=128).findings == ()
    assert torch.equal(y, torch.where(x <= 100, x, 0)[torch.arange(128) ^ 64].int())


def test_fault_in_a_template_is_one_of_the_line_that_uses_it():
    source = plant(ASYNC, "box + threadIdx.x / 64 * 64 + threadIdx.x % 64", "box + 100 + threadIdx.x")
    report = run(source, "copy", [torch.zeros(128, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)], threads=128)
    assert "out of bounds" in {f.kind for f in report.findings}
    source = plant(ROW_SUM, "float work[256]", "float work[255]")
    report = run(source, "row_sum", [torch.ones(1, 256), torch.zeros(1), 0.0], threads=256)
    assert {(f.kind, f.line) for f in report.findings} == {("out of bounds", line_of(source, "tl::AllReduce"))}


def test_too_much_lds():
    source = plant(EXCHANGE, "int box[64]", "int box[64 * 257]")
    assert {f.kind for f in run_exchange(source)[0].findings} == {"limit"}
    assert run_exchange(source, arch="gfx950")[0].findings == ()


def test_dynamic_lds_is_as_large_as_the_launch_says():
    source = plant(EXCHANGE, "__shared__ int box[64];", "extern __shared__ __align__(1024) int box[];")
    assert run_exchange(source, dynamic_lds=256)[0].findings == ()
    report, _ = run_exchange(source, dynamic_lds=252)
    assert {f.kind for f in report.findings} == {"out of bounds"}
    assert report.threadgroup_memory == 252


def emitted(arch, dtype, plants=(), *, text_arch=None, accum="float32"):
    """Report, C and reference of a T.gemm whose emitted text has faults planted."""
    hip = program.lower(gemm(64, 64, 64, dtype, accum=accum), target(text_arch or arch))
    source = hip.source
    for old, new in plants:
        assert old in source
        source = source.replace(old, new)
    a, b, c, reference = operands(64, 64, 64, dtype, accum)
    report = execute_hip(
        source, hip.name, [a, b, c], arch=arch, grid=(1, 1, 1), threads=(128, 1, 1), dynamic_lds=hip.dynamic_lds,
        include_directories=(TEMPLATES,),
    )  # fmt: skip
    return report, c, reference


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_emitted_text_without_its_barriers(arch):
    report, _, _ = emitted(arch, "float16", [("__syncthreads();", "")])
    assert {f.kind for f in report.findings} >= {"race", "uninitialised"}


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_emitted_text_with_a_wrong_index(arch):
    report, _, _ = emitted(arch, "float16", [("(k * 32)", "(k * 33)")])
    assert "out of bounds" in {f.kind for f in report.findings}


def test_fp8_of_the_wrong_flavour_breaks_numerics():
    """The text for OCP codes reads a quarter of each product on gfx942."""
    _, c, reference = emitted("gfx950", "float8_e4m3fn")
    assert_close(c, reference, dtype="float32")
    builtin = "__builtin_amdgcn_mfma_f32_16x16x32_fp8_fp8"
    source = (
        "#include <hip/hip_runtime.h>\n"
        "typedef __attribute__((__vector_size__(4 * sizeof(float)))) float float_x4;\n"
        'extern "C" __global__ void product(const long* a, const long* b, float_x4* d) {\n'
        f"  d[threadIdx.x] = {builtin}(a[threadIdx.x], b[threadIdx.x], float_x4{{}}, 0, 0, 0);\n}}\n"
    )
    one = torch.full((64, 8), 0x38, dtype=torch.uint8)  # 1 in OCP E4M3, 1/2 in FNUZ
    for arch, expected in (("gfx950", 32.0), ("gfx942", 8.0)):
        d = torch.zeros(64, 4)
        run(source, "product", [one, one, d], arch=arch)
        assert (d == expected).all(), arch


def test_instruction_that_the_architecture_lacks():
    with pytest.raises(CompileError, match=r"this architecture lacks mfma_i32_16x16x32_i8(.|\n)*kernel.hip:\d+"):
        emitted("gfx90a", "int8", accum="int32", text_arch="gfx942")
    with pytest.raises(CompileError, match=r"this architecture lacks mfma_f32_16x16x16f16(.|\n)*kernel.hip:\d+"):
        emitted("gfx1100", "float16", text_arch="gfx942")

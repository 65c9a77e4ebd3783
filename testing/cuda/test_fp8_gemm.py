"""T.gemm on fp8 operands for NVIDIA GPUs: what is refused, by message, and what stays upstream's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tilelang
from cuda.kernels import E4M3, E5M2, lower, matmul
from tilelang.backend.target import determine_target
from tvm.target import Target

from tilelang_ext.cuda.backend import lowering_key, normalize_target

ROOT = str(Path(__file__).parents[2])
REFUSED = [
    ("fnuz", "sm_90a", {"a": "float8_e4m3fnuz"}, NotImplementedError,
     r"on NVIDIA GPUs fp8 operands must be float8_e4m3fn or float8_e5m2; got float8_e4m3fnuz \(A, \w+\); convert .*fnuz_to"),
    ("fnuz, no fp8 unit", "sm_80", {"b": "float8_e5m2fnuz"}, NotImplementedError, r"got float8_e5m2fnuz \(B, \w+\); convert"),
    ("fnuz, scalar products", "sm_75", {"a": "float8_e4m3fnuz"}, NotImplementedError, r"got float8_e4m3fnuz \(A, \w+\)"),
    ("native, no fp8 unit", "sm_80", {"require_native": True}, NotImplementedError,
     r"require_native_fp8 needs an fp8 instruction; got sm_80, which has no fp8 unit; compile for sm_89"),
    ("native, scalar products", "sm_75", {"require_native": True}, NotImplementedError, r"got sm_75, which has no fp8 unit"),
    ("native, a tile too low for WGMMA", "sm_90a", {"require_native": True, "block_M": 32}, NotImplementedError,
     r"got sm_90a, whose fp8 mma\.sync is made of half products; compile for .*tiles of M % 64 == 0"),
    ("native, mma.sync", "sm_100a", {"require_native": True}, NotImplementedError, r"got sm_100a, whose fp8 mma\.sync"),
    ("K of an instruction", "sm_89", {"K": 48, "A_scope": "fragment"}, ValueError,
     r"K of an fp8 tile must be a multiple of 32; got K = 48; round"),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "options", "error", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(arch, options, error, message):
    with pytest.raises(error, match=r"T\.gemm: .*" + message):
        lower(matmul(**{"M": 64, "N": 64, "K": 64, **options}), arch)


@pytest.mark.parametrize("arch", ["sm_89", "sm_90a", "sm_120a"])
@pytest.mark.parametrize("trans_B", [True, False])
def test_native_products_are_not_refused(arch, trans_B):
    """On Hopper the major of an operand does not matter: it is transposed for WGMMA."""
    text = lower(matmul(64, 64, 64, a=E4M3, b=E5M2, trans_B=trans_B, require_native=True), arch)
    assert (
        "tl::wgmma_ss<" if arch == "sm_90a" else "tl::mma_sync<"
    ) + "tl::DataType::kFloat8_e4m3, tl::DataType::kFloat8_e5m2" in text


@pytest.mark.parametrize("transposed", [{"trans_A": True}, {"trans_B": False}], ids=["A", "B"])
def test_the_copy_of_a_transposed_operand_has_its_size(transposed):
    """Shared memory holds A, B and the copy, each of 64x96 codes."""
    target = Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        lowered = tilelang.lower(matmul(64, 64, 96, **transposed), target=target, enable_device_compile=False)
    (func,) = lowered.device_mod.functions.values()
    assert func.attrs["dyn_shared_memory_buf"] == 3 * 64 * 96


@pytest.mark.parametrize("trans_B", [True, False])
def test_a_tile_too_low_for_wgmma_stays_with_a_warps_product(trans_B):
    text = lower(matmul(64, 64, 64, block_M=32, trans_B=trans_B), "sm_90a")
    assert "tl::mma_sync<" in text
    assert "wgmma" not in text


def test_volta_and_turing_multiply_scalars():
    for arch in ("sm_70", "sm_75"):
        text = lower(matmul(64, 64, 64, b=E5M2), arch)
        assert "mma_sync" not in text
        assert "__byte_perm" not in text


PROGRAM = """
import sys, tilelang
from tvm.target import Target
if sys.argv[1] == "ours":
    import tilelang_ext
from tilelang import language as T

def matmul(dtype, accum, trans_A, trans_B):
    @T.prim_func
    def kernel(
        A: T.Tensor((64, 128) if trans_A else (128, 64), dtype),
        B: T.Tensor((128, 64) if trans_B else (64, 128), dtype),
        C: T.Tensor((128, 128), accum),
    ):
        with T.Kernel(1, threads=128) as _:
            A_s = T.alloc_shared((64, 128) if trans_A else (128, 64), dtype)
            B_s = T.alloc_shared((128, 64) if trans_B else (64, 128), dtype)
            C_f = T.alloc_fragment((128, 128), accum)
            T.copy(A, A_s)
            T.copy(B, B_s)
            T.gemm(A_s, B_s, C_f, trans_A, trans_B, clear_accum=True)
            T.copy(C_f, C)
    return kernel

for arch in ("sm_75", "sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a"):
    target = Target({"kind": "cuda", "arch": arch})
    kernels = [("float16", "float32", False, True)]
    if arch in ("sm_80", "sm_90a"):
        kernels += [("bfloat16", "float32", True, False)]
    if arch in ("sm_89", "sm_90a", "sm_120a"):
        kernels += [("float8_e4m3fn", "float32", False, True)]
    if arch == "sm_89":
        kernels += [("float8_e5m2", "float32", True, False)]
    for kernel in kernels:
        with target:
            print(tilelang.lower(matmul(*kernel), target=target, enable_device_compile=False).kernel_source)
"""


def test_all_else_is_upstreams_text(tmp_path):
    """Registering changes no kernel but fp8 ones that upstream has not, or runs on another instruction."""
    program = tmp_path / "lower.py"
    program.write_text(PROGRAM)
    runs = [
        subprocess.Popen(
            [sys.executable, program, whose], stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": ROOT}
        )
        for whose in ("ours", "upstream")
    ]
    ours, upstream = (run.communicate(timeout=300)[0] for run in runs)
    assert all(run.returncode == 0 for run in runs)
    assert ours.count(b"__global__ void __launch_bounds__") == 6 + 2 + 3 + 1
    assert ours == upstream


@pytest.mark.parametrize("form", [dict, Target])
def test_kernels_of_another_version_are_not_taken_from_the_cache(form):
    """Upstream's key of a cached kernel holds its target; CuTe DSL has another generator."""
    config = {"kind": "cuda", "arch": "sm_90a"}
    target = determine_target(form(config), return_object=True)
    assert lowering_key() in target.keys
    assert determine_target(target, return_object=True).keys == target.keys
    assert str(target.attrs["arch"]) == "sm_90a"
    assert normalize_target(form({**config, "keys": ["cuda", "gpu", "cutedsl"]})) is None
    assert normalize_target("llvm") is None

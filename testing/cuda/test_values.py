"""The CUDA text of T.fp8_scaled_matmul, executed on the CPU, against float64: what no GPU of CI can tell."""

import pytest
import torch
from cuda.execute import execute, needs_compiler
from cuda.kernels import E4M3, E5M2, LAYOUTS, ROW, lower, matmul
from language.test_fp8_scaled_matmul import operand
from numeric import assert_close

from tilelang_ext import language as T
from tilelang_ext import reference

pytestmark = needs_compiler
WITHOUT_TMA = {"tl.disable_tma_lower": True, "tl.disable_warp_specialized": True}


def problem(M=40, N=72, K=160, layouts=ROW, a=E4M3, b=E4M3, trans_A=False, trans_B=True, spread=4, **options):
    """A kernel, its tensors, the grid, and what C must be."""
    (A, SA), (B, SB) = operand(M, K, layouts[0], a, 1, spread), operand(N, K, layouts[1], b, 2, spread)
    tensors = {
        "A": A.t().contiguous() if trans_A else A,
        "SA": SA,
        "B": B if trans_B else B.t().contiguous(),
        "SB": SB,
        "C": torch.full((M, N), torch.nan),
    }
    kernel = matmul(M, N, K, layouts, a, b, trans_A=trans_A, trans_B=trans_B, **options)
    grid = -(-N // options.get("block_N", 64)), -(-M // options.get("block_M", 64))
    return kernel, tensors, grid, reference.scaled_matmul(A, SA, B, SB, *layouts)


def check(arch, expects=(), **options):
    kernel, tensors, grid, expected = problem(**options)
    text = lower(kernel, arch, **WITHOUT_TMA)
    assert all(word in text for word in expects)
    execute(text, grid, tensors)
    assert_close(tensors["C"], expected, dtype="float32")


DECODED = ("kFloat16, tl::DataType::kFloat16", "__byte_perm")
DECODED_CASES = {
    "both transposed": {"trans_A": True, "trans_B": False, "b": E5M2},
    "e8m0": {"layouts": LAYOUTS["e8m0"], "a": E5M2},
    "blocks, K below an instruction's": {"layouts": LAYOUTS["block"], "K": 20, "trans_B": False, "block_M": 32, "block_N": 32},
    "A in registers": {"A_scope": "fragment", "K": 64, "M": 32, "block_M": 32, "block_N": 48},
}
TRANSPOSED = ("tl::wgmma_", "__byte_perm", "tl::fence_proxy_async();\n    __syncthreads();")
TRANSPOSED_CASES = {
    "both": {"trans_A": True, "trans_B": False, "a": E5M2},
    "A": {"trans_A": True, "layouts": LAYOUTS["block"], "K": 288, "block_M": 128, "block_N": 48},
    "B, 32 of K": {"trans_B": False, "layouts": LAYOUTS["e8m0"], "K": 64, "N": 24, "block_N": 24},
    "B, A in registers": {"trans_B": False, "A_scope": "fragment", "K": 96, "M": 64},
}


@pytest.mark.parametrize("options", DECODED_CASES.values(), ids=DECODED_CASES)
def test_decoded_to_half(options):
    check("sm_80", expects=DECODED, **options)


@pytest.mark.parametrize("options", TRANSPOSED_CASES.values(), ids=TRANSPOSED_CASES)
def test_transposed_for_wgmma(options):
    check("sm_90a", expects=TRANSPOSED, **options)


def test_both_operands_in_registers():
    """Upstream's T.gemm takes B in registers too."""
    M, N, K = 32, 48, 64
    A, B = (torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)) for rows in (M, N))
    tensors = {"A": A.to(torch.float8_e4m3fn), "B": B.to(torch.float8_e5m2), "C": torch.full((M, N), torch.nan)}

    @T.prim_func
    def kernel(A: T.Tensor((M, K), E4M3), B: T.Tensor((N, K), E5M2), C: T.Tensor((M, N), "float32")):
        with T.Kernel(1, threads=128) as _:
            A_f, B_f = T.alloc_fragment((M, K), E4M3), T.alloc_fragment((N, K), E5M2)
            C_f = T.alloc_fragment((M, N), "float32")
            T.copy(A, A_f)
            T.copy(B, B_f)
            T.gemm(A_f, B_f, C_f, transpose_B=True, clear_accum=True)
            T.copy(C_f, C)

    execute(lower(kernel, "sm_80"), (1, 1), tensors)
    assert_close(tensors["C"], tensors["A"].double() @ tensors["B"].double().T, dtype="float32")


def test_k_major_operands_of_wgmma_are_left_alone():
    """Upstream's own: shows that the CPU's reading of descriptors and swizzles is also the generator's."""
    text = lower(matmul(64, 64, 128), "sm_90a")
    assert "__byte_perm" not in text
    check("sm_90a", b=E5M2, expects=("tl::wgmma_ss<",))


def test_native_products_of_a_warp():
    """Operands of two types; upstream refuses them."""
    check("sm_89", a=E5M2, trans_B=False, expects=("kFloat8_e5m2, tl::DataType::kFloat8_e4m3",))

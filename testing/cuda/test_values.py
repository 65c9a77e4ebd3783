"""The CUDA text of T.fp8_scaled_matmul, executed on the CPU, against float64: what no GPU of CI can tell."""

import pytest
import torch
from cuda.cases import DECODED_CASES, TRANSPOSED_CASES, problem
from cuda.execute import execute, needs_compiler
from cuda.kernels import E4M3, E5M2, lower, matmul
from numeric import assert_close

from tilelang_ext import language as T

pytestmark = needs_compiler
WITHOUT_TMA = {"tl.disable_tma_lower": True, "tl.disable_warp_specialized": True}


def check(arch, expects=(), **options):
    kernel, tensors, grid, expected = problem(**options)
    text = lower(kernel, arch, **WITHOUT_TMA)
    assert all(word in text for word in expects)
    execute(text, grid, tensors)
    assert_close(tensors["C"], expected, dtype="float32")


DECODED = ("kFloat16, tl::DataType::kFloat16", "__byte_perm")
TRANSPOSED = ("tl::wgmma_", "__byte_perm", "tl::fence_proxy_async();\n    __syncthreads();")


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

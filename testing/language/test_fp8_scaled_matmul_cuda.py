"""T.fp8_scaled_matmul on an NVIDIA GPU with fp8 units: values of every scale layout, by the bounds of its matrix unit."""

import pytest
import tilelang
import torch
from language.fp8_cases import LAYOUTS, dtype_of, operand
from numeric import assert_close

from tilelang_ext import language as T
from tilelang_ext import reference

pytestmark = pytest.mark.cuda
TENSOR_CORE_ERROR = 2e-3  # sums of products keep fewer than 24 bits between promotions


def matmul(M, N, K, SA, SB, layouts, a="float8_e4m3fn", b="float8_e4m3fn", out="float32", block_M=64, block_N=64):
    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), a),
        SA: T.Tensor(tuple(SA.shape), dtype_of(SA)),
        B: T.Tensor((N, K), b),
        SB: T.Tensor(tuple(SB.shape), dtype_of(SB)),
        C: T.Tensor((M, N), out),
    ):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=128) as (bx, by):
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            T.fp8_scaled_matmul(
                A[by * block_M : by * block_M + block_M, 0:K],
                SA,
                B[bx * block_N : bx * block_N + block_N, 0:K],
                SB,
                C_f,
                transpose_B=True,
                scale_layout=layouts,
                clear_accum=True,
            )
            T.copy(C_f, C[by * block_M, bx * block_N])

    return kernel


def check(M, N, K, layouts, a="float8_e4m3fn", b="float8_e4m3fn", out="float32"):
    # An element is measured against the rms of the whole matrix. Were some rows a hundred times the others, the rounding of
    # their products, which is relative to the products, would be measured against the others' size.
    (A, SA), (B, SB) = operand(M, K, layouts[0], a, 0, spread=1), operand(N, K, layouts[1], b, 1, spread=1)
    if out == "float16":
        SA = SA / 1024  # nothing overflows
    C = torch.full((M, N), torch.nan, device="cuda").to(getattr(torch, out))
    kernel = tilelang.compile(matmul(M, N, K, SA, SB, layouts, a, b, out), target="cuda")
    kernel(A.cuda(), SA.cuda(), B.cuda(), SB.cuda(), C)
    limit = TENSOR_CORE_ERROR if out == "float32" else TENSOR_CORE_ERROR + 2.0 ** (-11 if out == "float16" else -8)
    assert_close(C.cpu(), reference.scaled_matmul(A, SA, B, SB, *layouts), dtype=out, max_error=limit)


@pytest.mark.parametrize(("M", "N", "K"), [(128, 128, 512), (40, 150, 288), (1, 64, 128), (256, 192, 4096)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, M, N, K):
    check(M, N, K, LAYOUTS[name])


@pytest.mark.parametrize("out", ["float16", "bfloat16"])
def test_outputs(out):
    check(128, 64, 256, LAYOUTS["row"], out=out)


def test_e5m2():
    check(128, 64, 256, LAYOUTS["row"], a="float8_e5m2", b="float8_e5m2")

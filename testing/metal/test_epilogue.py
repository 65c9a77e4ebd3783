"""Work on an accumulator after T.gemm: bias, scales, activations, casts, residuals, with ragged tails."""

import pytest
import torch
from metal.kernels import EPILOGUES, float64, gemm_reference, gemm_with_epilogue, poisoned, random_tensor
from numeric import assert_close

from tilelang_ext import language as T
from tilelang_ext import simulate


# Every pair of an epilogue, a dtype and a shape, which never meet all at once: a ragged tile masks what an epilogue loads, and
# what is stored as the dtype.
@pytest.mark.parametrize(
    ("epilogue", "out", "shape"),
    [
        (epilogue, out, ("whole", "ragged")[(i + j) % 2])
        for i, epilogue in enumerate(EPILOGUES)
        for j, out in enumerate(("float32", "float16", "bfloat16"))
    ],
)
def test_epilogue(epilogue, out, shape):
    M, N, K = {"whole": (64, 64, 64), "ragged": (50, 71, 40)}[shape]
    A, B = random_tensor((M, K), "float16", 0), random_tensor((K, N), "float16", 1)
    bias, row, col = (random_tensor((n,), "float32", 2 + i) for i, n in enumerate((N, M, N)))
    residual, C = random_tensor((M, N), out, 5), poisoned((M, N), out)
    report = simulate(gemm_with_epilogue(M, N, K, epilogue, out), A, B, bias, row, col, residual, C)
    assert not report.findings, str(report)
    expected = EPILOGUES[epilogue](gemm_reference(A, B), *(float64(t) for t in (bias, row, col, residual)))
    assert_close(C, expected, dtype=out)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_cast_of_the_accumulator_in_registers(dtype):
    """A fragment of another type takes the accumulator's layout, so the cast moves no data between lanes."""

    @T.prim_func
    def kernel(A: T.Tensor((64, 32), dtype), B: T.Tensor((32, 64), dtype), C: T.Tensor((64, 64), dtype)):
        with T.Kernel(1, threads=128) as _:
            A_s = T.alloc_shared((64, 32), dtype)
            B_s = T.alloc_shared((32, 64), dtype)
            C_f = T.alloc_fragment((64, 64), "float32")
            D_f = T.alloc_fragment((64, 64), dtype)
            T.copy(A, A_s)
            T.copy(B, B_s)
            T.gemm(A_s, B_s, C_f, clear_accum=True)
            T.copy(C_f, D_f)
            for i, j in T.Parallel(64, 64):
                D_f[i, j] = D_f[i, j] * T.cast(2, dtype)
            T.copy(D_f, C)

    A, B, C = random_tensor((64, 32), dtype, 0), random_tensor((32, 64), dtype, 1), poisoned((64, 64), dtype)
    report = simulate(kernel, A, B, C)
    assert not report.findings, str(report)
    assert report.counts.shuffles == 0
    assert_close(C, 2 * gemm_reference(A, B), dtype=dtype)


def test_padding_of_the_inputs_is_never_read():
    """Rows past M and columns past N belong to somebody else: the kernel sees a view into a buffer full of NaN."""
    M, N, K = 50, 71, 40
    store = torch.full((64, K), float("nan"), dtype=torch.float16)
    A = store[:M]
    A.copy_(random_tensor((M, K), "float16", 0))
    B, C = random_tensor((K, N), "float16", 1), poisoned((M, N), "float32")
    zeros = torch.zeros
    report = simulate(gemm_with_epilogue(M, N, K, "none", "float32"), A, B, zeros(N), zeros(M), zeros(N), zeros(M, N), C)
    assert not report.findings, str(report)
    assert_close(C, gemm_reference(A, B), dtype="float32")

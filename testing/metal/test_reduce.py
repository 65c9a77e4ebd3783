"""T.reduce_* and T.warp_reduce_* on Metal: rows and columns of fragments, across simdgroups, clear on and off."""

import numpy as np
import pytest
import torch
from metal.kernels import float64, poisoned, random_tensor
from numeric import assert_close

from tilelang_ext import language as T
from tilelang_ext import simulate

REDUCE = {
    "sum": (T.reduce_sum, np.sum, np.add),
    "max": (T.reduce_max, np.max, np.maximum),
    "min": (T.reduce_min, np.min, np.minimum),
    "absmax": (T.reduce_absmax, lambda x, axis: np.abs(x).max(axis), np.maximum),
}


def reduce_kernel(op, M, N, dim, clear, threads, accumulator, dtype):
    reduce = REDUCE[op][0]
    size = M if dim == 1 else N

    @T.prim_func
    def kernel(A: T.Tensor((M, N), dtype), start: T.Tensor((size,), dtype), out: T.Tensor((size,), dtype)):
        with T.Kernel(1, threads=threads) as _:
            A_f = T.alloc_fragment((M, N), dtype)
            out_f = T.alloc_fragment((size,), dtype)
            if accumulator:  # a matrix product gives A_f the simdgroup layout; adding 0 * 0 keeps the values
                Z_s = T.alloc_shared((M, 8), "float16")
                W_s = T.alloc_shared((8, N), "float16")
                T.clear(Z_s)
                T.clear(W_s)
                T.copy(A, A_f)
                T.gemm(Z_s, W_s, A_f)
            else:
                T.copy(A, A_f)
            T.copy(start, out_f)
            reduce(A_f, out_f, dim=dim, clear=clear)
            T.copy(out_f, out)

    return kernel


@pytest.mark.parametrize(
    ("op", "dim", "clear"), [(op, dim, (i + dim) % 2 == 0) for i, op in enumerate(REDUCE) for dim in (0, 1)]
)
def test_accumulator_rows_and_columns(op, dim, clear):
    M, N = 64, 32
    A = random_tensor((M, N), "float32", 0)
    start = random_tensor((M if dim == 1 else N,), "float32", 1).abs()
    out = poisoned(start.shape, "float32")
    report = simulate(reduce_kernel(op, M, N, dim, clear, 128, True, "float32"), A, start, out)
    assert not report.findings, str(report)
    expected = REDUCE[op][1](float64(A), axis=dim)
    assert_close(out, expected if clear else REDUCE[op][2](expected, float64(start)), dtype="float32")


@pytest.mark.parametrize(
    ("dim", "dtype", "threads"),
    [(0, "float32", 32), (1, "float16", 32), (0, "float16", 64), (1, "float32", 64), (0, "float32", 256), (1, "float16", 256)],
)
def test_plain_fragments(dim, dtype, threads):
    """A fragment that no product touches gets its layout from the copy."""
    M, N = 32, 64
    A = random_tensor((M, N), dtype, 0)
    start, out = torch.zeros(M if dim == 1 else N).to(A.dtype), poisoned((M if dim == 1 else N,), dtype)
    report = simulate(reduce_kernel("max", M, N, dim, True, threads, False, dtype), A, start, out)
    assert not report.findings, str(report)
    assert_close(out, float64(A).max(dim), dtype=dtype)


@pytest.mark.parametrize("op", ["sum", "max", "min"])
def test_warp_reduce(op):
    warp_reduce = {"sum": T.warp_reduce_sum, "max": T.warp_reduce_max, "min": T.warp_reduce_min}[op]

    @T.prim_func
    def kernel(A: T.Tensor((4, 32), "float32"), out: T.Tensor((4,), "float32")):
        with T.Kernel(1, threads=128) as _:
            tx = T.get_thread_binding()
            value = T.alloc_local((1,), "float32")
            value[0] = A[tx // 32, tx % 32]
            value[0] = warp_reduce(value[0])
            if tx % 32 == 0:
                out[tx // 32] = value[0]

    A, out = random_tensor((4, 32), "float32", 0), poisoned((4,), "float32")
    report = simulate(kernel, A, out)
    assert not report.findings, str(report)
    assert_close(out, getattr(np, op)(float64(A), axis=1), dtype="float32")


@pytest.mark.parametrize(("M", "N"), [(64, 128), (50, 64)])
def test_softmax(M, N):
    @T.prim_func
    def kernel(A: T.Tensor((M, N), "float32"), out: T.Tensor((M, N), "float32")):
        with T.Kernel(T.ceildiv(M, 32), threads=128) as bx:
            x = T.alloc_fragment((32, N), "float32")
            row_max = T.alloc_fragment((32,), "float32")
            row_sum = T.alloc_fragment((32,), "float32")
            T.copy(A[bx * 32, 0], x)
            T.reduce_max(x, row_max, dim=1)
            for i, j in T.Parallel(32, N):
                x[i, j] = T.exp2((x[i, j] - row_max[i]) * 1.4426950408889634)
            T.reduce_sum(x, row_sum, dim=1)
            for i, j in T.Parallel(32, N):
                x[i, j] = x[i, j] / row_sum[i]
            T.copy(x, out[bx * 32, 0])

    A, out = 3 * random_tensor((M, N), "float32", 0), poisoned((M, N), "float32")
    report = simulate(kernel, A, out)
    assert not report.findings, str(report)
    assert_close(out, torch.softmax(A.double(), dim=1).numpy(), dtype="float32")

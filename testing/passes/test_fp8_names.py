"""float8_e4m3, TVM's second name of torch's float8_e4m3fn: the same values under either."""

import pytest
import torch

from tilelang_ext import language as T
from tilelang_ext import simulate

FP8 = torch.float8_e4m3fn


def kernel(dtype):
    """Y = 1.5 + X, in both directions and with a constant; C = A B^T."""

    @T.prim_func
    def named(
        X: T.Tensor((64, 64), dtype),
        Y: T.Tensor((64, 64), dtype),
        A: T.Tensor((64, 64), dtype),
        B: T.Tensor((64, 64), dtype),
        C: T.Tensor((64, 64), "float32"),
    ):
        with T.Kernel(1, threads=128):
            a = T.alloc_shared((64, 64), dtype)
            b = T.alloc_shared((64, 64), dtype)
            c = T.alloc_fragment((64, 64), "float32")
            for i, j in T.Parallel(64, 64):
                Y[i, j] = T.cast(T.cast(X[i, j], "float32") + T.cast(T.cast(1.5, dtype), "float32"), dtype)
            T.copy(A, a)
            T.copy(B, b)
            T.clear(c)
            T.gemm(a, b, c, transpose_B=True)
            T.copy(c, C)

    return named


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx942", "hip -mcpu=gfx1100"])
def test_either_name(target):
    x, a, b = (torch.randint(-4, 5, (64, 64)).float() for _ in range(3))
    y, c = torch.full((64, 64), torch.nan).to(FP8), torch.full((64, 64), torch.nan)
    assert simulate(kernel("float8_e4m3"), x.to(FP8), y, a.to(FP8), b.to(FP8), c, target=target).findings == ()
    assert torch.equal(y.float(), (x + 1.5).to(FP8).float())
    assert torch.equal(c, a @ b.T)

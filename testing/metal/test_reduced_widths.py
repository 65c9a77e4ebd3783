"""Reductions of fragments that no T.gemm touches, of rows of any width."""

import pytest
import torch

from tilelang_ext import language as T
from tilelang_ext import simulate


def statistics(rows, columns, threads):
    """Row maxima, row sums of exp(x - maximum), and column sums of X."""

    @T.prim_func
    def kernel(
        X: T.Tensor((rows, columns), "float32"),
        top: T.Tensor((rows,), "float32"),
        total: T.Tensor((rows,), "float32"),
        down: T.Tensor((columns,), "float32"),
    ):
        with T.Kernel(1, threads=threads):
            x, e = T.alloc_fragment((rows, columns), "float32"), T.alloc_fragment((rows, columns), "float32")
            m, s = T.alloc_fragment((rows,), "float32"), T.alloc_fragment((rows,), "float32")
            c = T.alloc_fragment((columns,), "float32")
            T.copy(X, x)
            T.reduce_max(x, m, dim=1)
            for i, j in T.Parallel(rows, columns):
                e[i, j] = T.exp(x[i, j] - m[i])
            T.reduce_sum(e, s, dim=1)
            T.reduce_sum(x, c, dim=0)
            T.copy(m, top)
            T.copy(s, total)
            T.copy(c, down)

    return kernel


@pytest.mark.parametrize(
    ("rows", "columns", "threads"),
    [(64, 100, 128), (16, 48, 64), (5, 80, 128), (32, 96, 256), (8, 40, 64), (3, 7, 64), (1, 100, 128)],
)
def test_rows_of_any_width(rows, columns, threads):
    x = torch.randn(rows, columns)
    top, total, down = torch.full((rows,), torch.nan), torch.full((rows,), torch.nan), torch.full((columns,), torch.nan)
    report = simulate(statistics(rows, columns, threads), x, top, total, down)
    assert not report.findings, str(report)
    wide = x.double()
    assert torch.equal(top, x.amax(1))
    torch.testing.assert_close(total.double(), (wide - wide.amax(1, keepdim=True)).exp().sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(down.double(), wide.sum(0), rtol=1e-5, atol=1e-4)

"""Reductions into fragments that keep the axis, (M, 1) and (1, N), on Metal and on AMD."""

import pytest
import torch

from tilelang_ext import language as T
from tilelang_ext import simulate


@T.prim_func
def kernel(
    A: T.Tensor((16, 64), "float32"),
    rows: T.Tensor((16, 1), "float32"),
    columns: T.Tensor((1, 64), "float32"),
    softmax: T.Tensor((16, 64), "float32"),
):
    with T.Kernel(1, threads=64):
        a_f = T.alloc_fragment((16, 64), "float32")
        row_f, sum_f = T.alloc_fragment((16, 1), "float32"), T.alloc_fragment((16, 1), "float32")
        column_f = T.alloc_fragment((1, 64), "float32")
        T.copy(A, a_f)
        T.reduce_max(a_f, row_f, dim=1)
        T.reduce_min(a_f, column_f, dim=0)
        T.copy(row_f, rows)
        T.copy(column_f, columns)
        for i, j in T.Parallel(16, 64):
            a_f[i, j] = T.exp(a_f[i, j] - row_f[i, 0])
        T.fill(sum_f, 0)
        T.reduce_sum(a_f, sum_f, dim=1, clear=False)
        for i, j in T.Parallel(16, 64):
            softmax[i, j] = a_f[i, j] / sum_f[i, 0]


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx942"])
def test_values(target):
    A = torch.randn(16, 64)
    rows, columns, softmax = torch.zeros(16, 1), torch.zeros(1, 64), torch.zeros(16, 64)
    report = simulate(kernel, A, rows, columns, softmax, target=target)
    assert not report.findings, str(report)
    assert torch.equal(rows, A.amax(1, keepdim=True))
    assert torch.equal(columns, A.amin(0, keepdim=True))
    assert torch.allclose(softmax.double(), A.double().softmax(1), rtol=1e-5, atol=1e-7)

"""T.cumsum and T.cummax longer than a wave, on waves of 32 and of 64 lanes."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import pytest
import torch

from tilelang_ext import language as T
from tilelang_ext import simulate
from tilelang_ext.rocm import program

ROWS, COLUMNS, LINE = 37, 100, 77


def scans(threads):
    @T.prim_func
    def kernel(
        A: T.Tensor((ROWS, COLUMNS), "float32"),
        rows: T.Tensor((ROWS, COLUMNS), "float32"),
        columns: T.Tensor((ROWS, COLUMNS), "float32"),
        line: T.Tensor((LINE,), "float32"),
    ):
        with T.Kernel(1, threads=threads):
            A_s, line_s = T.alloc_shared((ROWS, COLUMNS), "float32"), T.alloc_shared((LINE,), "float32")
            rows_s, columns_s = T.alloc_shared((ROWS, COLUMNS), "float32"), T.alloc_shared((ROWS, COLUMNS), "float32")
            T.copy(A, A_s)
            T.copy(A[0, 0:LINE], line_s)
            T.cumsum(A_s, rows_s, dim=1)
            T.cummax(A_s, columns_s, dim=0, reverse=True)
            T.cumsum(line_s)
            T.copy(rows_s, rows)
            T.copy(columns_s, columns)
            T.copy(line_s, line)

    return kernel


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100", "gfx1201"])
def test_values(arch):
    A = torch.randint(-9, 9, (ROWS, COLUMNS)).float()
    rows, columns, line = torch.full_like(A, torch.nan), torch.full_like(A, torch.nan), torch.full((LINE,), torch.nan)
    report = simulate(scans(128), A, rows, columns, line, target=f"hip -mcpu={arch}")
    assert not report.findings, str(report)
    assert torch.equal(rows, A.cumsum(1))
    assert torch.equal(columns, A.flip(0).cummax(0).values.flip(0))
    assert torch.equal(line, A[0, :LINE].cumsum(0))


@pytest.mark.parametrize(("arch", "threads", "use"), [("gfx942", 32, 64), ("gfx1100", 96, 64)])
def test_threads_that_no_template_has(arch, threads, use):
    with pytest.raises(ValueError, match=rf"T.cum\w+: threads must be a power of two .*; got {threads}; use threads={use}"):
        program.lower(scans(threads), f"hip -mcpu={arch}")

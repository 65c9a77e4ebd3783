"""Indices that wrap around, with as many threads as elements and with more, on every target."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import pytest
import tilelang
import torch
from cuda.execute import execute, needs_compiler
from cuda.kernels import lower

from tilelang_ext import language as T
from tilelang_ext import simulate

ROWS, COLUMNS = 8, 16


def rotations(threads):
    @T.prim_func
    def kernel(A: T.Tensor((ROWS, COLUMNS), "int32"), C: T.Tensor((5, ROWS, COLUMNS), "int32"), n: T.int32):
        with T.Kernel(1, threads=threads):
            A_s = T.alloc_shared((ROWS, COLUMNS), "int32")
            T.copy(A, A_s)
            for i, j in T.Parallel(ROWS, COLUMNS):
                C[0, i, j] = A_s[i, (j + 1) % COLUMNS]
            for i, j in T.Parallel(ROWS, COLUMNS):
                C[1, i, j] = A_s[(i + 3) % ROWS, (j + 5) % COLUMNS]
            for i, j in T.Parallel(ROWS, COLUMNS):
                C[2, i, j] = A_s[i, (j + n) % COLUMNS]
            for i, j in T.Parallel(ROWS, COLUMNS):
                C[3, (i + 1) % ROWS, (j + 2) % COLUMNS] = A_s[i, j]
            for k in T.Parallel(ROWS * COLUMNS):
                C[4, k // COLUMNS, k % COLUMNS] = A_s[k // COLUMNS, (k + 3) % COLUMNS]

    return kernel


def check(A, out, n):
    rotated = A.roll(-1, 1), A.roll((-3, -5), (0, 1)), A.roll(-n, 1), A.roll((1, 2), (0, 1)), A.roll(-3, 1)
    for got, want in zip(out, rotated, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("target", "threads"), [("metal", 32), ("metal", 256), ("hip -mcpu=gfx942", 256), ("hip -mcpu=gfx1100", 128), ("c", 64)]
)
def test_values(target, threads):
    A, n = torch.arange(ROWS * COLUMNS, dtype=torch.int32).reshape(ROWS, COLUMNS), 7
    out = torch.full((5, ROWS, COLUMNS), -1, dtype=torch.int32)
    if target == "c":
        tilelang.compile(rotations(threads), target="c")(A, out, n)
    else:
        report = simulate(rotations(threads), A, out, n, target=target)
        assert not report.findings, str(report)
    check(A, out, n)


@needs_compiler
def test_values_of_cuda_text():
    A, n = torch.arange(ROWS * COLUMNS, dtype=torch.int32).reshape(ROWS, COLUMNS), 7
    out = torch.full((5, ROWS, COLUMNS), -1, dtype=torch.int32)
    execute(lower(rotations(256), "sm_80"), (1, 1), {"A": A, "C": out}, {"n": n})
    check(A, out, n)

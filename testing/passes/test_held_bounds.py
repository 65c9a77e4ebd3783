"""Loops of two deep in a T.Parallel, the outer one of as many rounds as its index, or what is read there, says."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import pytest
import torch
from passes.run import run

from tilelang_ext import language as T

ROWS = 20


@T.prim_func
def triangles(x: T.Tensor((ROWS,), "int32"), y: T.Tensor((2, ROWS), "int32")):
    with T.Kernel(1, threads=64):
        for i in T.Parallel(ROWS):
            total = T.alloc_var("int32", init=0)
            for j in T.serial(i):
                for k in T.serial(j):
                    total = total + x[i] + k
            y[0, i] = total
            total = 0
            for j in T.serial(x[i], x[i] + i):
                for k in T.serial(2):
                    if j != 3:
                        total = total + j + k
            y[1, i] = total


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx942", "c"])
def test_bounds_by_the_index(target):
    x, y = (torch.arange(ROWS) % 5).int(), torch.full((2, ROWS), -1, dtype=torch.int32)
    run(triangles, x, y, target=target)
    rows = list(enumerate(x.tolist()))
    assert y[0].tolist() == [sum(v + k for j in range(i) for k in range(j)) for i, v in rows]
    assert y[1].tolist() == [sum(j + k for j in range(v, v + i) for k in range(2) if j != 3) for i, v in rows]

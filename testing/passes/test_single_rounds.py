"""A jump in a loop of one round leaves that loop, and not the one around it."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import pytest
import torch
from passes.run import run

from tilelang_ext import language as T

ROWS = 32


@T.prim_func
def jumps(x: T.Tensor((ROWS,), "int32"), y: T.Tensor((ROWS,), "int32")):
    with T.Kernel(1, threads=ROWS):
        for i in T.Parallel(ROWS):
            total = T.alloc_var("int32", init=0)
            for _ in T.serial(3):
                for _q in T.serial(1):
                    total = total + 1
                    if x[i] > 1:
                        T.break_loop()
                    else:
                        total = total + 10
                    total = total + 100
                for _q in T.unroll(1):
                    if x[i] == 0:
                        if y[i] < 0:
                            T.continue_loop()
                        total = total + 1000
                    for r in T.serial(2):  # its jumps are its own
                        if r == 1:
                            T.continue_loop()
                        total = total + 10000
                for _q in T.serial(1):
                    T.loop_break()
                    total = total + 7
            y[i] = total


def expected(x: int) -> int:
    first = 1 if x > 1 else 111
    return 3 * (first + (0 if x == 0 else 10000))


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx1100", "c"])
def test_jumps_of_single_rounds(target):
    x, y = (torch.arange(ROWS) % 3).int(), torch.full((ROWS,), -1, dtype=torch.int32)
    run(jumps, x, y, target=target)
    assert y.tolist() == [expected(value) for value in x.tolist()]

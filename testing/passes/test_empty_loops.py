"""Loops of at most one round that run none for some values, on every target."""

import pytest
import tilelang
import torch

from tilelang_ext import language as T
from tilelang_ext import simulate

COUNTS = [0, 1, 3, 2, -2, 7]


@T.prim_func
def loops(counts: T.Tensor((6,), "int32"), rounds: T.Tensor((6, 5), "float32")):
    with T.Kernel(6, threads=32) as block:
        count = counts[block]
        rounds_f = T.alloc_local((5,), "float32")
        for i in T.unroll(5):
            rounds_f[i] = 0
        if count <= 3:
            for _ in T.serial(T.ceildiv(count, 8)):
                rounds_f[0] += 1
            for _ in T.serial(count % 2):
                rounds_f[1] += 1
            for _ in T.unroll(T.min(count, 1)):
                rounds_f[2] += 1
        else:
            for _ in T.serial(T.ceildiv(4 - count, 8)):
                rounds_f[3] += 1
        half = block // 3
        for _ in T.serial(half):
            rounds_f[4] += 1
        if T.get_thread_binding() == 0:
            for i in T.unroll(5):
                rounds[block, i] = rounds_f[i]


def expected():
    rounds = torch.zeros(6, 5)
    for block, count in enumerate(COUNTS):
        if count <= 3:
            rounds[block, :3] = torch.tensor([max(-(-count // 8), 0), count % 2, max(min(count, 1), 0)])
        else:
            rounds[block, 3] = max(-(-(4 - count) // 8), 0)
        rounds[block, 4] = block // 3
    return rounds


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx942"])
def test_rounds(target):
    rounds = torch.full((6, 5), torch.nan)
    report = simulate(loops, torch.tensor(COUNTS, dtype=torch.int32), rounds, target=target)
    assert not report.findings
    torch.testing.assert_close(rounds, expected())


def test_conditions_on_cuda():
    """Each loop that may run is behind a condition."""
    text = tilelang.lower(loops, target={"kind": "cuda", "arch": "sm_90a"}).kernel_source
    body = text[text.index("counts[") :]
    for number in (0, 1, 2, 4):
        before = body[: body.index(f"rounds_f[{number}] = (rounds_f[{number}] + ")]
        assert before.rstrip().endswith("{"), f"loop {number} has become a statement without a condition"


def serial_loops(dtype):
    """A loop in a program of one thread per block, which a type of 8 bits takes to the pass list of tile programs."""

    @T.prim_func
    def serial_loops(counts: T.Tensor((6,), "int32"), rounds: T.Tensor((6,), dtype)):
        with T.Kernel(6, threads=1) as block:
            count = counts[block]
            number = T.alloc_var("int32", 0)
            if count <= 3:
                for _ in T.serial(T.ceildiv(count, 8)):
                    number += 1
            rounds[block] = T.cast(number, dtype)

    return serial_loops


@pytest.mark.parametrize("dtype", ["float32", "float8_e4m3fn"])
def test_rounds_on_c(dtype):
    rounds = torch.full((6,), 7.0).to(getattr(torch, dtype))
    tilelang.compile(serial_loops(dtype), target="c")(torch.tensor(COUNTS, dtype=torch.int32), rounds)
    torch.testing.assert_close(rounds.float(), expected()[:, 0])

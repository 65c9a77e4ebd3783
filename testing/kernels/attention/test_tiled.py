"""The kernel for every target, in the simulator: values against float64, no finding."""

from dataclasses import replace

import pytest
import torch
from kernels.attention.operands import BF16, FP16, check, expected, operands, problem

from tilelang_ext import simulate
from tilelang_ext.kernels.attention import tiled

HIP = "hip"


@pytest.mark.parametrize(
    ("of", "target", "sizes", "lengths"),
    [
        # Every head size and every target once; pairwise with the type, the mask, sinks, groups of heads and lengths
        (problem(64, FP16, arch="", causal=True, has_sinks=True), "metal", (1, 40, 50, 2, 1), ()),
        (problem(128, BF16, arch="", window=20), "metal4", (2, 35, 36, 1, 1), ()),
        (problem(256, BF16, arch="", causal=True, has_lengths=True), "metal", (1, 50, 60, 1, 1), ([0, 33, 40], [0, 20, 55])),
        (problem(512, FP16, arch=""), "metal4", (1, 9, 40, 1, 1), ()),
        (problem(64, BF16, arch="gfx942", causal=True, has_lengths=True), HIP, (1, 80, 90, 2, 1), ([0, 66, 70], [0, 70, 85])),
        (problem(72, FP16, arch="gfx950", has_sinks=True), HIP, (1, 10, 70, 2, 2), ()),
        (problem(256, FP16, arch="gfx1100", window=30, has_sinks=True), HIP, (1, 70, 20, 1, 1), ()),
        (problem(512, BF16, arch="gfx1201", causal=True), HIP, (1, 20, 70, 8, 1), ()),
    ],
)
def test_values(of, target, sizes, lengths):
    """Tails of every extent; rows that see no key."""
    dtype = getattr(torch, of.dtype)
    q, k, v, sinks = operands(*sizes, of.head_dim, dtype)
    wanted = expected(of, q, k, v, sinks, *lengths)
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32) for cu in lengths or ([0], [0]))
    if lengths:
        for tensor, cu in ((q, cu_q), (k, cu_k), (v, cu_k)):
            tensor[:, cu[-1] :] = torch.nan
    out = torch.full(q.shape, torch.nan, dtype=dtype)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan)
    kernel = tiled.attention(of, tiled.pick_config(of))
    report = simulate(
        kernel, q, k, v, sinks, cu_q, cu_k, out, lse, target={"kind": HIP, "mcpu": of.arch} if target == HIP else target
    )
    assert not report.findings, str(report)
    check(out, lse, *wanted)


def test_both_ways_of_the_probabilities():
    """P through shared memory and P in registers give the same result, to one unit in the last place."""
    of = problem(64, FP16, arch="")
    q, k, v, sinks = operands(1, 20, 40, 1, 1, 64, FP16)
    nothing, results = torch.zeros(1, dtype=torch.int32), []
    for shares_P in (False, True):
        out, lse = torch.full(q.shape, torch.nan, dtype=FP16), torch.full((1, 1, 20), torch.nan)
        kernel = tiled.attention(of, replace(tiled.pick_config(of), shares_P=shares_P))
        report = simulate(kernel, q, k, v, sinks, nothing, nothing, out, lse, target="metal")
        assert not report.findings, str(report)
        results.append((out, report.counts.threadgroup_bytes_written))
    (registers, fewer), (shared, more) = results
    assert (registers.view(torch.int16).int() - shared.view(torch.int16).int()).abs().max() <= 1
    assert fewer < more

"""The kernels of `gated_delta_prefill` on every target, in the simulator, beside the recurrence in float64."""

import pytest
import torch
from kernels.gated_delta.operands import Prefill, prefill_problem

from tilelang_ext import simulate
from tilelang_ext.kernels.gated_delta import scan_chunks
from tilelang_ext.kernels.gated_delta.solve_chunks import solve_chunks


@pytest.mark.parametrize(
    ("of", "sizes"),
    [
        # Sequences of some chunks, of no token, of one, and a NaN in every token that belongs to none
        (prefill_problem("", 1, 2, 128, 32, l2_norm=True, has_initial=True, has_lengths=True), [40, 0, 1, 33]),
        (prefill_problem("gfx942", 2, 2, 32, 48, torch.float16, torch.bfloat16), (2, 70)),
    ],
)
def test_values(of, sizes):
    given = Prefill(of, sizes)
    for kernel, names in (
        (solve_chunks(of), given.SOLVE),
        (scan_chunks.scan_chunks(of, scan_chunks.pick_config(of)), given.SCAN),
    ):
        target = {"kind": "hip", "mcpu": of.arch} if of.arch else "metal"
        report = simulate(kernel, *(given.tensors[name] for name in names), target=target, check=True, timeout=300)
        assert not report.findings, str(report)
    given.check()

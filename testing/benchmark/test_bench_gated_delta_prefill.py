"""The benchmark of `gated_delta_prefill`: what it checks, on the CPU; it is timed on an NVIDIA GPU alone."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernels.gated_delta.operands import inputs

from tilelang_ext import gated_delta_prefill

sys.path.append(str(Path(__file__).parents[2] / "benchmark"))
import bench_gated_delta_prefill as bench


def test_check_notices_a_wrong_head():
    """What the operator returns on the CPU passes; two heads exchanged, or a state transposed, do not."""
    torch.manual_seed(0)
    given = inputs(2, 6, 1, 2, bench.K, bench.V)
    del given["state"]
    results = gated_delta_prefill(**given)
    places = [(0, 0), (1, 1)]
    wanted = bench.expected(SimpleNamespace(**given), places)
    assert bench.check(places, wanted, results).max < 1e-2
    for wrong in ((results[0].flip(2), results[1]), (results[0], results[1].transpose(2, 3))):
        with pytest.raises(AssertionError, match="max error"):
            bench.check(places, wanted, wrong)

"""The cost model of `matmul` beside the times it was fitted to."""

import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmark")]

import fit_matmul as fit  # noqa: E402


def test_choices_cost_little(capsys):
    """A change of the model or of the choices that makes them worse on an H200 is seen without one."""
    cost = fit.main([])
    assert len(cost) == 344
    assert statistics.geometric_mean(cost) <= 1.015
    assert max(cost) <= 1.25
    assert "344 sizes: choices cost 1.0" in capsys.readouterr().out


def test_a_walk_is_no_worse():
    sizes = fit.load([fit.RESULTS / "matmul_h200_parts.csv"])
    before = {name: getattr(fit.sm90_config, name) for name in fit.CONSTANTS}
    try:
        error = fit.error(sizes)
        fit.walk(sizes, 20, 0)
        assert fit.error(sizes) <= error
        assert before != {name: getattr(fit.sm90_config, name) for name in fit.CONSTANTS}
    finally:
        for name, value in before.items():
            setattr(fit.sm90_config, name, value)

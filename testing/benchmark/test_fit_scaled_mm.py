"""The cost model of `scaled_mm` beside the times it was fitted to."""

import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmark")]

import fit_scaled_mm as fit  # noqa: E402


def test_choices_cost_little(capsys):
    """A change of the model or of the choices that makes them worse on an H200 is seen without one."""
    cost = fit.main([])
    assert len(cost) == 462
    assert statistics.geometric_mean(cost) <= 1.02
    assert max(cost) <= 1.2
    assert "462 sizes and kinds: choices cost 1.0" in capsys.readouterr().out
    assert sum(map(len, fit.load(fit.TIMES))) > 1000, "choices that were measured and still are some"


def test_constants_are_set_as_they_were_read():
    before = fit.constants()
    changed = [value * 2 for value in before]
    try:
        fit.set_constants(changed)
        assert fit.constants() == changed
    finally:
        fit.set_constants(before)
    assert fit.constants() == before

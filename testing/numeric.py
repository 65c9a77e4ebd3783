"""The one tolerance of the tests: error against float64, relative to max(rms of the reference, |reference|)."""

from __future__ import annotations

import numpy as np
import torch

# Largest and root-mean-square relative error that each output type may show: rounding of the output once, plus a
# float32 sum. A kernel that rounds more often says so by its own bounds.
BOUNDS = {"float32": (1e-5, 2e-6), "float16": (1e-3, 3e-4), "bfloat16": (8e-3, 2.4e-3)}


def assert_close(actual: torch.Tensor, expected: np.ndarray, *, dtype: str, max_error=None, rms_error=None) -> None:
    """Assert that `actual` is finite and within the bounds of `dtype` everywhere; else name the worst coordinate."""
    got, want = actual.double().numpy(), np.asarray(expected, dtype=np.float64)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    missing = ~np.isfinite(got)
    if missing.any():
        raise AssertionError(f"{missing.sum()} of {missing.size} elements not finite, first at {tuple(np.argwhere(missing)[0])}")
    error = np.abs(got - want) / np.maximum(np.abs(want), max(np.sqrt(np.mean(want**2)), np.finfo(np.float64).tiny))
    worst = np.unravel_index(error.argmax(), error.shape)
    largest, rms = error[worst], np.sqrt(np.mean(error**2))
    max_bound, rms_bound = max_error or BOUNDS[dtype][0], rms_error or max_error or BOUNDS[dtype][1]
    assert largest <= max_bound and rms <= rms_bound, (
        f"error {largest:.3g} (bound {max_bound:.3g}) at {tuple(int(i) for i in worst)}: got {got[worst]!r}, "
        f"expected {want[worst]!r}; rms {rms:.3g} (bound {rms_bound:.3g})"
    )

"""One tolerance function for every test and benchmark: maximum and RMS error against a float64 reference.

An element's error is measured against the larger of its own magnitude and the RMS of the whole reference: relative where a
value is large, and not blown up where it is near zero by cancellation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

# (max, RMS) by the type that the result is stored in: one rounding of it (half a unit in the last place), with room for
# the float32 sum before; for float32 itself the sum is all there is.
BOUNDS = {
    "float32": (1e-5, 2e-6),
    "float16": (1e-3, 3e-4),
    "bfloat16": (8e-3, 2.4e-3),
    "float8_e4m3fn": (7e-2, 4e-2),
    "float8_e5m2": (1.4e-1, 8e-2),
}


class Error(NamedTuple):
    """How far a result is from its reference; `worst` is the coordinate of the largest error."""

    max: float
    rms: float
    worst: tuple[int, ...]


def _float64(values) -> np.ndarray:
    if hasattr(values, "detach"):  # torch, fp8 included
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def measure(actual, expected) -> Error:
    """Return the errors of `actual` (torch or numpy) against `expected`; an infinity or NaN must stand where expected."""
    got, want = _float64(actual), _float64(expected)
    if got.shape != want.shape:
        raise AssertionError(f"result: must have the reference's shape {want.shape}; got {got.shape}")
    if want.size == 0:
        return Error(0.0, 0.0, ())
    finite = np.isfinite(want)
    level = math.sqrt(np.mean(want[finite] ** 2)) if finite.any() else 0.0
    scale = np.maximum(np.abs(want), level)
    scale[~(scale > 0)] = 1.0
    with np.errstate(invalid="ignore"):
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        error = np.where(same, 0.0, np.abs(got - want) / scale)
    error[~same & ~(finite & np.isfinite(got))] = np.inf
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
    return Error(float(error.max()), math.sqrt(np.mean(error**2)), worst)


def assert_close(actual, expected, *, dtype: str, max_error: float | None = None, rms_error: float | None = None) -> Error:
    """Assert that both errors are within the tolerance of `dtype` (or the limits given), and return them.

    The message names the worst coordinate with both values there, and how many elements are out.
    """
    error = measure(actual, expected)
    max_limit = max_error or BOUNDS[dtype][0]
    rms_limit = rms_error or max_error or BOUNDS[dtype][1]
    if error.max > max_limit or error.rms > rms_limit:
        got, want = _float64(actual), _float64(expected)
        raise AssertionError(
            f"{dtype} {want.shape}: max error {error.max:.3g} (limit {max_limit:.3g}), "
            f"RMS error {error.rms:.3g} (limit {rms_limit:.3g}); "
            f"worst at {error.worst}: got {got[error.worst]:.9g}, expected {want[error.worst]:.9g}"
        )
    return error

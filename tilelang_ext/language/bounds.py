"""The largest and the smallest number of a dtype, where those of upstream are not numbers of it."""

from __future__ import annotations

import tilelang.language as upstream
from tvm import tirx

# TVM gives float32's for bfloat16, where it rounds to infinity, and 448 for E4M3 FNUZ. Source: torch.finfo of the types.
_LARGEST = {"bfloat16": (2 - 2**-7) * 2.0**127, "float8_e4m3fnuz": 240.0}


def max_value(dtype: str) -> tirx.PrimExpr:
    """Return the largest finite number of `dtype`, as a constant of that dtype."""
    largest = _LARGEST.get(str(dtype))
    return upstream.max_value(dtype) if largest is None else tirx.FloatImm(str(dtype), largest)


def min_value(dtype: str) -> tirx.PrimExpr:
    """Return the smallest finite number of `dtype`, as a constant of that dtype; 0 for FNUZ types, unsigned to TVM."""
    return tirx.FloatImm("bfloat16", -_LARGEST["bfloat16"]) if str(dtype) == "bfloat16" else upstream.min_value(dtype)

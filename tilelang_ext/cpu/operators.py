"""Operators that C spells otherwise than the language means them."""

from __future__ import annotations

import functools

from tvm import tirx
from tvm.ir.op import register_intrin_lowering

from tilelang_ext.passes.operators import Rule, away_from_zero, infinity, nearest_even, only_to_nearest

_LIBM = {"tirx.fabs": "fabs", "tirx.fmod": "fmod"}  # upstream has no rule for them; float32's have a suffix


@functools.cache
def register_functions() -> None:
    """Register how target c spells what TVM lowers for other targets only: `T.abs`, `T.fmod` and `T.exp10` of floats."""
    for operator in (*_LIBM, "tirx.exp10"):
        register_intrin_lowering(operator, target="c", f=_lower)


def _lower(call: tirx.Call) -> tirx.PrimExpr:
    if call.op.name in _LIBM:
        suffix = "f" if str(call.dtype) == "float32" else ""
        return tirx.call_pure_extern(call.dtype, _LIBM[call.op.name] + suffix, *call.args)
    # C has no exp10; a double's power is exact enough for either type.
    power = tirx.call_pure_extern("float64", "pow", tirx.const(10.0, "float64"), tirx.Cast("float64", call.args[0]))
    return tirx.Cast(call.dtype, power) if str(call.dtype) != "float64" else power


RULES: dict[str, Rule] = {
    "tl.infinity": infinity,
    "tirx.round": nearest_even,
    "tl.round_ties_away_from_zero": away_from_zero,
    **only_to_nearest("target c"),
}

"""Operators that C spells otherwise than the language means them."""

from __future__ import annotations

import functools

from tvm import DataType, tirx
from tvm.ir import Op
from tvm.ir.op import register_intrin_lowering

from tilelang_ext.passes.operators import Rule, away_from_zero, infinity, nearest_even, no_hints
from tilelang_ext.passes.plain_words import arithmetic, fast_functions, likely, pairs, plain_copies, wide_nextafter

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


def _count(call: tirx.Call) -> tirx.PrimExpr:
    """Bits that are set, by the compiler's function."""
    bits = DataType(call.args[0].dtype).bits
    name = "__builtin_popcountll" if bits == 64 else "__builtin_popcount"
    operand = tirx.Cast(f"uint{bits}", call.args[0])
    return tirx.Cast(call.dtype, tirx.call_pure_extern("int32", name, operand))


def _leading_zeros(call: tirx.Call) -> tirx.PrimExpr:
    """Leading zeros, by the compiler's function, which knows none of 0."""
    operand = call.args[0]
    bits = DataType(operand.dtype).bits
    wide = max(bits, 32)
    zero = tirx.const(0, operand.dtype)
    unsigned = tirx.Cast(f"uint{wide}", tirx.Cast(f"uint{bits}", operand))
    name = "__builtin_clzll" if wide == 64 else "__builtin_clz"
    count = tirx.call_pure_extern("int32", name, unsigned) - tirx.const(wide - bits, "int32")
    return tirx.Cast(call.dtype, tirx.if_then_else(operand == zero, tirx.const(bits, "int32"), count))


RULES: dict[str, Rule] = {
    "tl.infinity": infinity,
    "tirx.round": nearest_even,
    "tl.round_ties_away_from_zero": away_from_zero,
    "tirx.popcount": _count,
    "tirx.clz": _leading_zeros,
    "tl.__ldg": lambda call: call.args[0],
    "tl.loop_break": lambda call: tirx.Call("void", Op.get("tirx.break_loop"), []),
    "tirx.likely": likely,
    "tirx.nextafter": wide_nextafter,
    **arithmetic("target c"),
    **pairs(),
    **fast_functions(),
    **no_hints(),
    **plain_copies(),
}

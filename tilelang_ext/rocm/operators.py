"""Operators that upstream's HIP generator lacks or gets wrong, in words that it knows."""

from __future__ import annotations

from tvm import DataType, tirx
from tvm.ir import Op

from tilelang_ext.formats import FORMATS
from tilelang_ext.passes.operators import Rule, device_assert, infinity, nearest_even, no_hints, only_to_nearest

_NARROW = {format.dtype for format in FORMATS}
_OPERATORS = {"tl.ieee_add": tirx.Add, "tl.ieee_sub": tirx.Sub, "tl.ieee_mul": tirx.Mul, "tl.ieee_fdiv": tirx.Div}

_NOT_OF_HALVES = ("pow", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "log1p")
_FAST = ("exp", "exp10", "log", "log2", "log10", "tan", "cos", "sin")


def _round(call: tirx.Call) -> tirx.Call | None:
    """`roundf` goes away from zero; for halves the generator has `hrint`, which goes to even."""
    return nearest_even(call) if DataType(call.dtype).bits > 16 else None


def _in_float(call: tirx.Call) -> tirx.Cast | None:
    """A function that AMD's headers lack for 16 bits, or, as `hpow`, have for integers only: computed in float32."""
    if DataType(call.dtype).bits > 16:
        return None
    wide = f"float32x{DataType(call.dtype).lanes}" if DataType(call.dtype).lanes > 1 else "float32"
    return tirx.Cast(call.dtype, tirx.Call(wide, call.op, [tirx.Cast(wide, operand) for operand in call.args]))


def _precise(call: tirx.Call) -> tirx.Call:
    """Fast math is a permission, of which nothing is made here."""
    return tirx.Call(call.dtype, Op.get("tirx." + call.op.name.removeprefix("tl.__")), call.args)


def _to_nearest(call: tirx.Call) -> tirx.PrimExpr:
    """`T.ieee_*` to nearest, which is how HIP's operators and functions round."""
    name, operands = call.op.name, [operand for operand in call.args if not isinstance(operand, tirx.StringImm)]
    if name in _OPERATORS:
        return _OPERATORS[name](*operands)
    if name == "tl.ieee_fmaf":
        return tirx.call_pure_extern(call.dtype, "fma" if DataType(call.dtype).bits == 64 else "fmaf", *operands)
    root = tirx.Call(call.dtype, Op.get("tirx.sqrt"), operands)
    if name == "tl.ieee_fsqrt":
        return root
    return tirx.const(1.0, call.dtype) / (operands[0] if name == "tl.ieee_frcp" else root)


def _print(call: tirx.Call) -> tirx.Call | None:
    """`T.print` of a narrow float as a float: upstream's text reads its code as the chip's own format has it."""
    name, *operands = call.args
    if not name.value.startswith("debug_print_") or str(DataType(call.args[-1].dtype)) not in _NARROW:
        return None
    return tirx.Call(call.dtype, call.op, [name, *operands[:-1], tirx.Cast("float32", operands[-1])])


def _checked(check: Rule) -> Rule:
    def rule(call: tirx.Call) -> tirx.PrimExpr:
        check(call)
        return _to_nearest(call)

    return rule


RULES: dict[str, Rule] = {
    "tl.infinity": infinity,
    "tl.device_assert": device_assert,
    "tl.device_assert_with_msg": device_assert,
    "tirx.call_extern": _print,
    "tirx.round": _round,
    **dict.fromkeys((f"tirx.{name}" for name in _NOT_OF_HALVES), _in_float),
    **{f"tl.__{name}": _precise for name in _FAST},
    "tl.ieee_frsqrt": _to_nearest,
    **{name: _checked(check) for name, check in only_to_nearest("AMD").items()},
    **no_hints(),
}

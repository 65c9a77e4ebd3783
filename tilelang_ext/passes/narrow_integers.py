"""Integers of 8 and 16 bits wrap at their own width where C computes them in 32.

    Before  (x << 4) >> 4               x of 8 bits: C shifts an int
            (x + y) > z
    After   int8(int(x) << 4) >> 4
            int8(int(x) + int(y)) > z

Where the text is C, operands narrower than an int are promoted, and bits beyond their width come back. They are seen by
whatever has results that do not follow from the lower bits of its operands alone; a store to a buffer of that type drops them.
Vectors are computed element by element, each in a variable of its type. Runs last.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten

_NARROW = {"int8": 8, "uint8": 8, "int16": 16, "uint16": 16}
_GROWING = (tirx.Add, tirx.Sub, tirx.Mul)  # results may have bits beyond the width
_GROWING_CALLS = ("tirx.shift_left", "tirx.bitwise_not")
_CARRYING_CALLS = ("tirx.bitwise_and", "tirx.bitwise_or", "tirx.bitwise_xor")  # results have those of their operands
_SEEING = (
    tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE, tirx.Min, tirx.Max,
    tirx.FloorDiv, tirx.FloorMod, tirx.Div, tirx.Mod,
)  # fmt: skip
_IF = "tirx.if_then_else"


def _name(node: tirx.PrimExpr) -> str:
    return node.op.name if isinstance(node, tirx.Call) and isinstance(node.op, Op) else ""


def _wrapped(node: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return the expression without bits beyond its width."""
    if str(node.dtype) not in _NARROW:
        return node
    if isinstance(node, _GROWING):
        return tirx.Cast(node.dtype, type(node)(_promoted(node.a), _promoted(node.b)))
    if _name(node) in _GROWING_CALLS:
        return tirx.Cast(node.dtype, tirx.Call("int32", node.op, [_promoted(operand) for operand in node.args]))
    if _name(node) in _CARRYING_CALLS:
        return _with_arguments(node, range(2))
    if _name(node) == _IF:
        return _with_arguments(node, (1, 2))
    if isinstance(node, tirx.Select):
        return tirx.Select(node.condition, _wrapped(node.true_value), _wrapped(node.false_value))
    return node


def _promoted(operand: tirx.PrimExpr) -> tirx.PrimExpr:
    return tirx.IntImm("int32", operand.value) if isinstance(operand, tirx.IntImm) else tirx.Cast("int32", operand)


def _with_arguments(call: tirx.Call, numbers) -> tirx.Call:
    arguments = [_wrapped(argument) if i in numbers else argument for i, argument in enumerate(call.args)]
    return tirx.Call(call.dtype, call.op, arguments)


def _rewrite(node: tirx.PrimExpr) -> tirx.PrimExpr | None:
    """Return a node that sees bits beyond the width of its operands, with operands that have none."""
    if isinstance(node, _SEEING):
        a, b = _wrapped(node.a), _wrapped(node.b)
        return None if a.same_as(node.a) and b.same_as(node.b) else type(node)(a, b)
    if isinstance(node, tirx.Cast):
        width = _NARROW.get(str(node.value.dtype))
        if width is None or _NARROW.get(str(node.dtype), width + 1) <= width:
            return None
        value = _wrapped(node.value)
        return None if value.same_as(node.value) else tirx.Cast(node.dtype, value)
    if not isinstance(node, tirx.Call) or _name(node) in (*_CARRYING_CALLS, "tirx.bitwise_not", _IF):
        return None
    seen = [i for i, argument in enumerate(node.args) if isinstance(argument, tirx.PrimExpr)]
    if _name(node) == "tirx.shift_left":
        seen = [1]
    call = _with_arguments(node, seen)
    return None if all(a.same_as(b) for a, b in zip(call.args, node.args, strict=True)) else call


def _wrap_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    kinds = ["tirx.Call", "tirx.Cast", *(f"tirx.{operator.__name__}" for operator in _SEEING)]
    return func.with_body(rewritten(func.body, _rewrite, kinds))


WrapNarrowIntegers = prim_func_pass(_wrap_all, opt_level=0, name="tilelang_ext.WrapNarrowIntegers")

"""Integers of 8 and 16 bits wrap at their own width where C computes them in 32.

    Before  (x << 4) >> 4               x of 8 bits: C shifts an int
    After   int8(int(x) << 4) >> 4

Where the text is C, operands narrower than an int are promoted, and bits beyond their width come back. Runs last.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten

_NARROW = ("int8", "uint8", "int16", "uint16")
_OPERATORS = (tirx.Add, tirx.Sub, tirx.Mul)
_CALLS = ("tirx.shift_left", "tirx.bitwise_not")


def _wrap(node: tirx.PrimExpr) -> tirx.PrimExpr | None:
    if str(node.dtype) not in _NARROW:
        return None
    if isinstance(node, _OPERATORS):
        return tirx.Cast(node.dtype, type(node)(_promoted(node.a), _promoted(node.b)))
    if isinstance(node.op, Op) and node.op.name in _CALLS:
        return tirx.Cast(node.dtype, tirx.Call("int32", node.op, [_promoted(operand) for operand in node.args]))
    return None


def _promoted(operand: tirx.PrimExpr) -> tirx.PrimExpr:
    return tirx.IntImm("int32", operand.value) if isinstance(operand, tirx.IntImm) else tirx.Cast("int32", operand)


def _wrap_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    kinds = ["tirx.Call", *(f"tirx.{operator.__name__}" for operator in _OPERATORS)]
    return func.with_body(rewritten(func.body, _wrap, kinds))


WrapNarrowIntegers = prim_func_pass(_wrap_all, opt_level=0, name="tilelang_ext.WrapNarrowIntegers")

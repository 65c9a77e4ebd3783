"""Casts of integers wrap: what a simplifier would conclude from the value before the cast is hidden from it.

    Before  max(int32(int8(x & 255)), 0)              int8(u) < 0, u of uint8         int8(x * 3) % 3
    Within  max(int32(keep(int8(x & 255))), 0)        keep(int8(u)) < 0               keep(int8(x * 3)) % 3
    After   as before, in the text

TVM takes a cast for one that keeps the value, so x & 255 is at least 0 as an int8 too: the first becomes x & 255, the second
false and the third 0. Runs before the first pass that simplifies; `ReleaseFloatArithmetic` releases these too. Casts whose
value fits, or of which nothing is known but its type, stay as they are.
"""

from __future__ import annotations

from tvm import arith, tirx
from tvm.ir import Range
from tvm.tirx.stmt_functor import post_order_visit, substitute
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.float_arithmetic import keep
from tilelang_ext.passes.rewrite import rewritten

_PLUS, _MINUS = arith.ConstIntBound.POS_INF, arith.ConstIntBound.NEG_INF


def _bits(dtype: str) -> tuple[bool, int] | None:
    """Whether a type of integers is signed, and its bits; None for any other type, and for vectors."""
    for prefix, signed in (("int", True), ("uint", False)):
        if dtype.startswith(prefix) and dtype[len(prefix) :].isdigit():
            return signed, int(dtype[len(prefix) :])
    return None


def _range(dtype: str) -> tuple[int, int] | None:
    found = _bits(dtype)
    if found is None or found[1] < 8:
        return None
    signed, bits = found
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


def _may_mislead(dtype: str, value: tirx.PrimExpr, analyzer: arith.Analyzer) -> bool:
    """Whether the cast may wrap and something other than the type of its value is known."""
    to, of = _range(dtype), _range(str(value.dtype))
    if to is None or of is None:
        return False
    bound = analyzer.const_int_bound(value)
    low = of[0] if bound.min_value == _MINUS else max(of[0], bound.min_value)
    high = of[1] if bound.max_value == _PLUS else min(of[1], bound.max_value)
    if to[0] <= low and high <= to[1]:
        return False
    is_partly_known = low > to[0] or high < to[1]
    return is_partly_known or (_bits(dtype)[1] < 32 and not isinstance(value, tirx.BufferLoad))


def _keep_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    analyzer, bound = arith.Analyzer(), {}

    def bind(node):
        if isinstance(node, tirx.Bind) and isinstance(node.value, tirx.PrimExpr):
            bound[node.var] = substitute(node.value, bound)
        elif isinstance(node, tirx.For):
            analyzer.bind(node.loop_var, Range.from_min_extent(node.min, node.extent), allow_override=True)

    post_order_visit(func.body, bind)

    def wrapped(node):
        return keep(node) if _may_mislead(str(node.dtype), substitute(node.value, bound), analyzer) else None

    return func.with_body(rewritten(func.body, wrapped, ["tirx.Cast"]))


KeepWrappingCasts = prim_func_pass(_keep_all, opt_level=0, name="tilelang_ext.KeepWrappingCasts")

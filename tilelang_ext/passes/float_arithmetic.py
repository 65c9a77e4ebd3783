"""Floats are no numbers of algebra: what a simplifier would cancel between them stays.

    Before  y - y           (x + 1e8) - 1e8            x != x            not x < y
    Within  y - keep(y)     (x + 1e8) - keep(1e8)      x != keep(x)      not keep(x < y)
    After   y - y           (x + 1e8) - 1e8            x != x            not x < y

TVM's rules are those of integers. Of a NaN the first is NaN and the third is true; the second rounds; the last is true where
x >= y is not. `KeepFloatArithmetic` runs before the first pass that simplifies and hides one operand of each such expression
from it. The last one comes after the pass list: `ReleaseFloatArithmetic` runs where text is generated.
"""

from __future__ import annotations

from tvm import arith, ir, tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import post_order_visit, substitute
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten

KEEP = "tilelang_ext.keep"  # of the native library
_ARITHMETIC = (tirx.Sub, tirx.Mul, tirx.EQ, tirx.NE)
_COMPARISONS = (tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE)


def keep(expr: tirx.PrimExpr) -> tirx.Call:
    """Return the expression hidden from simplifiers; `ReleaseFloatArithmetic` uncovers it."""
    return tirx.Call(expr.dtype, Op.get(KEEP), [expr])


def is_float(expr: tirx.PrimExpr) -> bool:
    """Whether an expression is of floats, one or several."""
    return str(expr.dtype).startswith(("float", "bfloat"))


def _keep_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    bound: dict[tirx.Var, tirx.PrimExpr] = {}

    def bind(node):
        if isinstance(node, tirx.Bind) and isinstance(node.value, tirx.PrimExpr):
            bound[node.var] = substitute(node.value, bound)

    post_order_visit(func.body, bind)

    def kept(node):
        if isinstance(node, tirx.Not):
            return tirx.Not(keep(node.a)) if isinstance(node.a, _COMPARISONS) and is_float(node.a.a) else None
        if not is_float(node.a):
            return None
        is_as_written = _is_as_written(type(node), substitute(node.a, bound), substitute(node.b, bound))
        return None if is_as_written else type(node)(node.a, keep(node.b))

    return func.with_body(rewritten(func.body, kept, ["tirx.Not", *(f"tirx.{kind.__name__}" for kind in _ARITHMETIC)]))


def _is_as_written(operator, a: tirx.PrimExpr, b: tirx.PrimExpr) -> bool:
    """Whether the simplifier leaves `a operator b` alone, apart from what it does to a and b by themselves."""
    simplify = arith.Analyzer().simplify
    alone = simplify(operator(simplify(a), keep(simplify(b))))
    return ir.structural_equal(simplify(operator(a, b)), _release(tirx.Evaluate(alone)).value)


def _release(stmt: tirx.Stmt) -> tirx.Stmt:
    def release(node):
        return node.args[0] if isinstance(node.op, Op) and node.op.name == KEEP else None

    return rewritten(stmt, release, ["tirx.Call"])


def _release_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    return func.with_body(_release(func.body))


KeepFloatArithmetic = prim_func_pass(_keep_all, opt_level=0, name="tilelang_ext.KeepFloatArithmetic")
ReleaseFloatArithmetic = prim_func_pass(_release_all, opt_level=0, name="tilelang_ext.ReleaseFloatArithmetic")

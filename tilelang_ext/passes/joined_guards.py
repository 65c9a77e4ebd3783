"""Conditions around a store that converts types are one condition.

    Before  for i in Parallel(16): if i < n: if p[i] > 0: C[i] = cast(x[i])
    After   for i in Parallel(16): if i < n and p[i] > 0: C[i] = cast(x[i])

Upstream's DecoupleTypeCast takes such a store, once vectorised, apart into a conversion and a copy, and gives the copy the
outermost condition alone. `guarded_casts` repairs that where our own pass list has a place before it; this pass runs on tile
programs, for target `cuda`, whose pass list is upstream's.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.stmt_functor import post_order_visit
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten


def _join(loop: tirx.For) -> tirx.Stmt | None:
    if loop.kind not in (tirx.ForKind.PARALLEL, tirx.ForKind.VECTORIZED):
        return None
    body = rewritten(loop.body, _join_conditions, ["tirx.IfThenElse"])
    if body.same_as(loop.body):
        return None
    return tirx.For(
        loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, loop.annotations, loop.step
    )  # fmt: skip


def _join_conditions(node: tirx.IfThenElse) -> tirx.Stmt | None:
    inner = node.then_case
    if node.else_case is not None or not isinstance(inner, tirx.IfThenElse) or inner.else_case is not None:
        return None
    return tirx.IfThenElse(tirx.And(node.condition, inner.condition), inner.then_case, None) if _converts(inner) else None


def _converts(stmt: tirx.Stmt) -> bool:
    """Whether a statement stores a value of another type than those it loads."""
    found = False

    def visit(node):
        nonlocal found
        if isinstance(node, tirx.BufferStore):
            found = found or _has_cast(node.value)

    post_order_visit(stmt, visit)
    return found


def _has_cast(value: tirx.PrimExpr) -> bool:
    found = False

    def visit(node):
        nonlocal found
        found = found or isinstance(node, tirx.Cast)

    post_order_visit(value, visit)
    return found


def _join_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    return func.with_body(rewritten(func.body, _join, ["tirx.For"]))


JoinGuardsOfCasts = prim_func_pass(_join_all, opt_level=0, name="tilelang_ext.JoinGuardsOfCasts")

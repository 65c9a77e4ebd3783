"""Conditions in a vectorised loop that converts types stand where upstream's DecoupleTypeCast sees them.

    Before  for v in vectorized(4): if a: if p[v]: C[v] = cast(x[v])       (a does not depend on v)
    After   if a: for v in vectorized(4): if p[v]: C[v] = cast(x[v])

    Before  for v in vectorized(4): if p[v]: if q[v]: C[v] = cast(x[v])
    After   for v in vectorized(4): if p[v] and q[v]: C[v] = cast(x[v])

    Before  for v in vectorized(4): if p[v]: C[v] = cast(x[v]) else: D[v] = cast(y[v])
    After   for v in serial(4): ...

That pass takes stores apart into conversions and copies, and gives the copies the outermost condition alone, if it has no other
branch: what the conditions inside it guard is overwritten with what nobody wrote. Runs just before it.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.stmt_functor import post_order_visit, substitute
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten


def _move(loop: tirx.For) -> tirx.Stmt | None:
    if loop.kind != tirx.ForKind.VECTORIZED:
        return None
    body = _without_bindings(loop.body)
    if not isinstance(body, tirx.IfThenElse) or not _converts(body):
        return None
    moved = _around(loop, body)
    return None if moved.same_as(loop) else moved


def _around(loop: tirx.For, body: tirx.Stmt) -> tirx.Stmt:
    """Return `loop` with `body`, its conditions moved."""
    if not isinstance(body, tirx.IfThenElse):
        return _with(loop, body, loop.kind)
    if loop.loop_var not in set(tirx.analysis.undefined_vars(body.condition)):
        otherwise = None if body.else_case is None else _around(loop, _without_bindings(body.else_case))
        return tirx.IfThenElse(body.condition, _around(loop, _without_bindings(body.then_case)), otherwise)
    condition, inner = body.condition, body.then_case
    while body.else_case is None:
        inner = _without_bindings(inner)
        if not isinstance(inner, tirx.IfThenElse):
            return _with(loop, tirx.IfThenElse(condition, inner, None), loop.kind)
        body, condition, inner = inner, tirx.And(condition, inner.condition), inner.then_case
    return _with(loop, loop.body, tirx.ForKind.SERIAL)


def _with(loop: tirx.For, body: tirx.Stmt, kind: tirx.ForKind) -> tirx.For:
    return tirx.For(loop.loop_var, loop.min, loop.extent, kind, body, loop.thread_binding, loop.annotations, loop.step)


def _without_bindings(stmt: tirx.Stmt) -> tirx.Stmt:
    """Return the one statement behind bindings with their values in it; any other as it is."""
    if not isinstance(stmt, tirx.SeqStmt) or not all(isinstance(child, tirx.Bind) for child in list(stmt.seq)[:-1]):
        return stmt
    *bindings, last = stmt.seq
    for binding in reversed(bindings):
        last = substitute(last, {binding.var: binding.value})
    return _without_bindings(last)


def _converts(stmt: tirx.Stmt) -> bool:
    found = False

    def visit(node):
        nonlocal found
        found = found or isinstance(node, tirx.Cast)

    post_order_visit(stmt, visit)
    return found


def _move_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    return func.with_body(rewritten(func.body, _move, ["tirx.For"]))


MoveGuardsOfCasts = prim_func_pass(_move_all, opt_level=0, name="tilelang_ext.MoveGuardsOfCasts")

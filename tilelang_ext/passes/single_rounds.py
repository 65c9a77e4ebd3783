"""Loops of one round lose their jumps, before simplification loses the loop.

    Before  for q in range(1): a; if c: break; b             After   for q in range(1): a; if c: pass, else: b

Simplification puts the body of such a loop in its place. A `break` or `continue` in it would then be one of the loop around.
What follows a jump in the round stands behind the conditions under which no jump is taken.
"""

from __future__ import annotations

from tvm import arith, tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import pre_order_visit
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten

_JUMPS = ("tl.loop_break", "tirx.break_loop", "tirx.continue_loop")
_NOTHING = tirx.Evaluate(tirx.const(0))


def _is_jump(stmt: tirx.Stmt) -> bool:
    call = stmt.value if isinstance(stmt, tirx.Evaluate) else None
    return isinstance(call, tirx.Call) and isinstance(call.op, Op) and call.op.name in _JUMPS


def _jumps(stmt: tirx.Stmt) -> bool:
    """Whether a statement holds a jump that is not one of a loop inside it."""
    found = False

    def visit(node):
        nonlocal found
        found = found or _is_jump(node)
        return isinstance(node, (tirx.SeqStmt, tirx.IfThenElse))  # a loop's jumps are its own

    pre_order_visit(stmt, visit)
    return found


def _without_jumps(stmt: tirx.Stmt, then: tuple[tirx.Stmt, ...]) -> list[tirx.Stmt]:
    """Return `stmt` and what comes `then`, as far as no jump is taken."""
    if not _jumps(stmt):
        return [stmt, *_all_without_jumps(then)]
    if isinstance(stmt, tirx.SeqStmt):
        return _all_without_jumps((*stmt.seq, *then))
    if isinstance(stmt, tirx.IfThenElse):
        paths = [_NOTHING if path is None else path for path in (stmt.then_case, stmt.else_case)]
        return [tirx.IfThenElse(stmt.condition, *(_sequence(_without_jumps(path, then)) for path in paths))]
    return []  # the jump itself


def _all_without_jumps(statements: tuple[tirx.Stmt, ...]) -> list[tirx.Stmt]:
    return _without_jumps(statements[0], statements[1:]) if statements else []


def _sequence(statements: list[tirx.Stmt]) -> tirx.Stmt:
    return tirx.SeqStmt(statements) if len(statements) > 1 else statements[0] if statements else _NOTHING


def _end_rounds(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    analyzer = arith.Analyzer()

    def rewrite(loop: tirx.For) -> tirx.For | None:
        if not _jumps(loop.body) or not analyzer.can_prove_equal(loop.extent, 1):
            return None
        body = _sequence(_without_jumps(loop.body, ()))
        return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, loop.annotations, loop.step)

    return func.with_body(rewritten(func.body, rewrite, ["tirx.For"]))


EndSingleRounds = prim_func_pass(_end_rounds, opt_level=0, name="tilelang_ext.EndSingleRounds")

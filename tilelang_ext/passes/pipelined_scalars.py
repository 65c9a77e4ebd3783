"""In a pipelined loop, what a `T.alloc_var` holds stands where the variable is read.

    Before  for i in pipelined(n): page = table[i]; copy(K[page], k_s)
    After   for i in pipelined(n): page = table[i]; copy(K[table[i]], k_s)

Upstream's planning of a pipeline puts the assignment into the stage that computes, and refuses the copy, which runs stages
ahead, for depending on it. A variable qualifies if the loop assigns it once, for every round, a value that reads nothing the
loop writes. The assignment stays, for what comes after the loop. Runs just before the pipeline is planned.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.stmt_functor import post_order_visit
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten

_STAGES = "num_stages"


def _forward(loop: tirx.For) -> tirx.Stmt | None:
    if _STAGES not in loop.annotations:
        return None
    written = _written(loop.body)
    body = _with_statements(loop.body, lambda statements: _forwarded(statements, written))
    if body.same_as(loop.body):
        return None
    return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, loop.annotations, loop.step)


def _with_statements(stmt: tirx.Stmt, change) -> tirx.Stmt:
    """Return `stmt` with the statements of its outermost sequence changed."""
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt(change(list(stmt.seq)))
    if isinstance(stmt, tirx.SBlockRealize):
        block = stmt.block
        body = _with_statements(block.body, change)
        changed = tirx.SBlock(
            block.iter_vars,
            block.reads,
            block.writes,
            block.name_hint,
            body,
            block.init,
            block.alloc_buffers,
            block.match_buffers,
            block.annotations,
        )
        return tirx.SBlockRealize(stmt.iter_values, stmt.predicate, changed)
    return stmt


def _forwarded(statements: list[tirx.Stmt], written: list[tirx.Var]) -> list[tirx.Stmt]:
    values: dict[tirx.Var, tirx.PrimExpr] = {}

    def value(node):
        return values.get(node.buffer.data)

    result = []
    for statement in statements:
        changed = rewritten(statement, value, ["tirx.BufferLoad"]) if values else statement
        result.append(changed)
        if isinstance(changed, tirx.BufferStore) and changed.buffer.scope() == "local.var":
            data = changed.buffer.data
            if written.count(data) == 1 and not _reads(changed.value) & set(written):
                values[data] = changed.value
    return result


def _written(stmt: tirx.Stmt) -> list[tirx.Var]:
    """Return the memory of each store, and what a call gets a pointer or a region to: it may write there."""
    found = []

    def visit(node):
        if isinstance(node, tirx.BufferStore):
            found.append(node.buffer.data)
        elif isinstance(node, tirx.Call):
            found.extend(a.buffer.data for a in node.args if isinstance(a, tirx.BufferLoad) and _is_written(node))

    post_order_visit(stmt, visit)
    return found


def _is_written(call: tirx.Call) -> bool:
    """Whether a call that has a load for an argument writes there: a region for reading (1) does not."""
    name = getattr(call.op, "name", "")
    if name == "tl.region":
        return int(call.args[1]) != 1
    return name in ("tirx.address_of", "tl.access_ptr")


def _reads(expr: tirx.PrimExpr) -> set[tirx.Var]:
    found = set()

    def visit(node):
        if isinstance(node, tirx.BufferLoad):
            found.add(node.buffer.data)

    post_order_visit(expr, visit)
    return found


def _forward_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    return func.with_body(rewritten(func.body, _forward, ["tirx.For"]))


ForwardPipelinedScalars = prim_func_pass(_forward_all, opt_level=0, name="tilelang_ext.ForwardPipelinedScalars")

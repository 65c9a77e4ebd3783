"""Bounds of loops that depend on the index of a `T.Parallel` around them are held in a variable.

    Before  for i in T.Parallel(n):                          After   for i in T.Parallel(n):
                for j in T.serial(i):                                    bound = i
                    for k in T.serial(2): ...                            for j in T.serial(bound):
                                                                             for k in T.serial(2): ...

Upstream's LowerTileOp puts the thread's index in place of i, and takes j's new range for a contradiction of the old one if
there is a loop inside ("Trying to update var 'j' with a different maximum value"). Runs before LayoutInference.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.stmt_functor import post_order_visit
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten


def _parallel_indices(body: tirx.Stmt) -> set[tirx.Var]:
    found = set()

    def visit(node):
        if isinstance(node, tirx.For) and node.kind == tirx.ForKind.PARALLEL:
            found.add(node.loop_var)

    post_order_visit(body, visit)
    return found


def _holds_loop(body: tirx.Stmt) -> bool:
    found = False

    def visit(node):
        nonlocal found
        found = found or isinstance(node, tirx.For)

    post_order_visit(body, visit)
    return found


def _hold(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    indices = _parallel_indices(func.body)
    held: list[tirx.Buffer] = []  # until the block that they are allocated in

    def hold(bound: tirx.PrimExpr, stores: list[tirx.Stmt]) -> tirx.PrimExpr:
        if indices.isdisjoint(tirx.analysis.undefined_vars(bound)):
            return bound
        buffer = tirx.decl_buffer((1,), bound.dtype, "bound", scope="local.var")
        held.append(buffer)
        stores.append(tirx.BufferStore(buffer, bound, [0]))
        return tirx.BufferLoad(buffer, [0])

    def rewrite(node):
        if isinstance(node, tirx.SBlock):
            if not held:
                return None
            buffers = [*node.alloc_buffers, *held]
            held.clear()
            return tirx.SBlock(
                node.iter_vars, node.reads, node.writes, node.name_hint, node.body, node.init, buffers, node.match_buffers,
                node.annotations,
            )  # fmt: skip
        if node.kind == tirx.ForKind.PARALLEL or not _holds_loop(node.body):
            return None
        stores: list[tirx.Stmt] = []
        begin, extent = hold(node.min, stores), hold(node.extent, stores)
        if not stores:
            return None
        loop = tirx.For(node.loop_var, begin, extent, node.kind, node.body, node.thread_binding, node.annotations, node.step)
        return tirx.SeqStmt([*stores, loop])

    return func.with_body(rewritten(func.body, rewrite, ["tirx.For", "tirx.SBlock"])) if indices else func


HoldBounds = prim_func_pass(_hold, opt_level=0, name="tilelang_ext.HoldBounds")

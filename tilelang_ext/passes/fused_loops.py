"""Loops of a `T.Parallel` over several indices become one over their number.

    Before  for i, j, k in T.Parallel(8, 9, 4): y[i, j, k] = x[i, j, k]
    After   for f in T.Parallel(288): y[f // 36, f // 4 % 9, f % 4] = x[f // 36, f // 4 % 9, f % 4]

Upstream deals rounds out to threads by an index of each loop, and cannot invert it where a thread's rounds begin and end inside
of a row ("Mapped indices are not independent"). Loops that use fragments are dealt out as these are, and stay. Runs on tile
programs that cannot be lowered without it.
"""

from __future__ import annotations

import math

from tvm import tirx
from tvm.tirx.stmt_functor import ir_transform, post_order_visit, substitute
from tvm.tirx.transform import prim_func_pass


def _uses_fragment(stmt: tirx.Stmt) -> bool:
    found = False

    def visit(node):
        nonlocal found
        if isinstance(node, (tirx.BufferLoad, tirx.BufferStore)):
            found = found or node.buffer.scope() == "local.fragment"

    post_order_visit(stmt, visit)
    return found


def _fuse(loop: tirx.For) -> tirx.For | None:
    loops, body = [], loop
    while isinstance(body, tirx.For) and body.kind == tirx.ForKind.PARALLEL:
        loops.append(body)
        body = body.body
    extents = [each.extent for each in loops]
    if len(loops) < 2 or not all(isinstance(extent, tirx.IntImm) for extent in extents) or _uses_fragment(body):
        return None
    index = tirx.Var("f", loop.loop_var.dtype)
    values, behind = {}, 1
    for each in reversed(loops):
        values[each.loop_var] = each.min + tirx.floormod(tirx.floordiv(index, behind), each.extent)
        behind *= int(each.extent)
    annotations = {name: value for each in loops for name, value in each.annotations.items()}
    extent = math.prod(int(extent) for extent in extents)
    return tirx.For(index, 0, extent, loop.kind, substitute(body, values), None, annotations)


def _fuse_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    def outermost(node):
        return (_fuse(node) or node) if node.kind == tirx.ForKind.PARALLEL else None

    return func.with_body(ir_transform(func.body, outermost, None, ["tirx.For"]))


FuseLoops = prim_func_pass(_fuse_all, opt_level=0, name="tilelang_ext.FuseLoops")

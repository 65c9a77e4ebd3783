"""Loops of a `T.Parallel` over several indices, and fills of memory, become one loop over the number of a round.

    Before  for i, j, k in T.Parallel(8, 9, 4): y[i, j, k] = x[i, j, k]
    After   for f in T.Parallel(288): y[f // 36, f // 4 % 9, f % 4] = x[f // 36, f // 4 % 9, f % 4]

Upstream deals rounds out to threads by an index of each loop, and cannot invert it where a thread's rounds begin and end inside
of a row ("Mapped indices are not independent"). Loops that use fragments are dealt out as these are, and stay. Runs on tile
programs that cannot be lowered without it.
"""

from __future__ import annotations

import math

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import ir_transform, post_order_visit, substitute
from tvm.tirx.transform import prim_func_pass

_FILL = "tl.tileop.fill"


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
    parts = _parts(index, [int(extent) for extent in extents])
    values = {each.loop_var: each.min + part for each, part in zip(loops, parts, strict=True)}
    annotations = {name: value for each in loops for name, value in each.annotations.items()}
    return _loop(index, extents, substitute(body, values), annotations)


def _fill(stmt: tirx.Evaluate) -> tirx.For | None:
    """Return the loop that fills a tile of memory."""
    call = stmt.value
    if not isinstance(call, tirx.Call) or not isinstance(call.op, Op) or call.op.name != _FILL:
        return None
    region, value = call.args[:2]
    place, extents = region.args[0], list(region.args[2:])
    if place.buffer.scope() == "local.fragment" or not all(isinstance(extent, tirx.IntImm) for extent in extents):
        return None
    index = tirx.Var("f", "int32")
    parts = _parts(index, [int(extent) for extent in extents])
    if value.dtype != place.buffer.dtype:
        value = tirx.Cast(place.buffer.dtype, value)
    indices = [begin + part for begin, part in zip(place.indices, parts, strict=True)]
    return _loop(index, extents, tirx.BufferStore(place.buffer, value, indices), {})


def _parts(index: tirx.Var, extents: list[int]) -> list[tirx.PrimExpr]:
    """Return what the number of a round is along each axis."""
    parts, behind = [], 1
    for extent in reversed(extents):
        parts.append(tirx.floormod(tirx.floordiv(index, behind), extent))
        behind *= extent
    return parts[::-1]


def _loop(index: tirx.Var, extents, body: tirx.Stmt, annotations: dict) -> tirx.For:
    extent = math.prod(int(extent) for extent in extents)
    return tirx.For(index, 0, extent, tirx.ForKind.PARALLEL, body, None, annotations)


def _fuse_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    def outermost(node):
        if isinstance(node, tirx.Evaluate):
            return _fill(node)
        return (_fuse(node) or node) if node.kind == tirx.ForKind.PARALLEL else None

    return func.with_body(ir_transform(func.body, outermost, None, ["tirx.For", "tirx.Evaluate"]))


FuseLoops = prim_func_pass(_fuse_all, opt_level=0, name="tilelang_ext.FuseLoops")

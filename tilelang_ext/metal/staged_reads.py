"""Read what the elements of a tile share from device memory once per threadgroup.

    Before  parallel(i, j, READ_ONCE): C_f[i, j] *= scale_a[row + i] * scale_b[column + j]
    After   parallel(i): scale_a_s[i] = scale_a[row + i]
            parallel(j): scale_b_s[j] = scale_b[column + j]
            parallel(i, j): C_f[i, j] *= scale_a_s[i] * scale_b_s[j]

A `T.Parallel` asks for it by the mark READ_ONCE. Staged are the largest expressions that read device memory alone, each element
once, that use some of the loop's variables but not all, and that are evaluated unconditionally; conditions inside move along.
Buffers that the kernel writes are left alone. Other targets have caches, and ignore the mark.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import ir_transform, post_order_visit, substitute
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.marks import READ_ONCE

_CONDITIONAL = (tirx.IfThenElse, tirx.And, tirx.Or)
_IF_THEN_ELSE = Op.get("tirx.if_then_else")


def _stage(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    written = set()

    def collect(node):
        if isinstance(node, tirx.BufferStore):
            written.add(node.buffer.data)

    post_order_visit(func.body, collect)
    allocated = []

    def stage_loop(node):
        if not isinstance(node, tirx.For) or READ_ONCE not in node.annotations:
            return None
        fills, loop = _stage_reads(node, written)
        allocated.extend(fill.buffer for _, fill in fills)
        return tirx.SeqStmt([*(_parallel(extents, fill) for extents, fill in fills), loop]) if fills else loop

    def allocate(node):
        if not isinstance(node, tirx.SBlock) or not allocated:
            return None
        buffers = [*node.alloc_buffers, *allocated]
        allocated.clear()
        return tirx.SBlock(
            node.iter_vars,
            node.reads,
            node.writes,
            node.name_hint,
            node.body,
            node.init,
            buffers,
            node.match_buffers,
            node.annotations,
        )

    return func.with_body(ir_transform(func.body, stage_loop, allocate, ["tirx.For", "tirx.SBlock"]))


def _stage_reads(loop: tirx.For, written: set) -> tuple[list, tirx.For]:
    """Return [(extents by variable, store to a shared buffer)] and the loop that reads these buffers."""
    extents = {}
    body = loop
    while isinstance(body, tirx.For) and body.kind == tirx.ForKind.PARALLEL:
        extents[body.loop_var] = body.extent
        body = body.body
    inner = set()  # variables that mean something inside the loop alone

    def collect(node):
        if isinstance(node, tirx.Bind):
            inner.add(node.var)
        elif isinstance(node, tirx.For):
            inner.add(node.loop_var)

    post_order_visit(body, collect)
    fills = []

    def stage(node):
        if isinstance(node, _CONDITIONAL) and not isinstance(node, tirx.PrimExpr):
            return node
        if not isinstance(node, tirx.PrimExpr):
            return None
        used, loads = _uses(node)
        if not loads:
            return node
        own = [var for var in extents if var in used]
        buffers = [load.buffer for load in loads]
        shared = all(buffer.scope() in ("", "global") and buffer.data not in written for buffer in buffers)
        branches = isinstance(node, _CONDITIONAL) or (isinstance(node, tirx.Call) and node.op.same_as(_IF_THEN_ELSE))
        # Of row[i] * scale[0] the factors are staged, each once: the product would read scale[0] for every i.
        once = all(_uses(load)[0].issuperset(own) for load in loads)
        if shared and len(own) < len(extents) and not used & inner and (once or branches):
            return _staged(node, own, extents, buffers[0].name, fills)
        return node if branches else None

    annotations = {key: value for key, value in loop.annotations.items() if key != READ_ONCE}
    rewritten = ir_transform(loop.body, stage, None)
    return fills, tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, rewritten, loop.thread_binding, annotations)


def _uses(expression: tirx.PrimExpr) -> tuple[set, list]:
    """Return the variables that an expression has, and its loads."""
    used, loads = set(), []

    def collect(node):
        if isinstance(node, tirx.Var):
            used.add(node)
        elif isinstance(node, tirx.BufferLoad):
            loads.append(node)

    post_order_visit(expression, collect)
    return used, loads


def _staged(expression, own: list, extents: dict, name: str, fills: list) -> tirx.BufferLoad:
    """Add the store that stages an expression to `fills`, and return the load that stands for it."""
    shape = [extents[var] for var in own] or [1]
    buffer = tirx.decl_buffer(shape, expression.dtype, f"{name}_s", scope="shared.dyn")
    fresh = {var: tirx.Var(var.name, var.dtype) for var in own} or {None: tirx.Var("i", "int32")}
    value = substitute(expression, {var: to for var, to in fresh.items() if var is not None})
    store = tirx.BufferStore(buffer, value, list(fresh.values()))
    fills.append((dict(zip(fresh.values(), shape, strict=True)), store))
    return tirx.BufferLoad(buffer, own or [0])


def _parallel(extents: dict, body: tirx.Stmt) -> tirx.Stmt:
    for var, extent in reversed(extents.items()):
        body = tirx.For(var, 0, extent, tirx.ForKind.PARALLEL, body)
    return body


StageReads = prim_func_pass(_stage, opt_level=0, name="tilelang_ext.StageReads")

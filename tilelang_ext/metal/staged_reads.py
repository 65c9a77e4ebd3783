"""Read what the elements of a tile share from device memory once per threadgroup.

    Before  parallel(i, j, READ_ONCE): C_f[i, j] *= scale_a[row + i] * scale_b[column + j]
    After   parallel(i): scale_a_s[i] = scale_a[row + i]
            parallel(j): scale_b_s[j] = scale_b[column + j]
            parallel(i): scale_a_f[i] = scale_a_s[i]
            parallel(j): scale_b_f[j] = scale_b_s[j]
            parallel(i, j): C_f[i, j] *= scale_a_f[i] * scale_b_f[j]

A `T.Parallel` asks for it by the mark READ_ONCE. Staged are the largest expressions that read device memory, each element once,
that use some of the loop's variables but not all, and that are evaluated unconditionally; conditions inside move along, and so
do indices in shared memory.
What an element of the loop needs is then in its thread's registers: a thread with 4 rows and 8 columns of C reads 12 numbers
from threadgroup memory, not 64. Staged too are loads that `SHARED_BY` elements or more in a row have in common, as codes have
the scale of their group:

    Before  parallel(j, k, READ_ONCE): W_s[j, k] = decode(codes[row + j, k / 2], scale[row + j, k / 32])
    After   parallel(j, g): scale_s[j, g] = scale[row + j, g]
            parallel(j, k): W_s[j, k] = decode(codes[row + j, k / 2], scale_s[j, k / 32])

Buffers that the kernel writes are left alone. Other targets have caches, and ignore the mark.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import ir_transform, post_order_visit, substitute
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.marks import READ_ONCE

_CONDITIONAL = (tirx.IfThenElse, tirx.And, tirx.Or)
SHARED_BY = 16  # more elements than one vector of a thread has
_COMMON = ("shared", "shared.dyn", "local.var")  # scopes whose elements every thread can read, or has the same value of
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
        fills, held, loop = _stage_reads(node, written)
        stores = [*fills, *held]  # one barrier parts the two
        allocated.extend(store.buffer for _, store in stores)
        return tirx.SeqStmt([*(_parallel(extents, store) for extents, store in stores), loop]) if stores else loop

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


def _stage_reads(loop: tirx.For, written: set) -> tuple[list, list, tirx.For]:
    """Return [(extents by variable, store to a shared buffer)], the same of stores to registers, and the loop that is left."""
    extents = {}
    body = loop
    while isinstance(body, tirx.For) and body.kind == tirx.ForKind.PARALLEL:
        extents[body.loop_var] = body.extent
        body = body.body
    inner = set()  # variables that mean something inside the loop alone
    stored = set()  # memory that the loop writes

    def collect(node):
        if isinstance(node, tirx.Bind):
            inner.add(node.var)
        elif isinstance(node, tirx.For):
            inner.add(node.loop_var)
        elif isinstance(node, tirx.BufferStore):
            stored.add(node.buffer.data)

    def is_device(buffer) -> bool:
        return buffer.scope() in ("", "global") and buffer.data not in written

    def may_move(buffer) -> bool:
        return is_device(buffer) or (buffer.scope() in _COMMON and buffer.data not in stored)

    post_order_visit(body, collect)
    fills, held, known = [], [], []

    def stage_once(expression, axes: dict) -> tirx.BufferLoad:
        for before, load in known:
            if tirx.analysis.expr_deep_equal(before, expression):
                return load
        known.append((expression, _staged(expression, axes, fills, held)))
        return known[-1][1]

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
        movable = any(map(is_device, buffers)) and all(map(may_move, buffers))
        branches = isinstance(node, _CONDITIONAL) or (isinstance(node, tirx.Call) and node.op.same_as(_IF_THEN_ELSE))
        # Of row[i] * scale[0] the factors are staged, each once: the product would read scale[0] for every i.
        once = all(_uses(load)[0].issuperset(own) for load in loads if is_device(load.buffer))
        if movable and not used & inner and (once or branches):
            axes = {var: (1, extents[var]) for var in own}
            if len(own) == len(extents):
                axes = _groups(node, extents) if isinstance(node, tirx.BufferLoad) else None
            if axes is not None:
                return stage_once(node, axes)
        return node if branches else None

    annotations = {key: value for key, value in loop.annotations.items() if key != READ_ONCE}
    rewritten = ir_transform(loop.body, stage, None)
    return fills, held, tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, rewritten, loop.thread_binding, annotations)


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


def _groups(load: tirx.BufferLoad, extents: dict) -> dict | None:
    """Return {v: (c, extent of v // c)} for a load whose last variable occurs as v // c alone.

    c is 1 for the other variables. None for other loads.
    """
    *others, last = extents
    quotients, plain = [], []

    def collect(node):
        if isinstance(node, tirx.FloorDiv) and node.a.same_as(last) and isinstance(node.b, tirx.IntImm):
            quotients.append(int(node.b))
        elif isinstance(node, tirx.Var) and node.same_as(last):
            plain.append(node)

    for index in load.indices:
        post_order_visit(index, collect)
    extent = extents[last]
    if len(set(quotients)) != 1 or len(plain) != len(quotients) or not isinstance(extent, tirx.IntImm):
        return None
    (divisor,) = set(quotients)
    if divisor < 2 or int(extent) % divisor:
        return None
    return {**{var: (1, extents[var]) for var in others}, last: (divisor, int(extent) // divisor)}


def _staged(expression, axes: dict, fills: list, held: list) -> tirx.BufferLoad:
    """Add the stores that stage an expression in shared memory and in registers, and return the load that stands for it.

    `axes` has the variables of the expression, each with how many of its values in a row share an element, and the extent of
    the staged axis. What few elements share, one thread has: it goes to its registers at once, by wide loads.
    """
    name = next(load.buffer.name for load in _uses(expression)[1] if load.buffer.scope() in ("", "global"))
    shape = [extent for _, extent in axes.values()] or [1]

    def indices() -> list:
        return [tirx.Var(var.name, var.dtype) for var in axes] or [tirx.Var("i", "int32")]

    def add(stores: list, value, at: list, suffix: str, scope: str) -> tirx.Buffer:
        buffer = tirx.decl_buffer(shape, expression.dtype, name + suffix, scope=scope)
        stores.append((dict(zip(at, shape, strict=True)), tirx.BufferStore(buffer, value, at)))
        return buffer

    at = indices()
    value = substitute(expression, {var: i * sharing for i, (var, (sharing, _)) in zip(at, axes.items(), strict=False)})
    if all(sharing == 1 or sharing >= SHARED_BY for sharing, _ in axes.values()):
        staged = add(fills, value, at, "_s", "shared.dyn")
        at = indices()
        value = tirx.BufferLoad(staged, at)
    buffer = add(held, value, at, "_f", "local.fragment")
    return tirx.BufferLoad(buffer, [tirx.floordiv(var, sharing) for var, (sharing, _) in axes.items()] or [0])


def _parallel(extents: dict, body: tirx.Stmt) -> tirx.Stmt:
    for var, extent in reversed(extents.items()):
        body = tirx.For(var, 0, extent, tirx.ForKind.PARALLEL, body)
    return body


StageReads = prim_func_pass(_stage, opt_level=0, name="tilelang_ext.StageReads")

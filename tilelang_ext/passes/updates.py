"""Updates of memory in loops that several threads may run alike, since a fragment of the loop has copies in each.

    Before  for i in T.Parallel(8):                          After   for i in T.Parallel(8): old[i] = s[i]
                s[i] = s[i] + 1                                  barrier; for i in T.Parallel(8):
                x[i] = s[i]                                              old[i] = old[i] + 1
                                                                         s[i] = old[i]
                                                                         x[i] = old[i]

A fragment of fewer elements than a block has threads, one that holds a value for each row of another, or one whose rows do not
divide among the threads lies in several threads, and so do the rounds of a loop that uses it. Each would add 1. With the loads
and the stores apart, `old` being a fragment, all threads store one value, behind a barrier.

Memory that other blocks see gets no barrier from upstream. So a tensor that is read and then stored to by such a loop, or by a
copy of such a fragment, as in a kernel that works in place, gets one before the store and one behind it.

Runs on tile programs, before LayoutInference.
"""

from __future__ import annotations

import math

from tvm import arith, ir, tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import ir_transform, post_order_visit, pre_order_visit, substitute
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.launched_blocks import LaunchedBlock, launched_blocks
from tilelang_ext.passes.rewrite import rewritten, with_buffers

_COPY, _GEMM, _REGION = "tl.tileop.copy", "tl.tileop.gemm", "tl.region"
_SYNC = Op.get("tirx.tvm_storage_sync")
_READ, _WRITE = 1, 2


class _Uses:
    """What a statement loads and stores: buffers by their memory, with the indices of each access."""

    def __init__(self, stmt: tirx.Stmt):
        self.loads: dict[tirx.Var, list] = {}
        self.stores: dict[tirx.Var, list] = {}
        self.buffers: dict[tirx.Var, tirx.Buffer] = {}
        self.others: set[tirx.Var] = set()  # whose address is taken
        self.atomics: set[tirx.Var] = set()
        targets: set[tirx.BufferLoad] = set()  # of atomics, which are no loads
        regions: dict[tirx.BufferLoad, int] = {}

        def find_regions(node):
            if isinstance(node, tirx.Call) and isinstance(node.op, Op):
                if node.op.name.startswith("tl.atomic_"):
                    for pointer in node.args:
                        if isinstance(pointer, tirx.Call):
                            targets.update(arg for arg in pointer.args if isinstance(arg, tirx.BufferLoad))
                if node.op.name == _REGION:
                    regions[node.args[0]] = int(node.args[1])
                elif node.op.name in ("tirx.address_of", "tl.access_ptr"):
                    self.others.update(arg.buffer.data for arg in node.args if isinstance(arg, tirx.BufferLoad))

        def visit(node):
            if isinstance(node, (tirx.BufferLoad, tirx.BufferStore)):
                self.buffers.setdefault(node.buffer.data, node.buffer)
                if node in targets:
                    self.atomics.add(node.buffer.data)
                    return
                access = regions.get(node, _READ) if isinstance(node, tirx.BufferLoad) else _WRITE
                for bit, found in ((_READ, self.loads), (_WRITE, self.stores)):
                    if access & bit:
                        found.setdefault(node.buffer.data, []).append(node)

        post_order_visit(stmt, find_regions)
        post_order_visit(stmt, visit)


def _nest(loop: tirx.For) -> tuple[list[tirx.For], tirx.Stmt]:
    """Return the loops of a T.Parallel, and what they run."""
    loops, body = [], loop
    while isinstance(body, tirx.For) and body.kind == tirx.ForKind.PARALLEL:
        loops.append(body)
        body = body.body
    return loops, body


def _is_memory(buffer: tirx.Buffer) -> bool:
    return buffer.scope() == "global" or buffer.scope().startswith("shared")


def _updated(loop: tirx.For, uses: _Uses, extents: list[int]) -> list[tirx.Buffer]:
    """Return the buffers of memory that each round of a T.Parallel loads and stores at a place of its own."""
    loops, body = _nest(loop)
    analyzer = arith.Analyzer()
    for each in loops:
        analyzer.bind(each.loop_var, ir.Range(0, each.extent))
    inner = _variables_in(body)

    def is_inside(buffer: tirx.Buffer, indices) -> bool:
        return buffer.scope() == "global" or all(  # where accesses are masked
            analyzer.can_prove(tirx.And(index >= 0, index < extent))
            for index, extent in zip(indices, buffer.shape, strict=True)
        )

    found = []
    for data, stores in uses.stores.items():
        buffer, indices = uses.buffers[data], list(stores[0].indices)
        if data in uses.others or data not in uses.loads or not _is_memory(buffer):
            continue
        used = {var for index in indices for var in tirx.analysis.undefined_vars(index)}
        is_one_place = all(ir.structural_equal(indices, list(node.indices)) for node in (*stores, *uses.loads[data]))
        if is_one_place and used.isdisjoint(inner) and is_inside(buffer, indices):
            found.append(buffer)
    return found


def _variables_in(body: tirx.Stmt) -> set[tirx.Var]:
    found = set()

    def visit(node):
        if isinstance(node, tirx.For):
            found.add(node.loop_var)
        elif isinstance(node, tirx.Bind):
            found.add(node.var)

    post_order_visit(body, visit)
    return found


def _through_fragments(loop: tirx.For, uses: _Uses, held: list[tirx.Buffer]) -> list[tirx.Stmt]:
    """Return the loops that load, and the loop that stores, of one that does both; the loop itself where it does not."""
    loops, body = _nest(loop)
    if not all(isinstance(each.extent, tirx.IntImm) and tirx.analysis.expr_deep_equal(each.min, 0) for each in loops):
        return [loop]
    extents, variables = [int(each.extent) for each in loops], [each.loop_var for each in loops]
    before = []
    for buffer in _updated(loop, uses, extents):
        indices = list(uses.stores[buffer.data][0].indices)
        old = tirx.decl_buffer(extents, buffer.dtype, f"{buffer.name}_old", scope="local.fragment")
        held.append(old)

        def rewrite(node, buffer=buffer, old=old, indices=indices):
            if not node.buffer.data.same_as(buffer.data):
                return None
            if isinstance(node, tirx.BufferLoad):
                return tirx.BufferLoad(old, variables)
            store = tirx.BufferStore(buffer, tirx.BufferLoad(old, variables), indices)
            return tirx.SeqStmt([tirx.BufferStore(old, node.value, variables), store])

        body = rewritten(body, rewrite, ["tirx.BufferLoad", "tirx.BufferStore"])
        own = {var: tirx.Var(var.name, var.dtype) for var in variables}
        load = substitute(tirx.BufferStore(old, tirx.BufferLoad(buffer, indices), variables), own)
        before.append(_around(loops, load, own))
    return [*before, _around(loops, body, {})] if before else [loop]


def _around(loops: list[tirx.For], body: tirx.Stmt, own: dict[tirx.Var, tirx.Var]) -> tirx.Stmt:
    for loop in reversed(loops):
        var = own.get(loop.loop_var, loop.loop_var)
        body = tirx.For(var, loop.min, loop.extent, loop.kind, body, None, loop.annotations, loop.step)
    return body


def _tile_statements(block: LaunchedBlock) -> tuple[dict[tirx.Stmt, _Uses], set[tirx.Stmt]]:
    """Return the loops and copies of a block with what they use, and those that not all threads come to."""
    uses: dict[tirx.Stmt, _Uses] = {}
    conditional: set[tirx.Stmt] = set()

    def visit(node, found=uses):
        if isinstance(node, tirx.IfThenElse) and set(block.variables) & set(tirx.analysis.undefined_vars(node.condition)):
            for path in (node.then_case, node.else_case):
                if path is not None:
                    pre_order_visit(path, lambda inner: collect(inner, conditional.add))
        return collect(node, lambda stmt: found.setdefault(stmt, _Uses(stmt)))

    def collect(node, add):
        is_loop = isinstance(node, tirx.For) and node.kind == tirx.ForKind.PARALLEL
        if is_loop or _is_copy(node):
            add(node)
            return False
        return True

    pre_order_visit(block.body, visit)
    return uses, conditional


def _is_copy(node) -> bool:
    call = node.value if isinstance(node, tirx.Evaluate) else None
    return isinstance(call, tirx.Call) and isinstance(call.op, Op) and call.op.name == _COPY


def fragments_with_copies(block: LaunchedBlock) -> set[tirx.Var]:
    """Return the memory of the fragments of a block that may lie in several threads, as far as the program says.

    Those of fewer elements than threads, or than another fragment, whose rows they may follow; those whose rows threads do not
    divide, as 100 columns: of 64 such rows, two of 128 threads have each; and operands of T.gemm.
    """
    sizes: dict[tirx.Var, list[int]] = {}
    operands: set[tirx.Var] = set()

    def visit(node):
        buffer = node.buffer if isinstance(node, (tirx.BufferLoad, tirx.BufferStore)) else None
        if buffer is not None and buffer.scope() == "local.fragment":
            extents = [int(extent) if isinstance(extent, tirx.IntImm) else 0 for extent in buffer.shape]
            sizes[buffer.data] = extents
        if isinstance(node, tirx.Call) and isinstance(node.op, Op) and node.op.name == _GEMM:
            for region in node.args[:2]:
                operands.add(region.args[0].buffer.data)

    post_order_visit(block.body, visit)
    largest = max(map(math.prod, sizes.values()), default=0)

    def may_have(extents: list[int]) -> bool:
        size = math.prod(extents)
        return size < block.threads or size < largest or any(extent & (extent - 1) for extent in (*extents, block.threads))

    return {data for data, extents in sizes.items() if data in operands or may_have(extents)}


def block_barrier() -> tirx.Stmt:
    """Return a barrier of the block's threads."""
    return tirx.Evaluate(tirx.Call("int32", _SYNC, [tirx.StringImm("shared")]))


def _part(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    replaced: dict[tirx.Stmt, list[tirx.Stmt]] = {}
    held: list[tirx.Buffer] = []
    for block in launched_blocks(func.body):
        statements, conditional = _tile_statements(block)
        copied = fragments_with_copies(block)
        read = {data for uses in statements.values() for data in uses.loads if uses.buffers[data].scope() == "global"}
        for stmt, uses in statements.items():
            if copied.isdisjoint(uses.buffers):
                continue
            parts = _through_fragments(stmt, uses, held) if isinstance(stmt, tirx.For) else [stmt]
            works_in_place = not read.isdisjoint({*uses.stores, *uses.atomics})
            if (works_in_place or len(parts) > 1) and stmt not in conditional:
                parts = [*parts[:-1], block_barrier(), parts[-1], *([block_barrier()] if works_in_place else [])]
            if len(parts) > 1:
                replaced[stmt] = parts
    if not replaced:
        return func

    def replace(node):
        return tirx.SeqStmt(replaced[node]) if node in replaced else None

    body = ir_transform(func.body, replace, None, ["tirx.For", "tirx.Evaluate"])
    return func.with_body(with_buffers(body, held))


PartUpdates = prim_func_pass(_part, opt_level=0, name="tilelang_ext.PartUpdates")

"""Layouts for fragments that upstream's layout inference, or its reductions, have none for.

    Before  f: fragment (20, 100); reduce(f, r, dim=1)          "no available layout found", of 128 threads
    After   the same with layout_map {f: (i, j) -> threads 32 * (i % 4) + 8 * (j % 4) + {0..7}, register 25 * (i // 4) + j // 4}

Each axis is dealt out to a power of two of threads that divides it, so that threads that reduce together are told apart by bits
of their number, and no thread's last register is beyond the end of an axis. Of threads that are left over, a power of two hold
copies of what is reduced, since all that follow have to know the result; other threads have nothing to do. So a thread may hold
more than its share: this is for kernels that cannot be lowered without it.

Fragments that meet in a loop, a copy or another tile operation get layouts together: those of the most axes, from which layout
inference finds the others'. None is given to what meets a `T.gemm` or a fragment whose layout is annotated, or lies behind a
condition on the thread. Runs on tile programs whose threads have been materialised.
"""

from __future__ import annotations

import math

from tilelang import language as T
from tvm import tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import ir_transform, post_order_visit, pre_order_visit
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.launched_blocks import LaunchedBlock, launched_blocks

_GEMM, _REDUCE, _TILE_OPERATION, _LAYOUTS = "tl.tileop.gemm", "tl.tileop.reduce", "tl.tileop.", "layout_map"
_LANES = 32
_MOST_REGISTERS = 512  # of a thread for one fragment: beyond, it is better said than spilled


class _Groups:
    """Fragments, by the loops and operations that they meet in."""

    def __init__(self):
        self.parents: dict[tirx.Var, tirx.Var] = {}
        self.buffers: dict[tirx.Var, tirx.Buffer] = {}
        self.fixed: set[tirx.Var] = set()
        self.reduced: set[tirx.Var] = set()

    def find(self, data: tirx.Var) -> tirx.Var:
        while self.parents[data] is not data:
            data = self.parents[data]
        return data

    def meet(self, buffers: list[tirx.Buffer], fixed: bool = False) -> None:
        for buffer in buffers:
            data = self.buffers.setdefault(buffer.data, buffer).data
            self.parents.setdefault(data, data)
            if buffer is not buffers[0]:
                self.parents[self.find(data)] = self.find(self.buffers[buffers[0].data].data)
            if fixed:
                self.fixed.add(data)

    def free(self) -> list[list[tirx.Buffer]]:
        taken = {self.find(data) for data in self.fixed}
        groups: dict[tirx.Var, list[tirx.Buffer]] = {}
        for data, buffer in self.buffers.items():
            if self.find(data) not in taken:
                groups.setdefault(self.find(data), []).append(buffer)
        return list(groups.values())


def _fragments_in(node) -> list[tirx.Buffer]:
    found: dict[tirx.Var, tirx.Buffer] = {}

    def visit(node):
        if isinstance(node, (tirx.BufferLoad, tirx.BufferStore)) and node.buffer.scope() == "local.fragment":
            found.setdefault(node.buffer.data, node.buffer)

    post_order_visit(node, visit)
    return list(found.values())


def _groups_of(block: LaunchedBlock) -> _Groups:
    groups = _Groups()

    def visit(node):
        if isinstance(node, tirx.SBlock):
            annotated = node.annotations.get(_LAYOUTS, {})
            for buffer in node.alloc_buffers:
                if buffer.scope() == "local.fragment":
                    groups.meet([buffer], fixed=buffer.data in annotated)
        elif isinstance(node, tirx.IfThenElse) and set(tirx.analysis.undefined_vars(node.condition)) & set(block.variables):
            for buffer in _fragments_in(node):
                groups.meet([buffer], fixed=True)
        elif isinstance(node, tirx.For) and node.kind == tirx.ForKind.PARALLEL:
            groups.meet(_fragments_in(node))
        elif isinstance(node, tirx.Call) and isinstance(node.op, Op) and node.op.name.startswith(_TILE_OPERATION):
            fragments = _fragments_in(node)
            groups.meet(fragments, fixed=node.op.name.startswith(_GEMM))
            if node.op.name == _REDUCE:
                groups.reduced.update(fragment.data for fragment in fragments)
        return True

    pre_order_visit(block.body, visit)
    return groups


def _layout(buffer: tirx.Buffer, threads: int, is_reduced: bool) -> T.Fragment | None:
    """Return a layout of `buffer` over a power of two of threads; None if a thread would hold too much."""
    extents = [int(extent) for extent in buffer.shape]
    room = 1 << (threads.bit_length() - 1)
    dealt = [1] * len(extents)
    for most in (_LANES, room):  # rows before more than a warp along the last axis
        for axis in reversed(range(len(extents))):
            while dealt[axis] < min(_power_in(extents[axis]), most) and room > 1:
                dealt[axis] *= 2
                room //= 2
    # They lie in threads that stand next to each other: for others there is no loop that stores to memory once.
    copies = room if is_reduced else 1
    held = [extent // share for extent, share in zip(extents, dealt, strict=True)]
    if math.prod(held) > _MOST_REGISTERS:
        return None

    def forward_thread(*indices):
        *indices, copy = indices if len(indices) > len(extents) else (*indices, 0)  # without copies it gets none
        thread = 0
        for index, share in zip(indices, dealt, strict=True):
            thread = thread * share + index % share
        return thread * copies + copy

    def forward_index(*indices):
        register = 0
        for index, share, count in zip(indices, dealt, held, strict=True):
            register = register * count + index // share
        return register

    return T.Fragment(
        extents,
        forward_thread_fn=forward_thread,
        replicate=copies,
        forward_index_fn=forward_index,
    )


def _power_in(number: int) -> int:
    """The largest power of two that divides a number."""
    return number & -number


def _layouts_of(block: LaunchedBlock) -> dict[tirx.Var, T.Fragment]:
    layouts = {}
    groups = _groups_of(block)
    for group in groups.free():
        axes = max(len(buffer.shape) for buffer in group)
        widest = [buffer for buffer in group if len(buffer.shape) == axes]
        if any(not isinstance(extent, tirx.IntImm) for buffer in widest for extent in buffer.shape):
            continue
        is_reduced = not groups.reduced.isdisjoint(buffer.data for buffer in group)
        found = {buffer.data: _layout(buffer, block.threads, is_reduced) for buffer in widest}
        if None not in found.values():
            layouts.update(found)
    return layouts


def _lay_out(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    layouts = {data: layout for block in launched_blocks(func.body) for data, layout in _layouts_of(block).items()}

    def annotate(block):
        own = {buffer.data: layouts[buffer.data] for buffer in block.alloc_buffers if buffer.data in layouts}
        if not own:
            return None
        annotations = {**block.annotations, _LAYOUTS: {**block.annotations.get(_LAYOUTS, {}), **own}}
        return tirx.SBlock(
            block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init, block.alloc_buffers,
            block.match_buffers, annotations,
        )  # fmt: skip

    return func.with_body(ir_transform(func.body, None, annotate, ["tirx.SBlock"])) if layouts else func


LayOutPlainly = prim_func_pass(_lay_out, opt_level=0, name="tilelang_ext.LayOutPlainly")

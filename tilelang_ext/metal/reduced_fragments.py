"""Fragments that are reduced get a layout where layout inference finds none: rows whose length is no power of two.

    Before  f: fragment (M, 100); reduce(f, r, dim=1)                  "no available layout found", of 128 threads
    After   the same with layout_map {f: (i, j) -> thread 4 * (i % 32) + j % 4, register 25 * (i // 32) + j // 4}

Threads that reduce together must be a power of two: of each axis as many elements as its largest power of two divides lie in
different threads. Fragments that a `T.gemm` uses have its layout, and those that the program annotates theirs. Runs on tile
programs whose threads have been materialised.
"""

from __future__ import annotations

from tilelang import language as T
from tvm import tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import ir_transform, post_order_visit
from tvm.tirx.transform import prim_func_pass

_REDUCE, _GEMM, _LAYOUTS = "tl.tileop.reduce", "tl.tileop.gemm", "layout_map"
_LANES = 32


def _fragments_to_lay_out(body: tirx.Stmt) -> tuple[dict[tirx.Var, tirx.Buffer], int]:
    """Return the fragments that need a layout, and the threads of a block."""
    reduced: dict[tirx.Var, tirx.Buffer] = {}
    taken: set[tirx.Var] = set()
    threads = 1
    has_gemm = False

    def visit(node):
        nonlocal threads, has_gemm
        if (
            isinstance(node, tirx.AttrStmt)
            and node.attr_key == "thread_extent"
            and node.node.thread_tag.startswith("threadIdx")
        ):
            threads *= int(node.value)
        elif isinstance(node, tirx.SBlock):
            taken.update(node.annotations.get(_LAYOUTS, {}))
        elif isinstance(node, tirx.Call) and isinstance(node.op, Op):
            has_gemm = has_gemm or node.op.name == _GEMM
            if node.op.name == _REDUCE:
                buffer = node.args[0].args[0].buffer
                if buffer.scope() == "local.fragment" and len(buffer.shape) == 2:
                    reduced[buffer.data] = buffer

    post_order_visit(body, visit)
    wanted = {data: buffer for data, buffer in reduced.items() if data not in taken and not _is_power(int(buffer.shape[1]))}
    return ({} if has_gemm else wanted), threads


def _is_power(extent: int) -> bool:
    return extent & (extent - 1) == 0


def _layout(buffer: tirx.Buffer, threads: int):
    rows, columns = (int(extent) for extent in buffer.shape)
    across = min(columns & -columns, _LANES, threads)
    down = min(rows & -rows, threads // across)
    registers = columns // across

    def forward_thread(i, j, rep=0):  # without replicas it gets none
        return rep * (down * across) + i % down * across + j % across

    def forward_index(i, j):
        return i // down * registers + j // across

    return T.Fragment(
        [rows, columns],
        forward_thread_fn=forward_thread,
        replicate=threads // (down * across),
        forward_index_fn=forward_index,
    )


def _lay_out(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    fragments, threads = _fragments_to_lay_out(func.body)
    if not fragments or not _is_power(threads):
        return func
    layouts = {data: _layout(buffer, threads) for data, buffer in fragments.items()}

    def annotate(block):
        own = {buffer.data: layouts[buffer.data] for buffer in block.alloc_buffers if buffer.data in layouts}
        if not own:
            return None
        annotations = {**block.annotations, _LAYOUTS: {**block.annotations.get(_LAYOUTS, {}), **own}}
        return tirx.SBlock(
            block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init, block.alloc_buffers,
            block.match_buffers, annotations,
        )  # fmt: skip

    return func.with_body(ir_transform(func.body, None, annotate, ["tirx.SBlock"]))


LayOutReducedFragments = prim_func_pass(_lay_out, opt_level=0, name="tilelang_ext.LayOutReducedFragments")

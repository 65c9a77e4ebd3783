"""Pairs of neighbouring columns of a fragment whose layout gives both to one thread: read where they are.

    Before                                                  After
    copy(C, staged)                                         even[i, j] = C[i, 2 j];  odd[i, j] = C[i, 2 j + 1]
    for i, j, COLUMN_PAIRS [C, staged]:                     for i, j:
        out[i, j] = f(staged[i, 2 j], staged[i, 2 j + 1])       out[i, j] = f(even[i, j], odd[i, j])

`staged` is shared memory as large as C, which stages of the product's operands get instead. Nothing else uses it.
"""

from __future__ import annotations

from collections.abc import Callable

from tilelang import language as T
from tvm import tirx
from tvm.tirx.stmt_functor import ir_transform

from tilelang_ext.cuda.statements import (
    COPY,
    equal,
    fragment,
    is_call,
    is_whole,
    nodes_of,
    parallel,
    region_of,
    sequence,
    store,
    with_body,
)
from tilelang_ext.marks import COLUMN_PAIRS


def with_pairs_in_registers(block: tirx.SBlock, fragments: list[tirx.Buffer], place: Callable) -> tirx.SBlock:
    """Return the block with pairs of columns of whole `fragments` read from registers.

    `place(i, j)` is the thread and the register of an element of each; those of columns 2 j and 2 j + 1 are one thread and the
    registers 2 r and 2 r + 1.
    """
    halves = {}  # of the data of a staged tile: the fragment, and its even and its odd columns
    for loop in nodes_of(block.body, lambda node: isinstance(node, tirx.For) and COLUMN_PAIRS in (node.annotations or {})):
        source, staged = loop.annotations[COLUMN_PAIRS]
        if is_whole(source) and any(source.buffer.same_as(one) for one in fragments):
            rows, columns = map(int, source.buffer.shape)
            halves[staged.buffer.data] = source.buffer, [fragment((rows, columns // 2), name) for name in ("even", "odd")]
    if not halves:
        return block

    def place_of_pair(i, j):
        thread, register = place(i, 2 * j)
        return thread, register // 2

    def read(buffer: tirx.Buffer, half: tirx.Buffer, at: int) -> tirx.For:
        shape = tuple(map(int, half.shape))
        layout = T.Fragment(shape, forward_fn=place_of_pair)
        return parallel(shape, lambda i, j: store(half, buffer[i, 2 * j + at], i, j), layout)

    def replace(node):
        if isinstance(node, tirx.BufferLoad) and node.buffer.data in halves:
            row, column = node.indices
            is_even = equal(column % 2, 0)
            return halves[node.buffer.data][1][0 if is_even else 1][row, column // 2]
        if isinstance(node, tirx.Evaluate) and is_call(node.value, COPY):
            data = region_of(node.value.args[1]).buffer.data
            if data in halves:
                buffer, both = halves[data]
                return sequence(*(read(buffer, half, at) for at, half in enumerate(both)))
        if isinstance(node, tirx.For) and COLUMN_PAIRS in (node.annotations or {}):
            others = {key: value for key, value in node.annotations.items() if key != COLUMN_PAIRS}
            return tirx.For(node.loop_var, node.min, node.extent, node.kind, node.body, annotations=others, step=node.step)
        return None

    # Copies first, from outside: their operand is a load, too.
    body = ir_transform(block.body, lambda node: replace(node) if isinstance(node, tirx.Evaluate) else None, replace, _NODES)
    kept = [one for one in block.alloc_buffers if one.data not in halves]
    return with_body(block, body, [*kept, *(half for _, both in halves.values() for half in both)], dict(block.annotations))


_NODES = ["tirx.Evaluate", "tirx.For", "tirx.BufferLoad"]

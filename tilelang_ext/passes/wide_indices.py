"""Indices of tensors with more elements than 32 bits count are of 64 bits before they become one number.

    Before  A[69999, 39900 + j]                              A of (70000, 40000): 69999 * 40000 + 39900 wraps
    After   A[int64(69999), int64(39900 + j)]

Upstream widens an index whose bounds are too large, after constants in it have been folded in 32 bits. Runs before indices
become offsets of pointers, and again before buffers become flat: between the two, indices that fit 32 bits are narrowed.
"""

from __future__ import annotations

from tvm import IRModule, tirx
from tvm.tirx.stmt_functor import post_order_visit

from tilelang_ext.passes.rewrite import rewritten
from tilelang_ext.passes.uniformity import int_of

_LARGEST = 2**31 - 1


def is_large(buffer: tirx.Buffer) -> bool:
    """Whether offsets of a buffer's elements, as far as its shape and strides are known, need more than 32 bits."""
    extents = [int_of(extent) for extent in buffer.shape]
    strides = [int_of(stride) for stride in buffer.strides]
    last, step = 0, 1
    for axis in reversed(range(len(extents))):
        if extents[axis] is None:
            return False
        stride = strides[axis] if strides else step
        if stride is None:
            return False
        last, step = last + (extents[axis] - 1) * stride, step * extents[axis]
    return last > _LARGEST


def WidenIndices(mod: IRModule) -> IRModule:
    """Rewrite the loads and stores of large buffers in `mod`."""

    def rewrite(node):
        if not is_large(node.buffer):
            return None
        indices = [_wide(index) for index in node.indices]
        if isinstance(node, tirx.BufferLoad):
            return tirx.BufferLoad(node.buffer, indices, node.predicate)
        return tirx.BufferStore(node.buffer, node.value, indices, node.predicate)

    def widen(func):
        large = False

        def visit(node):
            nonlocal large
            large = large or (isinstance(node, (tirx.BufferLoad, tirx.BufferStore)) and is_large(node.buffer))

        post_order_visit(func.body, visit)
        return func.with_body(rewritten(func.body, rewrite, ["tirx.BufferLoad", "tirx.BufferStore"])) if large else func

    return IRModule({name: widen(func) for name, func in mod.functions_items()}, attrs=mod.attrs)


def _wide(index: tirx.PrimExpr) -> tirx.PrimExpr:
    lanes = str(index.dtype).partition("x")[2]
    return tirx.Cast("int64" + (f"x{lanes}" if lanes else ""), index)

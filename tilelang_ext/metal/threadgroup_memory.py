"""Place dynamic shared buffers in typed threadgroup arrays.

    Before  As = alloc_buffer((2552,), "float16", scope="shared.dyn")      After  ... scope="shared"

Metal fixes the size of threadgroup memory in the kernel's text, so nothing about it is dynamic. Separate typed arrays are
aligned and readable, and the simulator bounds-checks each. Only a kernel whose arrays together exceed the limit keeps the
scope, and with it upstream's merge into one buffer whose parts share bytes when their lifetimes allow it.
"""

from __future__ import annotations

from tvm import DataType, tirx
from tvm.ir import PointerType
from tvm.tirx.transform import prim_func_pass

THREADGROUP_MEMORY_BYTES = 32768


def _place(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    buffers = shared_buffers(func)
    dynamic = [buffer for buffer in buffers if buffer.scope() == "shared.dyn"]
    if not dynamic or sum(aligned_bytes(buffer) for buffer in buffers) > THREADGROUP_MEMORY_BYTES:
        return func
    renamed = {
        buffer.data: tirx.Var(buffer.data.name, PointerType(buffer.data.type_annotation.element_type, "shared"))
        for buffer in dynamic
    }
    return func.with_body(tirx.stmt_functor.substitute(func.body, renamed))


def shared_buffers(func: tirx.PrimFunc) -> list[tirx.Buffer]:
    """Return the buffers that a function allocates in threadgroup memory."""
    buffers = []

    def collect(node):
        if isinstance(node, tirx.AllocBuffer) and node.buffer.scope() in ("shared", "shared.dyn"):
            buffers.append(node.buffer)

    tirx.stmt_functor.post_order_visit(func.body, collect)
    return buffers


def aligned_bytes(buffer: tirx.Buffer) -> int:
    """Return the bytes of a buffer, a multiple of 16; ValueError for a size that is not known."""
    elements = 1
    for extent in buffer.shape:
        if not isinstance(extent, tirx.IntImm):
            raise ValueError(
                f"threadgroup memory: sizes must be known when the kernel is compiled; got shape {list(buffer.shape)} for "
                f"{buffer.name}; use a constant tile shape"
            )
        elements *= int(extent)
    return -(-elements * DataType(buffer.dtype).bits // 128) * 16


PlaceThreadgroupMemory = prim_func_pass(_place, opt_level=0, name="tilelang_ext.PlaceThreadgroupMemory")

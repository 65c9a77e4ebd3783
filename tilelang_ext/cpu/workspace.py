"""Move a kernel's arrays off the stack where they are large.

    Before  S = alloc_buffer((512, 512), "float32")      After  S = workspace(total bytes, offset)

A tile that fits a GPU's shared memory fits a stack, but a kernel for the CPU may have larger ones.
"""

from __future__ import annotations

from tvm import DataType, IRModule, tirx

from tilelang_ext.cpu.narrow_floats import call, is_device

STACK_BYTES = 256 * 1024  # the most for all arrays of a kernel; some threads have a stack of 512 KiB
_ALIGNMENT = 64


def PlaceLargeArrays(mod: IRModule) -> IRModule:
    """Move the arrays of each device function to the heap if together they exceed `STACK_BYTES`; see above."""
    functions = {name: _place(func) if is_device(func) else func for name, func in mod.functions_items()}
    return IRModule(functions, attrs=mod.attrs)


def _place(func: tirx.PrimFunc) -> tirx.PrimFunc:
    offsets: dict[tirx.Var, int] = {}
    total = 0

    def collect(node):
        nonlocal total
        if isinstance(node, tirx.AllocBuffer):
            offsets[node.buffer.data] = total
            total += -(-_bytes(node.buffer) // _ALIGNMENT) * _ALIGNMENT

    tirx.stmt_functor.post_order_visit(func.body, collect)
    if total <= STACK_BYTES:
        return func

    def replace(node):
        size, offset = (tirx.IntImm("uint64", value) for value in (total, offsets[node.buffer.data]))
        return tirx.Bind(node.buffer.data, call("workspace", "handle", size, offset))

    return func.with_body(tirx.stmt_functor.ir_transform(func.body, None, replace, ["tirx.AllocBuffer"]))


def _bytes(buffer: tirx.Buffer) -> int:
    elements = 1
    for extent in buffer.shape:
        if not isinstance(extent, tirx.IntImm):
            raise ValueError(
                f"target c: sizes of tiles must be known when the kernel is compiled; got shape {list(buffer.shape)} for "
                f"{buffer.name}; use a constant tile shape"
            )
        elements *= int(extent)
    return elements * (DataType(buffer.dtype).bits + 7) // 8

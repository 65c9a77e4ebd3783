"""Upstream's LayoutInference, with what it cannot lay out said in one line instead of an InternalError.

f = alloc_fragment((16, 40), "float32"), 256 threads; f and a float16 fragment in one T.Parallel: 640 elements have no layout
that both types' vectors fit, "no available layout found"
"""

from __future__ import annotations

import tilelang
from tvm import IRModule, tirx
from tvm.error import InternalError
from tvm.tirx.stmt_functor import post_order_visit

_NAMED = 4  # fragments that a message names


def infer_layouts(mod: IRModule) -> IRModule:
    """Return the module with a layout for each fragment; ValueError where upstream finds none."""
    try:
        return tilelang.transform.LayoutInference()(mod)
    except InternalError as error:
        text = str(error)
    if "no available layout found" in text:
        fragments, threads = _of(mod)
        raise ValueError(
            "T.Parallel: fragments that one loop uses must have a layout that all of them share; "
            f"got {fragments} and {threads} threads; take threads that divide the elements of each tile, "
            "or copy a fragment through shared memory"
        )
    raise InternalError(text)


def _of(mod: IRModule) -> tuple[str, int]:
    """The fragments of a module's functions by name and shape, and the threads of a block."""
    fragments, threads = [], 1

    def visit(node):
        nonlocal threads
        if isinstance(node, tirx.SBlock):
            fragments.extend(
                f"{buffer.name} ({', '.join(map(str, buffer.shape))}) of {buffer.dtype}"
                for buffer in node.alloc_buffers
                if buffer.scope() == "local.fragment"
            )
        elif isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent" and node.node.thread_tag == "threadIdx.x":
            threads = int(node.value)

    for func in mod.functions.values():
        if isinstance(func, tirx.PrimFunc):
            post_order_visit(func.body, visit)
    more = f" and {len(fragments) - _NAMED} more" if len(fragments) > _NAMED else ""
    return ", ".join(fragments[:_NAMED]) + more, threads

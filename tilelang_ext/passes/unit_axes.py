"""A fragment that a reduction fills with its axis kept loses that axis: upstream gives it a layout without it.

    Before  r_f (16, 1); reduce_sum(a_f, r_f, dim=1); copy(r_f, C[0:16, 0:1]); x = a_f[i, j] - r_f[i, 0]
    After   r_f (16,);   reduce_sum(a_f, r_f, dim=1); copy(r_f, C[0:16, 0:1]); x = a_f[i, j] - r_f[i]

Left alone is a fragment that is reduced further, has an annotated layout, or is seen through a view. Runs on tile programs,
before layouts are inferred.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.stmt_functor import post_order_visit
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten


def _name(node) -> str:
    return getattr(node.op, "name", "") if isinstance(node, tirx.Call) else ""


def _find(body: tirx.Stmt) -> dict[tirx.Buffer, int]:
    """Return the fragments that lose an axis, with the axis."""
    found: dict[tirx.Buffer, int] = {}
    kept: set[tirx.Var] = set()
    seen: dict[tirx.Var, set[tirx.Buffer]] = {}

    def visit(node):
        if isinstance(node, tirx.SBlock):
            kept.update(node.annotations.get("layout_map", {}))
        elif isinstance(node, (tirx.BufferLoad, tirx.BufferStore)):
            seen.setdefault(node.buffer.data, set()).add(node.buffer)
        elif _name(node) == "tl.tileop.reduce":
            source, result = (node.args[i].args[0].buffer for i in (0, 1))
            axis = int(node.args[3])
            kept.add(source.data)
            if result.scope() == "local.fragment" and len(result.shape) == len(source.shape) > 1:
                if isinstance(result.shape[axis], tirx.IntImm) and int(result.shape[axis]) == 1:
                    found[result] = axis
                else:
                    kept.add(result.data)

    post_order_visit(body, visit)
    return {buffer: axis for buffer, axis in found.items() if buffer.data not in kept and len(seen[buffer.data]) == 1}


def _drop(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    axes = _find(func.body)
    if not axes:
        return func
    flat, axis_of = {}, {}
    for buffer, axis in axes.items():
        shape = _without(buffer.shape, axis)
        flat[buffer] = tirx.decl_buffer(shape, buffer.dtype, buffer.name, data=buffer.data, scope=buffer.scope())
        axis_of[flat[buffer]] = axis

    def change(node):
        if isinstance(node, tirx.BufferLoad) and node.buffer in axes:
            return tirx.BufferLoad(flat[node.buffer], _without(node.indices, axes[node.buffer]))
        if isinstance(node, tirx.BufferStore) and node.buffer in axes:
            return tirx.BufferStore(flat[node.buffer], node.value, _without(node.indices, axes[node.buffer]))
        if _name(node) == "tl.region" and node.args[0].buffer in axis_of:
            load, access, *extents = node.args
            return tirx.Call(node.dtype, node.op, [load, access, *_without(extents, axis_of[load.buffer])])
        if isinstance(node, tirx.SBlock) and any(buffer in axes for buffer in node.alloc_buffers):
            return tirx.SBlock(
                node.iter_vars,
                node.reads,
                node.writes,
                node.name_hint,
                node.body,
                node.init,
                [flat.get(buffer, buffer) for buffer in node.alloc_buffers],
                node.match_buffers,
                node.annotations,
            )
        return None

    kinds = ["tirx.BufferLoad", "tirx.BufferStore", "tirx.Call", "tirx.SBlock"]
    return func.with_body(rewritten(func.body, change, kinds))


def _without(items, axis: int) -> list:
    return [item for i, item in enumerate(items) if i != axis]


DropUnitAxes = prim_func_pass(_drop, opt_level=0, name="tilelang_ext.DropUnitAxes")

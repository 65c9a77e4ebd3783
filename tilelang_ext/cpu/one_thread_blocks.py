"""Turn a GPU's tile program into one that a single thread runs, block after block.

    Before  A_s = alloc_buffer((32, 64), scope="shared.dyn")      After  ... scope="local"
            C_f = alloc_buffer((32, 32), scope="local.fragment")         ... scope="local"
            "layout_map": {A_s: ...}                                     -

Where an element lies is a question of banks and lanes, of which one thread has none: every tile is an array of its own, in
the order of its indices. What is left of the program means the same; an instruction that speaks to other threads does not,
and is refused.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Op, PointerType
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.cpu.narrow_floats import is_carried

_TILES = ("shared", "shared.dyn", "local.fragment")
_TILE_OPERATORS = ("copy", "async_copy", "fill", "gemm", "reduce", "transpose", "atomicadd", "atomicmax", "atomicmin")
# Fast functions are less exact versions of these.
_EXACT = {f"tl.__{name}": Op.get(f"tirx.{name}") for name in ("exp", "exp10", "log", "log2", "log10", "sin", "cos", "tan")}


def needs_one_thread_blocks(func: tirx.PrimFunc) -> bool:
    """Whether upstream's lowering for `c` would refuse `func`: fragments, fp8 and bfloat16, several dynamic shared buffers,
    a fill of shared memory."""
    buffers = [*func.buffer_map.values()]
    fills = []

    def visit(node):
        if isinstance(node, tirx.SBlock):
            buffers.extend(node.alloc_buffers)
        if isinstance(node, tirx.Cast) and is_carried(node.dtype) and str(node.dtype) != "float16":
            fills.append(True)  # a value needs no buffer to be refused
        if isinstance(node, tirx.Call) and isinstance(node.op, Op) and node.op.name == "tl.tileop.fill":
            fills.append(node.args[0].args[0].buffer.scope().startswith("shared"))

    tirx.stmt_functor.post_order_visit(func.body, visit)
    scopes = [buffer.scope() for buffer in buffers]
    return (
        any(fills)
        or "local.fragment" in scopes
        or scopes.count("shared.dyn") > 1
        or any(is_carried(buffer.dtype) and str(buffer.dtype) != "float16" for buffer in buffers)
    )


def _serialize(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    local: dict[tirx.Var, tirx.Var] = {}

    def collect(node):
        if isinstance(node, tirx.Call) and isinstance(node.op, Op):
            operator = node.op.name.removeprefix("tl.tileop.")
            if operator != node.op.name and operator not in _TILE_OPERATORS:
                raise NotImplementedError(
                    f"target c: tile operators must be {', '.join(_TILE_OPERATORS)}; got {operator}; "
                    "write it with these and T.Parallel or T.serial"
                )
        if isinstance(node, tirx.SBlock):
            for buffer in node.alloc_buffers:
                if buffer.scope() in _TILES:
                    element = buffer.data.type_annotation.element_type
                    local[buffer.data] = tirx.Var(buffer.data.name, PointerType(element, "local"))

    def adapt(node):
        if isinstance(node, tirx.Call):
            name = node.op.name if isinstance(node.op, Op) else ""
            if name in _EXACT:
                return tirx.Call(node.dtype, _EXACT[name], node.args)
            if name == "tl.tileop.reduce" and "batch" in node.annotations:  # how many values a barrier serves
                annotations = {key: value for key, value in node.annotations.items() if key != "batch"}
                return tirx.Call(node.dtype, node.op, node.args, annotations)
            return None
        if "layout_map" not in node.annotations:
            return None
        annotations = {key: value for key, value in node.annotations.items() if key != "layout_map"}
        return tirx.SBlock(
            node.iter_vars, node.reads, node.writes, node.name_hint, node.body, node.init, node.alloc_buffers,
            node.match_buffers, annotations,
        )  # fmt: skip

    tirx.stmt_functor.post_order_visit(func.body, collect)
    body = tirx.stmt_functor.ir_transform(func.body, None, adapt, ["tirx.SBlock", "tirx.Call"])
    return func.with_body(tirx.stmt_functor.substitute(body, local))


OneThreadBlocks = prim_func_pass(_serialize, opt_level=0, name="tilelang_ext.OneThreadBlocks")

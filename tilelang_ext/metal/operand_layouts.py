"""Operands of `T.gemm` in threadgroup memory have the layout that its loads are made for, whatever layout is annotated.

    Before  annotate_layout({A_s: swizzled, C_s: swizzled}); gemm(A_s, B_s, C_f)
    After   annotate_layout({C_s: swizzled}); gemm(A_s, B_s, C_f)

A kernel that was written for CUDA may annotate a swizzled operand, as a hint against bank conflicts; rows with padding do that
here (`padded_layout`), and the numbers are the same. Runs before layouts are inferred, which would find two for one buffer.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import post_order_visit
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten

_LAYOUTS = "layout_map"
_GEMM = Op.get("tl.tileop.gemm")


def _drop(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    operands = set()

    def collect(node):
        if isinstance(node, tirx.Call) and node.op.same_as(_GEMM):
            buffers = [node.args[i].args[0].buffer for i in (0, 1, 2)]
            operands.update(buffer.data for buffer in buffers if buffer.scope().startswith("shared"))

    post_order_visit(func.body, collect)

    def without(block):
        layouts = block.annotations.get(_LAYOUTS)
        if not layouts or not any(key in operands for key in layouts):
            return None
        kept = {key: layout for key, layout in layouts.items() if key not in operands}
        return tirx.SBlock(
            block.iter_vars,
            block.reads,
            block.writes,
            block.name_hint,
            block.body,
            block.init,
            block.alloc_buffers,
            block.match_buffers,
            {**block.annotations, _LAYOUTS: kept},
        )

    return func.with_body(rewritten(func.body, without, ["tirx.SBlock"])) if operands else func


DropOperandLayouts = prim_func_pass(_drop, opt_level=0, name="tilelang_ext.DropOperandLayouts")

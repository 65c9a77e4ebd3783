"""Operands of `T.gemm` that lie in fragments come by way of shared memory.

    Before  gemm(P, V_s, O)                                  P: a fragment, whose layout an accumulator gives
    After   copy(P, P_s); gemm(P_s, V_s, O)

Where an accumulator holds its elements in other lanes than an operand has to, as on RDNA, or where a product deals its columns
out to warps of which each needs all of an operand's row, no layout of the fragment fits both. This is for programs that cannot
be lowered without. Runs on tile programs, before LayoutInference.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten

_GEMM, _COPY, _REGION = Op.get("tl.tileop.gemm"), Op.get("tl.tileop.copy"), Op.get("tl.region")
_READ, _WRITE = 1, 2


def _stage(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    staged: dict[tuple, tirx.Buffer] = {}  # one for each fragment, whatever number of products reads it
    pending: list[tirx.Buffer] = []  # until the block that they are allocated in

    def region_of(buffer: tirx.Buffer, access: int) -> tirx.Call:
        extents = list(buffer.shape)
        return tirx.Call("handle", _REGION, [tirx.BufferLoad(buffer, [0] * len(extents)), access, *extents])

    def rewrite(node):
        if isinstance(node, tirx.SBlock):
            if not pending:
                return None
            buffers = [*node.alloc_buffers, *pending]
            pending.clear()
            return tirx.SBlock(
                node.iter_vars, node.reads, node.writes, node.name_hint, node.body, node.init, buffers, node.match_buffers,
                node.annotations,
            )  # fmt: skip
        call = node.value
        if not isinstance(call, tirx.Call) or not call.op.same_as(_GEMM):
            return None
        arguments, copies = list(call.args), []
        for i in range(2):
            region = arguments[i]
            fragment = region.args[0].buffer
            if fragment.scope() != "local.fragment":
                continue
            extents = region.args[2:]
            key = (fragment.data, *map(int, extents))
            if key not in staged:
                staged[key] = tirx.decl_buffer(extents, fragment.dtype, f"{fragment.name}_s", scope="shared.dyn")
                pending.append(staged[key])
            copies.append(tirx.Evaluate(tirx.Call("handle", _COPY, [region, region_of(staged[key], _WRITE)])))
            arguments[i] = region_of(staged[key], _READ)
        if not copies:
            return None
        return tirx.SeqStmt([*copies, tirx.Evaluate(tirx.Call(call.dtype, call.op, arguments, call.annotations, call.span))])

    return func.with_body(rewritten(func.body, rewrite, ["tirx.Evaluate", "tirx.SBlock"]))


StageOperands = prim_func_pass(_stage, opt_level=0, name="tilelang_ext.StageOperands")

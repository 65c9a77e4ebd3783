"""`T.gemm` into 16-bit sums, which no instruction of AMD keeps: summed in float32, and rounded once.

    Before  gemm(A, B, C)                         C: fragment (64, 64) float16
    After   S = C; gemm(A, B, S); C = S           S: fragment (64, 64) float32; the first copy only where C is not cleared

Runs on tile programs.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten

_GEMM, _SUMS, _CLEAR = "tl.tileop.gemm", 2, 9  # which argument C is, and whether it is cleared
_HALVES = ("float16", "bfloat16")


class _Sums:
    """Rewrites the GEMMs of one function; a block that holds some allocates their sums."""

    def __init__(self):
        self.allocated: list[tirx.Buffer] = []

    def rewrite(self, node):
        return self.allocate(node) if isinstance(node, tirx.SBlock) else self.sum(node)

    def sum(self, node: tirx.Evaluate) -> tirx.Stmt | None:
        call = node.value
        if not isinstance(call, tirx.Call) or not isinstance(call.op, Op) or call.op.name != _GEMM:
            return None
        region = call.args[_SUMS]
        buffer = region.args[0].buffer
        if str(buffer.dtype) not in _HALVES or buffer.scope() != "local.fragment":
            return None
        sums = tirx.decl_buffer(buffer.shape, "float32", f"{buffer.name}_sums", scope="local.fragment")
        self.allocated.append(sums)
        whole = tirx.Call(region.dtype, region.op, [sums[tuple(region.args[0].indices)], *region.args[1:]])
        arguments = [*call.args[:_SUMS], whole, *call.args[_SUMS + 1 :]]
        gemm = tirx.Evaluate(tirx.Call(call.dtype, call.op, arguments, call.annotations))
        clear = call.args[_CLEAR]
        cleared = isinstance(clear, tirx.IntImm) and bool(int(clear))
        return tirx.SeqStmt([*([] if cleared else [_copy(buffer, sums)]), gemm, _copy(sums, buffer)])

    def allocate(self, block: tirx.SBlock) -> tirx.SBlock | None:
        if not self.allocated:
            return None
        buffers, self.allocated = [*block.alloc_buffers, *self.allocated], []
        return tirx.SBlock(
            block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init, buffers, block.match_buffers,
            block.annotations,
        )  # fmt: skip


def _copy(source: tirx.Buffer, to: tirx.Buffer) -> tirx.Stmt:
    """Return the parallel loop that converts one fragment to another."""
    variables = [tirx.Var(f"i{axis}", "int32") for axis in range(len(source.shape))]
    stmt: tirx.Stmt = tirx.BufferStore(to, tirx.Cast(to.dtype, tirx.BufferLoad(source, variables)), variables)
    for var, extent in reversed(list(zip(variables, source.shape, strict=True))):
        stmt = tirx.For(var, 0, extent, tirx.ForKind.PARALLEL, stmt)
    return stmt


def _sum_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    return func.with_body(rewritten(func.body, _Sums().rewrite, ["tirx.Evaluate", "tirx.SBlock"]))


SumHalvesInFloat = prim_func_pass(_sum_all, opt_level=0, name="tilelang_ext.SumHalvesInFloat")

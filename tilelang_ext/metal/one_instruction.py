"""Keep every `T.gemm` of a kernel on one matrix instruction.

    Before  target keys: metal, gpu, metal4; one T.gemm of the kernel has K = 8      After  target keys: metal, gpu

The accumulator of one GEMM is often an operand of another, and the layouts of the two instructions differ. So a kernel uses
Metal 4's `matmul2d` if every GEMM in it fits, and simdgroup matrices otherwise.
"""

from __future__ import annotations

from tilelang.tileop.base import GemmWarpPolicy
from tvm import tirx
from tvm.ir import Op
from tvm.target import Target
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.metal.fragment_to_simdgroup import MATMUL2D, check_tile, select_instruction
from tilelang_ext.passes.launched_blocks import launched_blocks


def _unify(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    target = func.attrs["target"]
    if target.kind.name != "metal" or "metal4" not in target.keys:
        return func
    gemm_op = Op.get("tl.tileop.gemm")
    fits = []

    def visit(node):
        if isinstance(node, tirx.Call) and node.op.same_as(gemm_op):
            a, b = (node.args[i].args[0].buffer for i in (0, 1))
            M, N, K = (int(node.args[i]) for i in (5, 6, 7))
            fits.append((str(a.dtype), str(b.dtype), M, N, K, block.threads, GemmWarpPolicy(int(node.args[8]))))

    for block in launched_blocks(func.body):
        tirx.stmt_functor.post_order_visit(block.body, visit)
    for a_dtype, b_dtype, M, N, K, threads, policy in fits:
        check_tile(M, N, K, threads)
        if select_instruction(target, a_dtype, b_dtype, M, N, K, threads, policy) is not MATMUL2D:
            description = dict(target.export())
            description["keys"] = [key for key in target.keys if key != "metal4"]
            return func.with_attr("target", Target(description, target.host) if target.host else Target(description))
    return func


OneInstruction = prim_func_pass(_unify, opt_level=0, name="tilelang_ext.OneInstruction")

"""The pass list of target `cuda`: upstream's, behind passes that only products with scales concern, and repairs."""

from __future__ import annotations

from tilelang.cuda.pipeline import CUDAPassPipelineBody
from tvm import IRModule
from tvm.target import Target

from tilelang_ext.cuda.block_scaled import has_instruction
from tilelang_ext.cuda.mxfp4_product import lower_mxfp4_products
from tilelang_ext.cuda.repairs import repair
from tilelang_ext.cuda.scaled_loop import specialize_scaled_loops
from tilelang_ext.formats import OCP_OF_FNUZ
from tilelang_ext.passes.empty_loops import GuardEmptyLoops
from tilelang_ext.passes.expand_block_scaled import expand_block_scaled_gemms

_FNUZ = tuple(format.dtype for format in OCP_OF_FNUZ)  # which upstream's generator does not spell


def lower(mod: IRModule, target: Target) -> IRModule:
    """Lower tile programs to flat device functions and their host code."""
    mod = expand_block_scaled_gemms(mod, is_upstreams=lambda call: has_instruction(call, target), without=_FNUZ)
    mod = lower_mxfp4_products(repair(GuardEmptyLoops(mod)), target)
    return CUDAPassPipelineBody(specialize_scaled_loops(mod, target), target)

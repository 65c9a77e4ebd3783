"""The pass list of target `cuda`: upstream's, behind passes that only products with scales concern, and repairs.

Upstream's host code launches a kernel that calls T.pdl_sync as any other, so that the call has nothing to wait for. Here such a
kernel is launched as a dependent one, which may begin when those before it on the stream have called T.pdl_trigger, or ended.
"""

from __future__ import annotations

from tilelang.cuda.pipeline import CUDAPassPipelineBody
from tvm import IRModule, tirx
from tvm.ir import Op
from tvm.target import Target
from tvm.tirx.stmt_functor import post_order_visit

from tilelang_ext.cuda.block_scaled import has_instruction
from tilelang_ext.cuda.mxfp4_product import lower_mxfp4_products
from tilelang_ext.cuda.repairs import repair
from tilelang_ext.cuda.scaled_loop import specialize_scaled_loops
from tilelang_ext.formats import OCP_OF_FNUZ
from tilelang_ext.passes.expand_block_scaled import expand_block_scaled_gemms
from tilelang_ext.passes.hidden_conditions import hide_conditions
from tilelang_ext.passes.instruments import instrumented
from tilelang_ext.passes.known_layouts import InferLayouts
from tilelang_ext.passes.layouts import LayOut, with_plain_layouts
from tilelang_ext.passes.narrow_integers import WrapNarrowIntegers
from tilelang_ext.passes.solver import in_linear_arithmetic
from tilelang_ext.passes.upstream_errors import in_our_words

_FNUZ = tuple(format.dtype for format in OCP_OF_FNUZ)  # which upstream's generator does not spell
_WAITS, _LAUNCH = "has_cuda_pdl_sync", "tirx.kernel_launch_params"  # attributes of a function on the device
_REDUCTIONS = ("tl.tileop.reduce", "tl.tileop.cumsum", "tl.tileop.finalize_reducer")  # what their names begin with
_DEPENDENT = "tirx.use_programtic_dependent_launch"  # as TVM's launcher spells it


@in_our_words("cuda")
@with_plain_layouts
@in_linear_arithmetic
def lower(mod: IRModule, target: Target, lay_out: LayOut) -> IRModule:
    """Lower tile programs to flat device functions and their host code."""
    mod = expand_block_scaled_gemms(mod, is_upstreams=lambda call: has_instruction(call, target), without=_FNUZ)
    mod = lower_mxfp4_products(repair(mod), target)
    mod = specialize_scaled_loops(mod, target)
    with instrumented(InferLayouts(lambda threaded: _laid_out(threaded, lay_out))):
        mod = CUDAPassPipelineBody(mod, target)
    return hide_conditions(WrapNarrowIntegers(with_dependent_launches(mod)))


def _laid_out(mod: IRModule, lay_out: LayOut) -> IRModule:
    """Return what `lay_out` makes of tile programs, but for reductions: they might meet at barriers that some threads skip."""
    laid_out, found = lay_out(mod), False

    def visit(node):
        nonlocal found
        found = found or (isinstance(node, tirx.Call) and isinstance(node.op, Op) and node.op.name.startswith(_REDUCTIONS))

    for func in mod.functions.values():
        if isinstance(func, tirx.PrimFunc):
            post_order_visit(func.body, visit)
    return mod if found else laid_out


def with_dependent_launches(mod: IRModule) -> IRModule:
    """Return the module with device functions that wait launched as dependent ones."""
    functions = {var: _dependent(func) if isinstance(func, tirx.PrimFunc) else func for var, func in mod.functions.items()}
    return IRModule(functions, attrs=mod.attrs)


def _dependent(func: tirx.PrimFunc) -> tirx.PrimFunc:
    attributes = func.attrs or {}
    if not attributes.get(_WAITS) or _LAUNCH not in attributes:
        return func
    return func.with_attr(_LAUNCH, [_DEPENDENT, *attributes[_LAUNCH]])

"""What upstream's passes and generator get wrong on target `cuda`, said in other words before they begin.

Where nothing is wrong a program stays as it is, and so does its text. docs/guide/language_support.md lists what is left.
"""

from __future__ import annotations

import tilelang
from tvm import IRModule, tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import post_order_visit
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.float_arithmetic import KeepFloatArithmetic
from tilelang_ext.passes.joined_guards import JoinGuardsOfCasts
from tilelang_ext.passes.region_shapes import is_region, refuse_unlike_regions
from tilelang_ext.passes.repeated_atomics import PartAtomics
from tilelang_ext.passes.rewrite import rewritten
from tilelang_ext.passes.scalar_atomics import SpellScalarAtomics
from tilelang_ext.passes.shifted_indices import HideShiftedTileIndices
from tilelang_ext.passes.updates import PartUpdates
from tilelang_ext.passes.wrapping_casts import KeepWrappingCasts

_NARROW = ("int8", "uint8", "int16", "uint16")
_LEFT, _RIGHT = "tirx.shift_left", "tirx.shift_right"
_ATOMICS = ("tl.tileop.atomicadd", "tl.tileop.atomicmax", "tl.tileop.atomicmin")


def repair(mod: IRModule) -> IRModule:
    """Rewrite what would be wrong; runs on tile programs, before everything else."""
    mod = refuse_unlike_regions(mod)
    mod = WrapNarrowShifts(JoinGuardsOfCasts(HideShiftedTileIndices(KeepWrappingCasts(KeepFloatArithmetic(mod)))))
    # Which threads there are must be known; upstream's own pass finds nothing left to do.
    launch = tilelang.transform.MaterializeKernelLaunch
    try:
        launched = launch(lower_thread_binding=True, default_threads=128)(mod)
    except TypeError:  # 0.1.14
        launched = launch()(mod)
    parted = PartUpdates(PartAtomics(launched))
    if any(_has_scalar_atomic(func) for _, func in mod.functions_items()):
        return SpellScalarAtomics(parted)
    return mod if _bodies(parted) == _bodies(launched) else parted


def _bodies(mod: IRModule) -> list[tirx.Stmt]:
    """Return what the functions run: a pass that has nothing to do leaves these objects."""
    return [func.body for _, func in mod.functions_items()]


def _has_scalar_atomic(func: tirx.PrimFunc) -> bool:
    """Whether an atomic gives one value, not a tile, to a buffer."""
    found = False

    def visit(node):
        nonlocal found
        if isinstance(node, tirx.Call) and isinstance(node.op, Op) and node.op.name in _ATOMICS:
            found = found or not is_region(node.args[0])

    post_order_visit(func.body, visit)
    return found


def _wrap(node: tirx.Call) -> tirx.Call | None:
    """`(x << 4) >> 4` of 8 or 16 bits: C shifts an int, whose upper bits come back."""
    if not _is_narrow(node, _RIGHT) or not _is_narrow(node.args[0], _LEFT):
        return None
    shifted = node.args[0]
    wide = tirx.Call("int32", shifted.op, [tirx.Cast("int32", operand) for operand in shifted.args])
    return tirx.Call(node.dtype, node.op, [tirx.Cast(node.dtype, wide), node.args[1]])


def _is_narrow(node: tirx.PrimExpr, name: str) -> bool:
    return isinstance(node, tirx.Call) and isinstance(node.op, Op) and node.op.name == name and str(node.dtype) in _NARROW


def _wrap_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    return func.with_body(rewritten(func.body, _wrap, ["tirx.Call"]))


WrapNarrowShifts = prim_func_pass(_wrap_all, opt_level=0, name="tilelang_ext.WrapNarrowShifts")

"""What upstream's passes and generator get wrong on target `cuda`, said in other words before they begin.

Where nothing is wrong a program stays as it is, and so does its text. docs/guide/language_support.md lists what is left.
"""

from __future__ import annotations

import tilelang
from tvm import IRModule, tirx
from tvm.ir import Op, structural_equal
from tvm.tirx.stmt_functor import post_order_visit

from tilelang_ext.passes.empty_loops import GuardEmptyLoops
from tilelang_ext.passes.float_arithmetic import KeepFloatArithmetic
from tilelang_ext.passes.joined_guards import JoinGuardsOfCasts
from tilelang_ext.passes.region_shapes import is_region, refuse_unlike_regions
from tilelang_ext.passes.repeated_atomics import PartAtomics
from tilelang_ext.passes.scalar_atomics import SpellScalarAtomics
from tilelang_ext.passes.shifted_indices import HideShiftedTileIndices
from tilelang_ext.passes.updates import PartUpdates
from tilelang_ext.passes.wrapping_casts import KeepWrappingCasts

_ATOMICS = ("tl.tileop.atomicadd", "tl.tileop.atomicmax", "tl.tileop.atomicmin")


def repair(mod: IRModule) -> IRModule:
    """Rewrite what would be wrong; runs on tile programs, before everything else."""
    mod = refuse_unlike_regions(mod)
    mod = JoinGuardsOfCasts(HideShiftedTileIndices(KeepWrappingCasts(KeepFloatArithmetic(mod))))
    # Which threads there are must be known; upstream's own pass finds nothing left to do.
    launch = tilelang.transform.MaterializeKernelLaunch
    try:
        launched = launch(lower_thread_binding=True, default_threads=128)(mod)
    except TypeError:  # 0.1.14
        launched = launch()(mod)
    parted = PartUpdates(PartAtomics(launched))
    guarded = GuardEmptyLoops(parted)
    if not structural_equal(guarded, parted):
        parted = guarded
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

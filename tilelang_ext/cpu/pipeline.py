"""The pass list of target `c` for GPU tile programs: upstream's, with one thread per block and floats stored as codes."""

from __future__ import annotations

import inspect

import tilelang
from tilelang.backend.pass_pipeline.pipeline_utils import should_enable_race_check, should_force_let_inline
from tvm import IRModule, s_tir, tirx
from tvm.target import Target

from tilelang_ext.cpu.narrow_floats import CarryNarrowFloats
from tilelang_ext.cpu.one_thread_blocks import OneThreadBlocks
from tilelang_ext.cpu.operators import RULES
from tilelang_ext.cpu.scans import SpellScans
from tilelang_ext.cpu.workspace import PlaceLargeArrays
from tilelang_ext.formats import E2M1
from tilelang_ext.passes.booleans import SpellBooleans
from tilelang_ext.passes.empty_loops import GuardEmptyLoops
from tilelang_ext.passes.expand_block_scaled import expand_block_scaled_gemms
from tilelang_ext.passes.float_arithmetic import KeepFloatArithmetic
from tilelang_ext.passes.held_bounds import HoldBounds
from tilelang_ext.passes.hidden_conditions import hide_conditions
from tilelang_ext.passes.operators import spell_operators
from tilelang_ext.passes.shifted_indices import HideShiftedIndices, ReleaseShiftedIndices
from tilelang_ext.passes.single_rounds import EndSingleRounds
from tilelang_ext.passes.vector_lanes import SelectLanes
from tilelang_ext.passes.wide_indices import WidenIndices
from tilelang_ext.passes.wrapping_casts import KeepWrappingCasts


def _materialize_kernel_launch():
    materialize = tilelang.transform.MaterializeKernelLaunch
    if "unsupported_annotations" not in inspect.signature(materialize).parameters:  # 0.1.14
        return materialize(lower_thread_binding=False)
    return materialize(lower_thread_binding=False, unsupported_annotations=["cluster_dims"])


def lower(mod: IRModule, target: Target) -> IRModule:
    """Lower tile programs to a C function that runs the grid as loops, without vectors or threads."""
    transform = tilelang.transform
    mod = expand_block_scaled_gemms(mod, without=(E2M1.dtype,))
    mod = tirx.transform.BindTarget(target)(mod)
    mod = _materialize_kernel_launch()(mod)
    mod = OneThreadBlocks(SpellScans(mod))
    mod = spell_operators(mod, RULES)
    mod = SelectLanes(mod)
    mod = SpellBooleans(mod)
    mod = KeepWrappingCasts(KeepFloatArithmetic(mod))
    mod = GuardEmptyLoops(EndSingleRounds(mod))
    if should_force_let_inline():
        mod = transform.LetInline()(mod)
    mod = transform.AddWrapperForSingleBufStore()(mod)
    mod = transform.LegalizeNegativeIndex()(mod)
    if should_enable_race_check():
        mod = transform.VerifyParallelLoop()(mod)
    mod = transform.InjectAssumes()(mod)
    mod = transform.Simplify()(mod)
    mod = transform.CanonicalizeLegacyReducer()(mod)
    mod = transform.VerifyReducerEpoch()(mod)
    mod = transform.VerifyBufferInit()(mod)
    mod = transform.IfStmtBinding()(mod)
    mod = transform.Simplify()(mod)

    # Tile operations become loops; T.gemm through tilelang_ext.cpu.gemm.
    mod = transform.LayoutInference()(HoldBounds(mod))
    mod = transform.ReducerPlanAndMaterialize()(mod)
    mod = transform.LowerTileOp()(mod)
    mod = transform.VerifyReducerConsumed()(mod)
    mod = tilelang.cpu.transform.LowerCPUAtomics()(mod)
    mod = transform.LegalizeSafeMemoryAccess()(mod)
    mod = WidenIndices(mod)
    mod = transform.LowerAccessPtr()(mod)
    mod = transform.Simplify()(mod)
    mod = transform.HoistNonRestrictParams()(mod)

    mod = transform.PlanAndUpdateBufferAllocationLocation()(mod)
    mod = transform.HoistGlobalBufferAllocations()(mod)
    mod = transform.LowerOpaqueBlock()(mod)
    mod = transform.Simplify()(mod)
    mod = tirx.transform.NarrowDataType(32)(mod)
    mod = WidenIndices(mod)
    mod = ReleaseShiftedIndices(transform.FlattenBuffer()(HideShiftedIndices(mod)))
    mod = transform.ConfigIndexBitwidth()(mod)
    mod = tirx.transform.Simplify()(mod)
    mod = transform.VectorizeLoop(enable_vectorize=False)(mod)  # the C++ compiler vectorises
    mod = transform.StorageRewrite()(mod)
    mod = transform.LoopUnswitching()(mod)
    mod = transform.UnrollLoop()(mod)
    mod = s_tir.transform.RenormalizeSplitPattern()(mod)
    mod = tirx.transform.Simplify()(mod)
    mod = tirx.transform.RemoveNoOp()(mod)
    mod = s_tir.transform.HoistIfThenElse()(mod)
    mod = tirx.transform.VerifyMemory()(mod)
    mod = tirx.transform.AnnotateEntryFunc()(mod)

    mod = transform.AnnotateDeviceRegions()(mod)
    mod = transform.SplitHostDevice()(mod)
    mod = transform.AnnotateReadOnlyParams()(mod)
    mod = transform.MergeIfStmt()(mod)
    mod = transform.MakePackedAPI()(mod)
    mod = transform.Simplify()(mod)
    mod = transform.LowerDeviceKernelLaunch()(mod)
    mod = CarryNarrowFloats(mod)
    return hide_conditions(PlaceLargeArrays(mod))

"""The pass list of target `hip`: upstream's, with scales, and with repairs of what its passes and its generator get wrong."""

from __future__ import annotations

import inspect

import tilelang
from tilelang.backend.pass_pipeline.pipeline_utils import (
    LayoutVisual,
    allow_vectorize,
    should_disable_shared_memory_reuse,
    should_enable_aggressive_merge,
    should_enable_race_check,
    should_force_let_inline,
)
from tvm import IRModule, s_tir, tirx
from tvm.target import Target

from tilelang_ext.formats import E2M1, E8M0
from tilelang_ext.passes.booleans import SpellBooleans
from tilelang_ext.passes.divergent_barriers import PartDivergentBarriers
from tilelang_ext.passes.empty_loops import GuardEmptyLoops
from tilelang_ext.passes.expand_block_scaled import expand_block_scaled_gemms
from tilelang_ext.passes.float_arithmetic import KeepFloatArithmetic, ReleaseFloatArithmetic
from tilelang_ext.passes.float_constants import SpellFloatConstants, by_bits
from tilelang_ext.passes.foreign_calls import refuse_foreign
from tilelang_ext.passes.fp8_names import name_e4m3
from tilelang_ext.passes.guarded_casts import MoveGuardsOfCasts
from tilelang_ext.passes.held_bounds import HoldBounds
from tilelang_ext.passes.hidden_conditions import hide_conditions, restore_conditions
from tilelang_ext.passes.hoisting import hoist_guards
from tilelang_ext.passes.known_layouts import infer_layouts
from tilelang_ext.passes.lane_indices import CountLanes
from tilelang_ext.passes.layouts import LayOut, with_plain_layouts
from tilelang_ext.passes.missing_barriers import PlaceMissingBarriers
from tilelang_ext.passes.narrow_integers import WrapNarrowIntegers
from tilelang_ext.passes.operators import spell_operators
from tilelang_ext.passes.outside import GuardAccesses, PlaceMarks
from tilelang_ext.passes.pipelined_scalars import ForwardPipelinedScalars
from tilelang_ext.passes.pipelines import pipelined
from tilelang_ext.passes.reduction_groups import CountFromFirstThread
from tilelang_ext.passes.region_shapes import refuse_unlike_regions
from tilelang_ext.passes.repeated_atomics import PartAtomics
from tilelang_ext.passes.scalar_atomics import SpellScalarAtomics
from tilelang_ext.passes.scalar_parameters import refuse_narrow_scalars
from tilelang_ext.passes.shifted_indices import HideShiftedIndices, ReleaseShiftedIndices
from tilelang_ext.passes.single_rounds import EndSingleRounds
from tilelang_ext.passes.solver import in_linear_arithmetic
from tilelang_ext.passes.tma_hints import drop_tma_hints
from tilelang_ext.passes.unit_axes import DropUnitAxes
from tilelang_ext.passes.updates import PartUpdates
from tilelang_ext.passes.upstream_errors import in_our_words
from tilelang_ext.passes.vector_lanes import KeepShufflesScalar, SelectLanes
from tilelang_ext.passes.wide_indices import WidenIndices
from tilelang_ext.passes.wrapping_casts import KeepWrappingCasts
from tilelang_ext.rocm.all_reduce import count_from, with_participants
from tilelang_ext.rocm.async_copy import CopyWords
from tilelang_ext.rocm.block_scaled import lower_block_scaled, lower_block_scaled_gemm
from tilelang_ext.rocm.definitions import define_functions
from tilelang_ext.rocm.fp8_casts import ConvertByFormat
from tilelang_ext.rocm.half_sums import SumHalvesInFloat
from tilelang_ext.rocm.operators import rules_of
from tilelang_ext.rocm.pair_atomics import SpellPairAtomics
from tilelang_ext.rocm.scans import spell_scans
from tilelang_ext.rocm.spelling import KeepSelectsScalar, SpellEightBits


def _materialize_kernel_launch():
    materialize = tilelang.transform.MaterializeKernelLaunch
    if "lower_grid_binding" not in inspect.signature(materialize).parameters:  # 0.1.14
        return materialize()
    return materialize(
        lower_grid_binding=True,
        lower_thread_binding=True,
        default_threads=128,
        unsupported_annotations=["cluster_dims"],
    )


@in_our_words("hip")
@with_plain_layouts
@in_linear_arithmetic
def lower(mod: IRModule, target: Target, lay_out: LayOut) -> IRModule:
    """Lower tile programs to flat device functions and their host code."""
    transform = tilelang.transform
    config = transform.get_pass_context()
    mod = expand_block_scaled_gemms(
        name_e4m3(mod), native=lambda gemm: lower_block_scaled_gemm(gemm, target), without=(E2M1.dtype, E8M0.dtype)
    )
    mod = lower_block_scaled(mod, target)
    mod = refuse_unlike_regions(refuse_foreign(drop_tma_hints(refuse_narrow_scalars(mod)), "hip"))
    mod = tirx.transform.BindTarget(target)(mod)
    mod = _materialize_kernel_launch()(mod)
    mod = SumHalvesInFloat(mod)
    mod = DropUnitAxes(mod)
    mod = spell_operators(mod, rules_of(target))
    mod = SelectLanes(mod)
    mod = CountLanes(mod, int(target.attrs["thread_warp_size"]), keep_default=False)
    mod = SpellScalarAtomics(mod)
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
    mod = pipelined(ForwardPipelinedScalars(mod))
    mod = transform.Simplify()(mod)

    # Tile operations become loops over threads; T.gemm through tilelang_ext.rocm.gemm.
    mod = PartUpdates(PartAtomics(HoldBounds(mod)))
    mod = infer_layouts(lay_out(mod))
    mod = transform.ReducerPlanAndMaterialize()(mod)
    LayoutVisual(mod)
    mod = transform.LowerTileOp()(mod)
    mod = transform.VerifyReducerConsumed()(mod)
    mod = MoveGuardsOfCasts(mod)
    mod = transform.DecoupleTypeCast()(mod)
    mod = transform.LegalizeVectorizedLoop()(mod)
    mod = GuardAccesses(mod)
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
    mod = KeepSelectsScalar(KeepShufflesScalar(mod))
    mod = transform.VectorizeLoop(enable_vectorize=allow_vectorize(pass_ctx=config))(mod)
    mod = PlaceMarks(mod)
    mod = transform.StorageRewrite()(mod)
    mod = transform.LoopUnswitching()(mod)
    mod = transform.UnrollLoop()(mod)
    mod = s_tir.transform.RenormalizeSplitPattern()(mod)
    mod = tirx.transform.Simplify()(mod)
    mod = tirx.transform.RemoveNoOp()(mod)
    mod = hoist_guards(mod)
    mod = tirx.transform.VerifyMemory()(mod)
    mod = tirx.transform.AnnotateEntryFunc()(mod)
    mod = s_tir.transform.InferFragment()(mod)
    mod = transform.LowerThreadAllreduce()(mod)

    mod = transform.AnnotateDeviceRegions()(mod)
    mod = transform.SplitHostDevice()(mod)
    mod = transform.AnnotateReadOnlyParams()(mod)
    mod = transform.MergeSharedMemoryAllocations(
        enable_aggressive_merge=should_enable_aggressive_merge(pass_ctx=config, target=target),
        disable_reuse=should_disable_shared_memory_reuse(pass_ctx=config),
    )(mod)
    mod = transform.ThreadSync("shared")(mod)
    mod = transform.ThreadSync("shared.dyn")(mod)
    mod = CountFromFirstThread(mod, count_from)
    mod = PlaceMissingBarriers(mod)
    mod = PartDivergentBarriers(mod, with_participants)
    mod = spell_scans(mod, target)
    mod = define_functions(mod)
    mod = transform.MergeIfStmt()(mod)
    mod = transform.MakePackedAPI()(mod)
    mod = transform.Simplify()(mod)
    mod = transform.LowerDeviceKernelLaunch()(mod)
    return hide_conditions(CopyWords(mod))


def spell(mod: IRModule) -> IRModule:
    """Say in other words what upstream's generator spells wrong, or not at all; nothing simplifies behind it."""
    mod = ReleaseFloatArithmetic(restore_conditions(mod))
    mod = SpellFloatConstants(mod, by_bits)
    mod = ConvertByFormat(mod)
    mod = SpellEightBits(mod)
    mod = SpellPairAtomics(mod)
    return WrapNarrowIntegers(mod)

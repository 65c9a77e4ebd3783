"""The pass list of target `hip`: MMAs with scales, then tilelang's list, then fixes of what its generator gets wrong."""

from __future__ import annotations

from tilelang.rocm.pipeline import ROCMPassPipelineBody
from tvm import IRModule
from tvm.target import Target

from tilelang_ext.passes.divergent_barriers import PartDivergentBarriers
from tilelang_ext.passes.missing_barriers import PlaceMissingBarriers
from tilelang_ext.passes.reduction_groups import CountFromFirstThread
from tilelang_ext.rocm.all_reduce import count_from, define_all_reduce, with_participants
from tilelang_ext.rocm.async_copy import CopyWords
from tilelang_ext.rocm.block_scaled import lower_block_scaled
from tilelang_ext.rocm.spelling import SpellEightBits


def lower(mod: IRModule, target: Target) -> IRModule:
    """Lower tile programs to flat device functions and their host code."""
    mod = lower_block_scaled(mod, target)
    mod = ROCMPassPipelineBody(mod, target)
    mod = CountFromFirstThread(mod, count_from)
    mod = PlaceMissingBarriers(mod)
    mod = PartDivergentBarriers(mod, with_participants)
    mod = define_all_reduce(mod)
    mod = CopyWords(mod)
    return SpellEightBits(mod)

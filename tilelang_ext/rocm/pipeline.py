"""The pass list of target `hip`: tilelang's, and after it what its generator needs said in other words."""

from __future__ import annotations

from tilelang.rocm.pipeline import ROCMPassPipelineBody
from tvm import IRModule
from tvm.target import Target

from tilelang_ext.rocm.spelling import SpellEightBits


def lower(mod: IRModule, target: Target) -> IRModule:
    """Lower tile programs to flat device functions and their host code."""
    return SpellEightBits(ROCMPassPipelineBody(mod, target))

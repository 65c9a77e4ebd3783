"""Registration: what tilelang_ext puts in place of upstream's ROCm parts, each by name."""

from __future__ import annotations

from pathlib import Path

import tilelang.rocm.op.gemm  # noqa: F401  upstream's registration comes first, ours replaces it
import tvm_ffi
from tilelang.backend.target import TargetLike, register_target_normalizer
from tilelang.rocm.target import normalize_rocm_target, target_is_hip
from tilelang.tileop.gemm.registry import register_gemm_impl
from tvm.target import Target

from tilelang_ext import registration
from tilelang_ext.passes.foreign_calls import naming_unknown
from tilelang_ext.rocm import pipeline
from tilelang_ext.rocm.block_scaled import TAKES_SCALES
from tilelang_ext.rocm.gemm import MfmaGemm, WmmaGemm
from tilelang_ext.rocm.scaled_gemm import ScaledMfmaGemm


def register() -> None:
    """Register the GEMM implementations, the pass list and the target's key for target kind `hip`; idempotent."""
    for implementation, key in ((_mfma_gemm, MfmaGemm.instruction_key), (WmmaGemm, WmmaGemm.instruction_key)):
        register_gemm_impl(key, key, target_is_hip, implementation)
    register_target_normalizer("hip", normalize_target, override=True)
    registration.replace_pass_list("rocm", "hip", pipeline.lower)
    for name in ("tilelang_hip", "tilelang_hip_without_compile"):
        registration.wrap_builder(f"target.build.{name}", pipeline.spell)
        generate = naming_unknown(tvm_ffi.get_global_func(f"target.build.{name}"), "hip")
        tvm_ffi.register_global_func(f"target.build.{name}", generate, override=True)


def _mfma_gemm(gemm_node) -> MfmaGemm:
    return (ScaledMfmaGemm if TAKES_SCALES in gemm_node.annotations else MfmaGemm)(gemm_node)


def lowering_key() -> str:
    """Return the target key that names these GEMM implementations; upstream's may read fp8 in the wrong flavour."""
    return registration.lowering_key(Path(__file__).parent)


def normalize_target(target: TargetLike) -> Target | None:
    """Normalise what a user gives for HIP, as upstream does, and add the key to a target that names its architecture."""
    normalized = normalize_rocm_target(target)
    if normalized is None or "mcpu" not in normalized.attrs:
        return normalized
    return registration.with_key(normalized, lowering_key())

"""Registration: what tilelang_ext puts in place of upstream's CUDA parts, each by name."""

from __future__ import annotations

from pathlib import Path

import tvm_ffi
from tilelang.backend.target import TargetLike, register_target_normalizer
from tilelang.cuda.op.gemm import GEMM_INST_FMA, GEMM_INST_MMA, GEMM_INST_WGMMA
from tilelang.cuda.target import normalize_cuda_target, target_is_cuda, target_is_turing, target_is_volta
from tilelang.tileop.gemm.registry import register_gemm_impl
from tvm.target import Target

from tilelang_ext import registration
from tilelang_ext.cuda import pipeline
from tilelang_ext.cuda.fp8_gemm import Fp8GemmFMA, Fp8GemmMMA, Fp8GemmWGMMA
from tilelang_ext.passes.float_arithmetic import ReleaseFloatArithmetic
from tilelang_ext.passes.hidden_conditions import restore_conditions


def register() -> None:
    """Register the GEMM implementations, the pass list and the target's key; idempotent.

    Without fp8 operands each GEMM is upstream's.
    """
    # What a pass raises comes back through TVM as a RuntimeError, unless its class is registered.
    tvm_ffi.register_error("NotImplementedError", NotImplementedError)
    register_gemm_impl("cuda.mma", GEMM_INST_MMA, _is_ampere_or_later, Fp8GemmMMA)
    register_gemm_impl("cuda.wgmma", GEMM_INST_WGMMA, target_is_cuda, Fp8GemmWGMMA)
    register_gemm_impl("cuda.fma", GEMM_INST_FMA, target_is_cuda, Fp8GemmFMA)
    register_target_normalizer("cuda", normalize_target, override=True)
    registration.replace_pass_list("cuda", "cuda", pipeline.lower)
    for name in ("tilelang_cuda", "tilelang_cuda_without_compile"):
        registration.wrap_builder(f"target.build.{name}", lambda mod: ReleaseFloatArithmetic(restore_conditions(mod)))


def _is_ampere_or_later(target: Target) -> bool:
    return target_is_cuda(target) and not target_is_volta(target) and not target_is_turing(target)


def lowering_key() -> str:
    """Return the target key that names these GEMM implementations."""
    return registration.lowering_key(Path(__file__).parent)


def normalize_target(target: TargetLike) -> Target | None:
    """Normalise what a user gives for CUDA, as upstream does, and add the key to a target that names its architecture."""
    given = normalize_cuda_target(target) or target
    if isinstance(given, dict) and given.get("kind") == "cuda":
        given = Target(given)
    if not isinstance(given, Target) or given.kind.name != "cuda" or "cutedsl" in given.keys or "arch" not in given.attrs:
        return None
    return registration.with_key(given, lowering_key())

"""Registration: what tilelang_ext puts in place of upstream's ROCm parts, each by name."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path

import tilelang.rocm.op.gemm  # noqa: F401  upstream's registration comes first, ours replaces it
from tilelang.backend import module as backend_module
from tilelang.backend.pass_pipeline import PassPipeline
from tilelang.backend.target import TargetLike, register_target_normalizer
from tilelang.rocm.target import normalize_rocm_target, target_is_hip
from tilelang.tileop.gemm.registry import register_gemm_impl
from tvm.target import Target

from tilelang_ext.rocm import pipeline
from tilelang_ext.rocm.block_scaled import TAKES_SCALES
from tilelang_ext.rocm.gemm import MfmaGemm, WmmaGemm
from tilelang_ext.rocm.scaled_gemm import ScaledMfmaGemm


def register() -> None:
    """Register the GEMM implementations, the pass list and the target's key for target kind `hip`; idempotent."""
    for implementation, key in ((_mfma_gemm, MfmaGemm.instruction_key), (WmmaGemm, WmmaGemm.instruction_key)):
        register_gemm_impl(key, key, target_is_hip, implementation)
    register_target_normalizer("hip", normalize_target, override=True)
    _replace_manifest()


def _mfma_gemm(gemm_node) -> MfmaGemm:
    return (ScaledMfmaGemm if TAKES_SCALES in gemm_node.annotations else MfmaGemm)(gemm_node)


@functools.cache
def lowering_key() -> str:
    """Return the target key that names these GEMM implementations: upstream caches a kernel under its target, so that a
    kernel of upstream's, which may read fp8 in the wrong flavour, is never taken for one of ours."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return f"tilelang_ext-{digest.hexdigest()[:12]}"


def normalize_target(target: TargetLike) -> Target | None:
    """Normalise what a user gives for HIP, as upstream does, and add the key to a target that names its architecture."""
    normalized = normalize_rocm_target(target)
    if normalized is None or "mcpu" not in normalized.attrs or lowering_key() in normalized.keys:
        return normalized
    return Target({**normalized.export(), "keys": [*normalized.keys, lowering_key()]})


def _replace_manifest() -> None:
    """Replace the pass list of `hip` in upstream's table, a private touch: there is no hook for it."""
    backends = getattr(backend_module, "_BACKENDS", None)
    if not isinstance(backends, dict) or "rocm" not in backends:
        raise ImportError(
            "tilelang_ext: needs tilelang.backend.module._BACKENDS['rocm'] to replace the pass list; "
            "this tilelang has none; install tilelang 0.1.14 or 0.1.15"
        )
    backends["rocm"] = dataclasses.replace(backends["rocm"], pipelines={"hip": PassPipeline("hip", pipeline.lower)})

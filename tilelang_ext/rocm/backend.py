"""Registration: what tilelang_ext puts in place of upstream's ROCm parts, each by name."""

from __future__ import annotations

import tilelang.rocm.op.gemm  # noqa: F401  upstream's registration comes first, ours replaces it
from tilelang.rocm.target import target_is_hip
from tilelang.tileop.gemm.registry import register_gemm_impl

from tilelang_ext.rocm.gemm import MfmaGemm, WmmaGemm


def register() -> None:
    """Register the GEMM implementations for target kind `hip`; idempotent."""
    for implementation in (MfmaGemm, WmmaGemm):
        key = implementation.instruction_key
        register_gemm_impl(key, key, target_is_hip, implementation)

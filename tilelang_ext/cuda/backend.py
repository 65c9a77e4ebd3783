"""Registration: what tilelang_ext puts in place of upstream's CUDA parts, each by name."""

from __future__ import annotations

import tvm_ffi
from tilelang.cuda.op.gemm import GEMM_INST_FMA, GEMM_INST_MMA, GEMM_INST_WGMMA, _match_fma, _match_mma, _match_wgmma
from tilelang.tileop.gemm.registry import register_gemm_impl

from tilelang_ext.cuda.fp8_gemm import Fp8GemmFMA, Fp8GemmMMA, Fp8GemmWGMMA


def register() -> None:
    """Register the GEMM implementations; idempotent. Without fp8 operands each is upstream's."""
    # What a pass raises comes back through TVM as a RuntimeError, unless its class is registered.
    tvm_ffi.register_error("NotImplementedError", NotImplementedError)
    register_gemm_impl("cuda.mma", GEMM_INST_MMA, _match_mma, Fp8GemmMMA)
    register_gemm_impl("cuda.wgmma", GEMM_INST_WGMMA, _match_wgmma, Fp8GemmWGMMA)
    register_gemm_impl("cuda.fma", GEMM_INST_FMA, _match_fma, Fp8GemmFMA)

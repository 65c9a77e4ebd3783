"""Registration: what tilelang_ext puts in place of upstream's Metal parts, each by name."""

from __future__ import annotations

import dataclasses

import tvm_ffi
from tilelang.backend import module as backend_module
from tilelang.backend.pass_pipeline import PassPipeline
from tilelang.metal.op.gemm import GEMM_INST_METAL, GEMM_INST_METAL_COOPERATIVE_TENSOR
from tilelang.metal.target import target_is_metal
from tilelang.tileop.gemm.registry import register_gemm_impl

from tilelang_ext.metal import pipeline
from tilelang_ext.metal.fragment_to_simdgroup import FragmentGemm
from tilelang_ext.native import load_library


def register() -> None:
    """Register the code generator, the GEMM implementations and the pass list for target kind `metal`; idempotent."""
    load_library()
    build = tvm_ffi.get_global_func("tilelang_ext.build_metal")
    build_without_compile = tvm_ffi.get_global_func("tilelang_ext.build_metal_without_compile")
    tvm_ffi.register_global_func("target.build.tilelang_metal", build, override=True)
    tvm_ffi.register_global_func("target.build.tilelang_metal_without_compile", build_without_compile, override=True)
    for instruction in (GEMM_INST_METAL, GEMM_INST_METAL_COOPERATIVE_TENSOR):
        register_gemm_impl(instruction, instruction, target_is_metal, FragmentGemm)
    _replace_pass_list()


def _replace_pass_list() -> None:
    """Replace the pass list of the `metal` backend: the one private touch, since upstream has no hook for it."""
    backends = getattr(backend_module, "_BACKENDS", None)
    if not isinstance(backends, dict) or "metal" not in backends:
        raise ImportError(
            "tilelang_ext: needs tilelang.backend.module._BACKENDS['metal'] to replace the pass list; "
            "this tilelang has none; install tilelang 0.1.14 or 0.1.15"
        )
    metal = backends["metal"]
    backends["metal"] = dataclasses.replace(metal, pipelines={"metal": PassPipeline("metal", pipeline.lower)})

"""Registration: what tilelang_ext puts in place of upstream's Metal parts, each by name."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
from pathlib import Path

import torch
import tvm_ffi
from tilelang.backend import module as backend_module
from tilelang.backend.pass_pipeline import PassPipeline
from tilelang.backend.target import TargetLike, register_target_normalizer
from tilelang.metal.op.gemm import GEMM_INST_METAL, GEMM_INST_METAL_COOPERATIVE_TENSOR
from tilelang.metal.target import normalize_metal_target, target_is_metal
from tilelang.tileop.gemm.registry import register_gemm_impl
from tvm.target import Target

from tilelang_ext.metal import pipeline
from tilelang_ext.metal.fragment_to_simdgroup import FragmentGemm
from tilelang_ext.native import library_digest, load_library


def register() -> None:
    """Register the code generator, the GEMM implementations and the pass list for target kind `metal`; idempotent."""
    load_library()
    build = tvm_ffi.get_global_func("tilelang_ext.build_metal")
    build_without_compile = tvm_ffi.get_global_func("tilelang_ext.build_metal_without_compile")
    tvm_ffi.register_global_func("target.build.tilelang_metal", build, override=True)
    tvm_ffi.register_global_func("target.build.tilelang_metal_without_compile", build_without_compile, override=True)
    for instruction in (GEMM_INST_METAL, GEMM_INST_METAL_COOPERATIVE_TENSOR):
        register_gemm_impl(instruction, instruction, target_is_metal, FragmentGemm)
    register_target_normalizer("metal", normalize_target, override=True)
    _replace_manifest()


@functools.cache
def code_generator_key() -> str:
    """Return the target key that names this code generator: upstream caches a kernel's text under its target, so that text
    of another version of the library or of the passes is never met."""
    digest = hashlib.sha256(library_digest().encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return f"tilelang_ext-{digest.hexdigest()[:12]}"


def normalize_target(target: TargetLike) -> Target | None:
    """Normalise what a user gives for Metal ("metal", "metal4", a dict or a Target) and add the code generator's key."""
    if target == "metal4":
        target = {"kind": "metal", "keys": ["metal", "gpu", "metal4"]}
    normalized = normalize_metal_target(target)
    if normalized is None or code_generator_key() in normalized.keys:
        return normalized
    description = {**normalized.export(), "keys": [*normalized.keys, code_generator_key()]}
    return Target(description)


def _replace_manifest() -> None:
    """Replace the pass list of the `metal` backend: the one private touch, since upstream has no hook for it.

    Objective-C launch code in the host's C is kept for macOS, the only place that compiles it. The `torch` execution backend
    compiles the text through MPS when a kernel is built; it is declared available only where torch has MPS, so that
    elsewhere `tilelang.compile` gives a kernel whose text can be read and simulated.
    """
    backends = getattr(backend_module, "_BACKENDS", None)
    if not isinstance(backends, dict) or "metal" not in backends:
        raise ImportError(
            "tilelang_ext: needs tilelang.backend.module._BACKENDS['metal'] to replace the pass list; "
            "this tilelang has none; install tilelang 0.1.14 or 0.1.15"
        )
    metal = backends["metal"]
    execution_backends = tuple(
        dataclasses.replace(spec, is_available=torch.backends.mps.is_available) if spec.name == "torch" else spec
        for spec in metal.execution_backends
    )
    hooks = metal.host_codegen_hooks if sys.platform == "darwin" else {}
    backends["metal"] = dataclasses.replace(
        metal,
        pipelines={"metal": PassPipeline("metal", pipeline.lower)},
        execution_backends=execution_backends,
        host_codegen_hooks=hooks,
    )

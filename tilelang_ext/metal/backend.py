"""Registration: what tilelang_ext puts in place of upstream's Metal parts, each by name."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import tvm_ffi
from tilelang.backend.target import TargetLike, register_target_normalizer
from tilelang.metal.op.gemm import GEMM_INST_METAL, GEMM_INST_METAL_COOPERATIVE_TENSOR
from tilelang.metal.target import normalize_metal_target, target_is_metal
from tilelang.tileop.gemm.registry import register_gemm_impl
from tvm.target import Target

from tilelang_ext import registration
from tilelang_ext.metal import pipeline
from tilelang_ext.metal.fragment_to_simdgroup import FragmentGemm
from tilelang_ext.native import library_digest, load_library
from tilelang_ext.passes.foreign_calls import naming_unknown
from tilelang_ext.passes.hidden_conditions import restore_conditions


def register() -> None:
    """Register the code generator, the GEMM implementations and the pass list for target kind `metal`; idempotent."""
    load_library()
    for name in ("metal", "metal_without_compile"):
        build = _restoring(naming_unknown(tvm_ffi.get_global_func(f"tilelang_ext.build_{name}"), "metal"))
        tvm_ffi.register_global_func(f"target.build.tilelang_{name}", build, override=True)
    for instruction in (GEMM_INST_METAL, GEMM_INST_METAL_COOPERATIVE_TENSOR):
        register_gemm_impl(instruction, instruction, target_is_metal, FragmentGemm)
    register_target_normalizer("metal", normalize_target, override=True)
    registration.keep_device_asserts()
    registration.replace_pass_list("metal", "metal", pipeline.lower)
    _restrict_to_this_machine()


def _restoring(build: Callable) -> Callable:
    """Return `build`, a code generator's entry, for modules with hidden conditions."""
    return lambda mod, target: build(restore_conditions(mod), target)


def lowering_key() -> str:
    """Return the target key that names these passes and the native library, which holds the code generator."""
    return registration.lowering_key(Path(__file__).parent, library_digest())


def normalize_target(target: TargetLike) -> Target | None:
    """Normalise what a user gives for Metal ("metal", "metal4", a dict or a Target), as upstream does, and add the key."""
    if target == "metal4":
        target = {"kind": "metal", "keys": ["metal", "gpu", "metal4"]}
    normalized = normalize_metal_target(target)
    return None if normalized is None else registration.with_key(normalized, lowering_key())


def _restrict_to_this_machine() -> None:
    """Declare in upstream's table only what this machine can compile.

    Objective-C launch code in the host's C is kept on macOS, the only system that compiles it. The `torch` execution backend
    compiles the text through MPS when a kernel is built; it is declared available only where torch has MPS, so that
    elsewhere `tilelang.compile` gives a kernel whose text can be read and simulated.
    """
    metal = registration.upstream_backend("metal")
    execution_backends = tuple(
        dataclasses.replace(spec, is_available=torch.backends.mps.is_available) if spec.name == "torch" else spec
        for spec in metal.execution_backends
    )
    hooks = metal.host_codegen_hooks if sys.platform == "darwin" else {}
    registration.replace_backend("metal", {"execution_backends": execution_backends, "host_codegen_hooks": hooks})

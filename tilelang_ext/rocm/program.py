"""A kernel lowered to HIP text as data: for which architecture, how much LDS a launch adds, and which targets there are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import tilelang
from tilelang.rocm.target import target_get_mcpu, with_rocm_target_attrs
from tvm import IRModule, tirx
from tvm.ir.instrument import pass_instrument
from tvm.ir.transform import PassContext
from tvm.target import Target

from tilelang_ext.program import Program, only_kernel, parameter_sources, prim_func_of, read_program


@dataclass(frozen=True)
class HipProgram(Program):
    """A prim_func lowered to HIP text for one architecture, such as "gfx942"; `dynamic_lds` is in bytes per block."""

    arch: str
    dynamic_lds: int

    def get_kernel_source(self) -> str:
        """Return the whole text."""
        return self.source


def hip_target(target: str | Target | Mapping) -> Target:
    """Return the target of an architecture: "hip -mcpu=gfx942", tilelang's dict or a Target; no device is asked."""
    if isinstance(target, str):
        match = re.fullmatch(r"hip\s+-+mcpu[=\s](gfx\w+)", target.strip())
        target = {"kind": "hip", "mcpu": match[1]} if match else target
    if not isinstance(target, str):
        target = target if isinstance(target, Target) else Target(dict(target))
        if target.kind.name == "hip" and target_get_mcpu(target) is not None:
            return with_rocm_target_attrs(target)
    raise ValueError(f'hip_target: must name an architecture; got {target}; pass "hip -mcpu=gfx942", or another mcpu')


def as_program(kernel, target: str | Target | Mapping) -> HipProgram:
    """Return the HIP program of a prim_func or of a compiled tilelang kernel; a program is returned as it is."""
    return kernel if isinstance(kernel, HipProgram) else lower(prim_func_of(kernel, "HipProgram"), target)


def lower(func: tirx.PrimFunc, target: str | Target | Mapping) -> HipProgram:
    """Lower one prim_func with one `T.Kernel` to HIP text; no GPU, ROCm or HIP compiler is needed."""
    target, split = hip_target(target), _AfterSplit()
    with target, split.context():
        artifact = tilelang.lower(func, target=target)
    kernel = only_kernel(artifact.device_mod, "rocm.lower")
    sources = parameter_sources(split.module)[str(kernel.attrs["global_symbol"])]
    return HipProgram(
        **vars(read_program(func, kernel, artifact.kernel_source, sources)),
        arch=target_get_mcpu(target),
        dynamic_lds=int(kernel.attrs.get("dyn_shared_memory_buf", 0)),
    )


@pass_instrument
class _AfterSplit:
    """Keeps the module as upstream's pass list has it right after SplitHostDevice, for `parameter_sources`."""

    def __init__(self) -> None:
        self.module: IRModule | None = None

    def run_after_pass(self, mod: IRModule, info) -> None:
        if info.name == "tl.SplitHostDevice":
            self.module = mod

    def context(self) -> PassContext:
        """Return the caller's pass context with this instrument."""
        current = PassContext.current()
        return PassContext(
            current.opt_level,
            required_pass=list(current.required_pass),
            disabled_pass=list(current.disabled_pass),
            instruments=[*(current.instruments or []), self],
            config=dict(current.config),
        )

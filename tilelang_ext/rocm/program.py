"""A function lowered to HIP text as data: for which architecture, and which targets there are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from tilelang.rocm.target import target_get_mcpu, with_rocm_target_attrs
from tvm.target import Target

from tilelang_ext.program import Program, function_of, lower_function


@dataclass(frozen=True)
class HipProgram(Program):
    """A prim_func lowered to HIP text for one architecture, such as "gfx942"."""

    arch: str

    @property
    def dynamic_lds(self) -> int:
        """Bytes of LDS per block that the launch of the first kernel adds."""
        return self.kernels[0].dynamic_shared_bytes

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


def as_program(kernel, target: str | Target | Mapping, arguments: tuple = ()) -> HipProgram:
    """Return the HIP program of what a user calls a kernel; a program is returned as it is."""
    return kernel if isinstance(kernel, HipProgram) else lower(kernel, target, *arguments)


def lower(kernel, target: str | Target | Mapping, *arguments) -> HipProgram:
    """Lower a kernel to HIP text; no GPU, ROCm or HIP compiler is needed.

    `kernel` is a prim_func, a compiled tilelang kernel or a `@tilelang.jit` function, which takes the `arguments` of one call.
    Each `T.Kernel` in it becomes a kernel of the text, and a launch of its own.
    """
    func, target = function_of(kernel, "HipProgram", arguments), hip_target(target)
    with target:
        return HipProgram(**lower_function(func, target, kernel=kernel), arch=target_get_mcpu(target))

"""A kernel lowered to Metal text as data: how its scalars are passed, and which targets there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tilelang
from tvm import tirx
from tvm.target import Target

from tilelang_ext.metal.parameter_order import sources_of
from tilelang_ext.program import Program, only_kernel, pack_scalar, prim_func_of, read_program

_SLOT_BYTES = 8


@dataclass(frozen=True)
class MetalProgram(Program):
    """A prim_func lowered to Metal text, ready for torch, MLX or the simulator.

    `bindings` are in [[buffer(i)]] order: tensors have one buffer each, and all scalars share one struct after them.
    """

    def get_kernel_source(self, kernel_only: bool = True) -> str:
        """Return the kernel's text, with `kernel_only=False` the includes, helpers and argument struct too."""
        start = self.source.find("kernel void ") if kernel_only else 0
        return self.source[max(start, 0) :]

    def slots(self, numbers: Sequence[int | float]) -> bytes:
        """Return the bytes of the struct of scalars for the kernel's `numbers`: 8 bytes per number, empty without one."""
        dtypes = [str(binding.var.dtype) for binding in self.bindings if not binding.is_tensor]
        packed = [pack_scalar(number, dtype) for number, dtype in zip(numbers, dtypes, strict=True)]
        return b"".join(scalar.ljust(_SLOT_BYTES, b"\0") for scalar in packed)


def as_program(kernel, target: str | Target = "metal") -> MetalProgram:
    """Return the Metal program of a prim_func or of a compiled tilelang kernel; a program is returned as it is."""
    return kernel if isinstance(kernel, MetalProgram) else lower(prim_func_of(kernel, "MetalProgram"), target)


def lower(func: tirx.PrimFunc, target: str | Target = "metal") -> MetalProgram:
    """Lower one prim_func with one `T.Kernel` to Metal text; no Mac, GPU or Metal compiler is needed."""
    artifact = tilelang.lower(func, target=metal_target(target))
    kernel = only_kernel(artifact.device_mod, "metal.lower")
    return MetalProgram(**vars(read_program(func, kernel, artifact.kernel_source, sources_of(kernel))))


def metal_target(target: str | Target) -> Target | dict:
    """Return the target for "metal" (simdgroup matrices), "metal4" (tensor operations too) or a Target; no device is asked."""
    if isinstance(target, Target):
        return target
    if target not in ("metal", "metal4"):
        raise ValueError(f'metal.lower: target must be "metal", "metal4" or a Target; got {target!r}; pass one of these')
    return {"kind": "metal", "keys": ["metal", "gpu", "metal4"] if target == "metal4" else ["metal", "gpu"]}

"""A function lowered to Metal text as data: how its scalars are passed, and which targets there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.target import Target

from tilelang_ext.metal.parameter_order import in_order
from tilelang_ext.program import Kernel, Program, function_of, lower_function, pack_scalar

_SLOT_BYTES = 8


@dataclass(frozen=True)
class MetalProgram(Program):
    """A prim_func lowered to Metal text, ready for torch, MLX or the simulator.

    The bindings of each kernel are in [[buffer(i)]] order: tensors have one buffer each, and all scalars share one struct
    after them.
    """

    def get_kernel_source(self, kernel_only: bool = True) -> str:
        """Return the kernels' text, with `kernel_only=False` the includes, helpers and argument structs too."""
        start = self.source.find("kernel void ") if kernel_only else 0
        return self.source[max(start, 0) :]


def slots(kernel: Kernel, numbers: Sequence[int | float]) -> bytes:
    """Return the bytes of the struct of scalars for a kernel's `numbers`: 8 bytes per number, empty without one."""
    dtypes = [str(binding.var.dtype) for binding in kernel.bindings if not binding.is_tensor]
    packed = [pack_scalar(number, dtype) for number, dtype in zip(numbers, dtypes, strict=True)]
    return b"".join(scalar.ljust(_SLOT_BYTES, b"\0") for scalar in packed)


def as_program(kernel, target: str | Target = "metal", arguments: tuple = ()) -> MetalProgram:
    """Return the Metal program of what a user calls a kernel; a program is returned as it is."""
    return kernel if isinstance(kernel, MetalProgram) else lower(kernel, target, *arguments)


def lower(kernel, target: str | Target = "metal", *arguments) -> MetalProgram:
    """Lower a kernel to Metal text; no Mac, GPU or Metal compiler is needed.

    `kernel` is a prim_func, a compiled tilelang kernel or a `@tilelang.jit` function, which takes the `arguments` of one call.
    Each `T.Kernel` in it becomes a kernel of the text, and a launch of its own.
    """
    func = function_of(kernel, "MetalProgram", arguments)
    return MetalProgram(**lower_function(func, metal_target(target), in_order, kernel))


def metal_target(target: str | Target) -> Target | dict:
    """Return the target for "metal" (simdgroup matrices), "metal4" (tensor operations too) or a Target; no device is asked."""
    if isinstance(target, Target):
        return target
    if target not in ("metal", "metal4"):
        raise ValueError(f'metal.lower: target must be "metal", "metal4" or a Target; got {target!r}; pass one of these')
    return {"kind": "metal", "keys": ["metal", "gpu", "metal4"] if target == "metal4" else ["metal", "gpu"]}

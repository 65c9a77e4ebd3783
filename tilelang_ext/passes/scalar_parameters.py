"""Scalar parameters have a type that a host passes by value."""

from __future__ import annotations

from tvm import IRModule, tirx

_PASSED = ("handle", "bool", "int", "uint", "float16", "float32", "float64")


def refuse_narrow_scalars(mod: IRModule) -> IRModule:
    """Return `mod`; TypeError for a scalar parameter of bfloat16, fp8 or fp4, for which upstream's host code has no way."""
    for func in mod.functions.values():
        for param in func.params if isinstance(func, tirx.PrimFunc) else ():
            if param in func.buffer_map or str(param.dtype).startswith(_PASSED):
                continue
            raise TypeError(
                f"{param.name}: a scalar parameter must be a bool, an integer, float16, float32 or float64; got {param.dtype}; "
                f'declare it as T.float32, and write T.cast({param.name}, "{param.dtype}")'
            )
    return mod

"""Constants of which a generator prints too few digits, as what it prints in full.

    Before  float32(0.1234567890)          printed as 1.234568e-01f, another number
    After   by its bits, or as an integer times a power of two

A float32 takes nine digits to be told from its neighbours and a float64 seventeen; TVM's generators of C print seven. Runs
where text is generated.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

from tvm import IRModule, tirx

from tilelang_ext.passes.rewrite import rewritten

_FORMATS = {"float32": ("<f", "<I", "uint32"), "float64": ("<d", "<Q", "uint64")}
_MANTISSA_BITS = {"float32": 24, "float64": 53}

Spelling = Callable[[tirx.FloatImm], tirx.PrimExpr]


def is_printed(constant: tirx.FloatImm) -> bool:
    """Whether seven digits are enough for a constant of float32 or float64; constants of other types are not asked about."""
    dtype = str(constant.dtype)
    if dtype not in _FORMATS or not math.isfinite(constant.value):
        return True
    code = _FORMATS[dtype][0]
    return struct.pack(code, float(f"{constant.value:.6e}")) == struct.pack(code, constant.value)


def by_bits(constant: tirx.FloatImm) -> tirx.PrimExpr:
    """Return the constant as the bits of an integer."""
    code, integer_code, integer = _FORMATS[str(constant.dtype)]
    (bits,) = struct.unpack(integer_code, struct.pack(code, constant.value))
    if integer == "uint64" and bits >> 63:  # more than an IntImm holds: the sign by itself
        return tirx.const(0.0, "float64") - by_bits(tirx.FloatImm("float64", -constant.value))
    return tirx.reinterpret(constant.dtype, tirx.IntImm(integer, bits))


def by_ldexp(constant: tirx.FloatImm) -> tirx.PrimExpr:
    """Return the constant as ldexp of two integers, for a generator of C that has no bits of a constant."""
    dtype = str(constant.dtype)
    (value,) = struct.unpack(_FORMATS[dtype][0], struct.pack(_FORMATS[dtype][0], constant.value))
    fraction, exponent = math.frexp(value)
    bits = _MANTISSA_BITS[dtype]
    significand = tirx.Cast(dtype, tirx.IntImm("int64", int(math.ldexp(fraction, bits))))
    return tirx.call_pure_extern(dtype, "ldexpf" if dtype == "float32" else "ldexp", significand, tirx.const(exponent - bits))


def SpellFloatConstants(mod: IRModule, spell: Spelling) -> IRModule:
    """Put `spell(constant)` for each constant of `mod` that is not printed in full."""

    def rewrite(node):
        return None if is_printed(node) else spell(node)

    functions = {name: func.with_body(rewritten(func.body, rewrite, ["ir.FloatImm"])) for name, func in mod.functions_items()}
    return IRModule(functions, attrs=mod.attrs)

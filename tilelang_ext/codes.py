"""Codes of narrow floats from float32 bits and back, as TIR in integers: casts of targets differ in flavour and saturation.

There are no conditions, since the simplifier takes minutes for a few nested ones; `mask(x)` selects by the sign instead.
"""

from __future__ import annotations

import math
import struct

import tilelang.language as T
from tvm import tirx

from tilelang_ext.formats import E8M0, FloatFormat

MANTISSA_BITS = 23  # of float32
BIAS = 127
INF = 0xFF << MANTISSA_BITS


def bits_of(value: float) -> int:
    """Return the bits of a number as float32."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def mask(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return -1, all bits, where the int32 `x` is negative and 0 elsewhere."""
    return x >> 31


def encode(magnitude: tirx.PrimExpr, negative: tirx.PrimExpr, format: FloatFormat) -> tirx.PrimExpr:
    """Return the code nearest to a float32, as int32: ties to even, saturating; NaN becomes the format's NaN where it has one.

    `magnitude` is the float's bits without its sign, as int32; `negative` is int32 0 or 1. The format must have a negative zero
    and subnormals: E4M3, E5M2 or E2M1.
    """
    dropped = MANTISSA_BITS - format.mantissa_bits
    smallest_normal = bits_of(math.ldexp(1.0, 1 - format.bias))
    finite = T.min(magnitude, INF)
    rounded = finite + ((1 << (dropped - 1)) - 1) + ((finite >> dropped) & 1)
    normal = (rounded >> dropped) - ((BIAS - format.bias) << format.mantissa_bits)
    # The last place of this sum is worth the format's smallest subnormal, so the addition rounds and the low bits are the code.
    unit = math.ldexp(1.0, MANTISSA_BITS + 1 - format.bias - format.mantissa_bits)
    small = T.reinterpret(T.min(finite, smallest_normal), "float32")
    subnormal = T.reinterpret(small + T.float32(unit), "int32") - bits_of(unit)
    # Codes of normals grow as the logarithm, which lies below its tangent: under the smallest normal `subnormal` is larger.
    code = T.min(T.max(normal, subnormal), format.values.index(format.max))
    if format.nan_codes:
        code = code | (mask(INF - magnitude) & format.nan_codes[0])
    return code | (negative * format.sign_mask)


def decode(code: tirx.PrimExpr, format: FloatFormat) -> tirx.PrimExpr:
    """Return the value of an fp8 or E2M1 code (uint8) as float32, exactly; an AMD cast reads OCP bytes as FNUZ, or fails to
    compile."""
    byte = T.cast(code, "int32")
    magnitude = byte & (format.sign_mask - 1)
    is_subnormal = mask(magnitude - (1 << format.mantissa_bits))
    smallest = T.reinterpret(T.cast(magnitude, "float32") * T.float32(format.smallest), "int32")
    normal = (magnitude << (MANTISSA_BITS - format.mantissa_bits)) + ((BIAS - format.bias) << MANTISSA_BITS)
    bits = (smallest & is_subnormal) | (normal & ~is_subnormal)
    if format.has_negative_zero:
        bits = bits | (mask(format.values.index(format.max) - magnitude) & INF)  # NaN, or Inf where the mantissa is 0
    else:
        bits = bits | (mask((byte ^ format.nan_codes[0]) - 1) & bits_of(math.nan))
    return T.reinterpret(T.cast(bits, "uint32") | (T.cast(byte >> (format.bits - 1), "uint32") << T.uint32(31)), "float32")


def power_of_two(code: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return the value of an E8M0 code (uint32) as float32: byte 0 is 2^-127, which is subnormal, and byte 255 is NaN.

    The value is built from its bits, since an exp2 could flush the smallest scale to zero.
    """
    smallest = bits_of(math.ldexp(1.0, -E8M0.bias))
    bits = T.max(code << T.uint32(MANTISSA_BITS), T.uint32(smallest)) | (is_last(code) << T.uint32(MANTISSA_BITS - 1))
    return T.reinterpret(bits, "float32")


def is_last(code: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return 1 where a uint32 is 255, the NaN of E8M0, else 0; no condition, which may become one branch per scale."""
    return (code + T.uint32(1)) >> T.uint32(E8M0.bits)

"""`T.mxfp4_dequant`: decode MXFP4 weights.

    out[j, k] = decode(W[j, k]) * 2^(scale[j, k // 32] - 127)

| operand | shape | dtype | scope |
| --- | --- | --- | --- |
| W_packed | (N, K / 2), low nibble = even k | uint8 | any |
| scale | (N, K / 32), or None for 1 | uint8 or e8m0 | any |
| out | (N, K) | bfloat16, float16, float8_e4m3fn, float32 | fragment, shared, global |

Each may be a buffer or a region of one.
"""

from __future__ import annotations

import math

import tilelang.language as T
from tilelang.utils.language import to_buffer_region
from tvm import tirx

from tilelang_ext.codes import INF, bits_of, encode, mask
from tilelang_ext.formats import CODES_PER_BYTE, E2M1, E4M3, E8M0, MX_GROUP
from tilelang_ext.language.tile import Tile, readable, tile
from tilelang_ext.marks import MXFP4_DEQUANT, READ_ONCE

_NAME = "T.mxfp4_dequant"
_OUT_DTYPES = ("bfloat16", "float16", "float8_e4m3fn", "float32")
SCALE_DTYPES = ("uint8", E8M0.dtype)


def mxfp4_dequant(W_packed, scale, out) -> None:
    """Write the values of packed MXFP4 weights to `out`.

    float32 and bfloat16 are exact, subnormals included; past the largest number the result is Inf, and scale byte 255 gives
    NaN. float16 is that value rounded to nearest even (exact for scale bytes 104 to 140). float8_e4m3fn is rounded likewise
    and saturated at 448 (exact for scale bytes 119 to 133). Without scales every value is exact in each dtype.

    Raises TypeError for dtypes and scopes, ValueError for shapes. Format: OCP Microscaling Formats (MX) 1.0.
    """
    w, o = tile(_NAME, "W_packed", W_packed), tile(_NAME, "out", out)
    w.check_dtype("uint8", hint="pack two codes per byte, low nibble first")
    o.check_dtype(*_OUT_DTYPES, hint="cast what one of these gives")
    o.check_scope("fragment", "shared", "global")
    o.check_constant()
    N, K = o.shape
    if (K % MX_GROUP and scale is not None) or K % CODES_PER_BYTE:
        raise ValueError(f"{_NAME}: K must be a multiple of {MX_GROUP}, which share a scale; got {K}; pad K with zeros")
    w.check_shape(N, K // CODES_PER_BYTE, hint="slice the weights as out is, two codes per byte")
    s = None if scale is None else scale_tile(_NAME, "scale", scale, N, K)

    regions = [None if each is None else to_buffer_region(each.columns(0, each.shape[1])) for each in (w, s, o)]

    @T.macro
    def dequant():
        w_read, s_read = readable(w), None if s is None else readable(s)
        for j, k in T.Parallel(N, K, annotations={MXFP4_DEQUANT: regions, READ_ONCE: 1}):
            o.buffer[o.index(j, k)] = mxfp4_value(w_read, s_read, j, k, o.dtype)

    dequant()


def scale_tile(intrinsic: str, name: str, scale, rows: int, K) -> Tile:
    """Return the checked tile of E8M0 scales of an operand (rows, K): one per row and 32 of K."""
    s = tile(intrinsic, name, scale)
    s.check_dtype(*SCALE_DTYPES, hint="MX scales are bytes of E8M0")
    s.check_shape(rows, K // MX_GROUP, hint="slice the scales as the operand is sliced, one per row and 32 of K")
    return s


def mxfp4_value(w: Tile, s: Tile | None, j, k, dtype: str) -> tirx.PrimExpr:
    """Return element (j, k) of packed weights times its scale (1 if `s` is None) as an expression of `dtype`."""
    byte = T.cast(w[j, k // CODES_PER_BYTE], "int32")
    nibble = (byte >> (k % CODES_PER_BYTE * E2M1.bits)) & 0xF
    scale = T.int32(E8M0.bias) if s is None else scale_byte(s[j, k // MX_GROUP])
    magnitude, negative = _float32_bits(nibble, scale), nibble >> 3
    if dtype == E4M3.dtype:
        return T.reinterpret(T.cast(encode(magnitude, negative, E4M3), "uint8"), dtype)
    bits = T.cast(magnitude, "uint32") | (T.cast(negative, "uint32") << T.uint32(31))
    if dtype == "bfloat16":
        return T.reinterpret(T.cast(bits >> T.uint32(16), "uint16"), dtype)
    return T.cast(T.reinterpret(bits, "float32"), dtype)


def scale_byte(value: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return the byte of an E8M0 scale as int32."""
    return T.cast(value if str(value.dtype) == "uint8" else T.reinterpret(value, "uint8"), "int32")


def _float32_bits(nibble: tirx.PrimExpr, scale: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return the magnitude of one value as the bits of a float32, in an int32; a device may flush float subnormals.

    `field` is the exponent and the first mantissa bit of the result, two steps per binade: 2 * scale + code - 2, except at
    code 1 (0.5). Below 2 the result is subnormal. Its bits are then in units of 2^21, and three numbers occur: 1 (2^-128),
    2 (2^-127) and 3 (1.5 * 2^-127).
    """
    code = nibble & 7
    field = scale * 2 + code - 2 + mask((code ^ 1) - 1)
    units = T.min(T.max(T.max(field * 2, field + 2), 1), INF >> 21) & ~mask(code - 1)
    is_nan = (scale + 1) >> 8  # 1 at byte 255
    return (units | (is_nan * (bits_of(math.nan) >> 21))) << 21

"""`T.mx_quantize`: a tile as MX codes with one power-of-two scale per 32 elements along its last axis.

    scale[i, g] = 2^ceil(log2(amax of group g / largest code));  out[i, k] = X[i, k] / scale[i, k // 32], ties to even

| operand | shape | dtype | scope |
| --- | --- | --- | --- |
| X | (M, K) | float32, float16, bfloat16 | any |
| out | (M, K / 2), low nibble = even k, of mxfp4; (M, K) of mxfp8 | uint8; float8_e4m3fn or uint8 | fragment, shared, global |
| scale | (M, K / 32) | uint8 or e8m0 | fragment, shared, global |

Each may be a buffer or a region of one. An X in a fragment goes through shared memory (M * K elements of it).
"""

from __future__ import annotations

import tilelang.language as T
from tvm import tirx

from tilelang_ext.codes import BIAS, INF, MANTISSA_BITS, bits_of, encode, mask
from tilelang_ext.formats import CODES_PER_BYTE, E2M1, E4M3, E8M0, E8M0_ONE, MX_GROUP, FloatFormat
from tilelang_ext.language.mxfp4_dequant import SCALE_DTYPES, scale_byte
from tilelang_ext.language.tile import Tile, readable, tile

_NAME = "T.mx_quantize"
_FORMATS = {"mxfp4": E2M1, "mxfp8": E4M3}


def mx_quantize(X, out, scale, format: str = "mxfp4") -> None:
    """Write the codes and scales of X, bit for bit those of `quantization.quantize` with its default rounding.

    Nothing saturates. A group of zeros gets scale byte 127; a group with a NaN or an infinity gets the scale NaN (255), which
    the host refuses. K is a multiple of 32.

    Raises TypeError for dtypes and scopes, ValueError for shapes and formats. Format: OCP Microscaling Formats (MX) 1.0.
    """
    if format not in _FORMATS:
        raise ValueError(f"{_NAME}: format must be 'mxfp4' or 'mxfp8'; got {format!r}; pick one")
    x, o, s = tile(_NAME, "X", X), tile(_NAME, "out", out), tile(_NAME, "scale", scale)
    x.check_dtype("float32", "float16", "bfloat16", hint="cast it")
    o.check_dtype(*(("uint8",) if format == "mxfp4" else (E4M3.dtype, "uint8")), hint="codes are bytes")
    s.check_dtype(*SCALE_DTYPES, hint="MX scales are bytes of E8M0")
    for each in (o, s):
        each.check_scope("fragment", "shared", "global")
    x.check_constant()
    M, K = x.shape
    if K % MX_GROUP:
        raise ValueError(f"{_NAME}: K must be a multiple of {MX_GROUP}, which share a scale; got {K}; pad K with zeros")
    codes = K // CODES_PER_BYTE if format == "mxfp4" else K
    o.check_shape(M, codes, hint="two codes per byte in mxfp4, one in mxfp8")
    s.check_shape(M, K // MX_GROUP, hint="one scale per row and 32 of K")
    element = _FORMATS[format]

    @T.macro
    def quantize():
        source = readable(x)
        amax = T.alloc_fragment((M, K // MX_GROUP), "int32")
        scale_s = T.alloc_shared((M, K // MX_GROUP), "uint8")
        T.clear(amax)
        for e in T.serial(MX_GROUP):
            for i, g in T.Parallel(M, K // MX_GROUP):
                amax[i, g] = T.max(amax[i, g], _magnitude(source, i, g * MX_GROUP + e))
        for i, g in T.Parallel(M, K // MX_GROUP):
            scale_s[i, g] = _scale_of(amax[i, g], element)
        for i, g in T.Parallel(M, K // MX_GROUP):
            s.buffer[s.index(i, g)] = scale_s[i, g] if s.dtype == "uint8" else T.reinterpret(scale_s[i, g], s.dtype)
        for i, k in T.Parallel(M, codes):
            if format == "mxfp4":
                low, high = (
                    _code(source, i, k * CODES_PER_BYTE + n, scale_s[i, k * CODES_PER_BYTE // MX_GROUP], element)
                    for n in (0, 1)
                )
                o.buffer[o.index(i, k)] = T.cast(low | (high << E2M1.bits), "uint8")
            else:
                code = T.cast(_code(source, i, k, scale_s[i, k // MX_GROUP], element), "uint8")
                o.buffer[o.index(i, k)] = code if o.dtype == "uint8" else T.reinterpret(code, o.dtype)

    quantize()


def _bits(x: Tile, i, k) -> tirx.PrimExpr:
    return T.reinterpret(T.cast(x[i, k], "float32"), "int32")


def _magnitude(x: Tile, i, k) -> tirx.PrimExpr:
    """Return |x| as bits. They are ordered as the numbers are, with NaN above all, and no subnormal is flushed."""
    return _bits(x, i, k) & 0x7FFFFFFF


def _scale_of(amax: tirx.PrimExpr, format: FloatFormat) -> tirx.PrimExpr:
    """Return the byte of 2^ceil(log2(amax / max of format)), as `quantization.choose_e8m0` does; amax is given as bits."""
    mantissa = (1 << MANTISSA_BITS) - 1
    above = mask((bits_of(format.max) & mantissa) - (amax & mantissa))  # -1 or 0
    byte = T.max((amax >> MANTISSA_BITS) - format.max_exponent - above, 0)
    byte = byte | (mask(amax - 1) & E8M0_ONE) | (mask(INF - 1 - amax) & E8M0.nan_codes[0])
    return T.cast(byte, "uint8")


def _code(x: Tile, i, k, scale: tirx.PrimExpr, format: FloatFormat) -> tirx.PrimExpr:
    """Return the code of x / scale: the scale is subtracted from the exponent, which subnormals get by integer conversion."""
    magnitude = _magnitude(x, i, k)
    units = T.reinterpret(T.cast(magnitude, "float32"), "int32") - ((BIAS + MANTISSA_BITS - 1) << MANTISSA_BITS)
    is_subnormal = mask(magnitude - (1 << MANTISSA_BITS))
    extended = (units & is_subnormal) | (magnitude & ~is_subnormal)
    quotient = T.max(extended - ((scale_byte(scale) - BIAS) << MANTISSA_BITS), 0)
    return encode(quotient, mask(_bits(x, i, k)) & 1, format)

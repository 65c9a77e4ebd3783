"""`T.e8m0_to_float`: the power of two that an E8M0 byte encodes."""

from __future__ import annotations

import tilelang.language as T
from tvm import tirx

from tilelang_ext.formats import E8M0

_MANTISSA_BITS = 23  # of float32
_SMALLEST = 1 << (_MANTISSA_BITS - 1)  # bits of 2^-127, which is subnormal


def e8m0_to_float(byte: tirx.PrimExpr, *, zero_sentinel: bool = False) -> tirx.PrimExpr:
    """Return 2^(byte - 127) as a float32 expression; byte 0 is 2^-127 and byte 255 is NaN.

    `byte` is a uint8 or e8m0 expression. With `zero_sentinel` bytes 0 and 255 are 0, as some producers write it. The
    value is built from its bits, since an exp2 could flush the smallest scale to zero.

    Raises TypeError for other dtypes.
    """
    dtype = str(byte.dtype)
    if dtype not in ("uint8", E8M0.dtype):
        raise TypeError(f"T.e8m0_to_float: byte must be uint8 or {E8M0.dtype}; got {dtype}; pass the stored byte")
    code = T.cast(byte if dtype == "uint8" else T.reinterpret(byte, "uint8"), "uint32")
    bits = code << T.uint32(_MANTISSA_BITS)
    is_last = (code + T.uint32(1)) >> T.uint32(8)  # 1 or 0; arithmetic, since a condition may become one branch per scale
    if zero_sentinel:
        bits = bits & (is_last - T.uint32(1))
    else:
        bits = T.max(bits, T.uint32(_SMALLEST)) | (is_last << T.uint32(_MANTISSA_BITS - 1))
    return T.reinterpret(bits, "float32")

"""`T.e8m0_to_float`: the power of two that an E8M0 byte encodes."""

from __future__ import annotations

import tilelang.language as T
from tvm import tirx

from tilelang_ext.codes import MANTISSA_BITS, is_last, power_of_two
from tilelang_ext.formats import E8M0


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
    if not zero_sentinel:
        return power_of_two(code)
    bits = code << T.uint32(MANTISSA_BITS)
    return T.reinterpret(bits & (is_last(code) - T.uint32(1)), "float32")

"""Activations of the mixture of experts, in 16, 8 or 4 bits: how they are stored, quantised, and read as tiles.

| kind | codes, of K = 32 * groups | scale |
| --- | --- | --- |
| bfloat16, float16 | (rows, groups, 32) of that dtype | none |
| fp8 | (rows, groups, 32) uint8, bits of E4M3 | (rows,) float32 |
| mxfp8 | (rows, groups, 32) uint8, bits of E4M3 | (rows, groups) uint8, E8M0 |
| mxfp4 | (rows, groups, 16) uint8, low nibble = even k | (rows, groups) uint8, E8M0 |

Codes and scales are those of `quantization.quantize`, bit for bit, on every target. A group (of fp8 a row) with a NaN or an
infinity gets the scale NaN. Products take 16-bit tiles: bfloat16 holds every scaled code, and the scale of a row multiplies
the sum.
"""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import math

from tilelang_ext import language as T
from tilelang_ext.formats import CODES_PER_BYTE, E4M3, MX_GROUP
from tilelang_ext.language.mxfp4_dequant import mxfp4_value
from tilelang_ext.language.narrow_floats import BIAS, INF, MANTISSA_BITS, bits_of, decode, encode, mask
from tilelang_ext.language.tile import tile

_NAME = "mxfp4_moe"
WIDE = ("bfloat16", "float16")
KINDS = (*WIDE, "fp8", "mxfp8", "mxfp4")
_GROUPS = 64  # that a block of `quantize_groups` takes
_COLUMNS = 256  # of a row that a step of `quantize_rows` takes
_FRACTION = (1 << MANTISSA_BITS) - 1
_ONE = 1 << MANTISSA_BITS


def between(kind: str) -> str:
    """Return the kind that the products' hidden rows have: a block of stage 1 sees 32 neighbours of a row, never all of it."""
    return "mxfp8" if kind == "fp8" else kind


def tile_dtype(kind: str) -> str:
    """Return the dtype of the tiles that a product takes."""
    return kind if kind in WIDE else "bfloat16"


def group_bytes(kind: str) -> int:
    """Return how many entries of codes hold 32 elements."""
    return MX_GROUP // CODES_PER_BYTE if kind == "mxfp4" else MX_GROUP


def codes_dtype(kind: str) -> str:
    """Return the dtype of codes in the kernels."""
    return kind if kind in WIDE else "uint8"


def tensors(kind: str, rows, groups) -> tuple:
    """Return the types of codes and scale (None of 16 bits) in a prim_func."""
    codes = T.Tensor((rows, groups, group_bytes(kind)), codes_dtype(kind))
    if kind in WIDE:
        return codes, None
    return codes, T.Tensor((rows,), "float32") if kind == "fp8" else T.Tensor((rows, groups), "uint8")


# --- quantisation ----------------------------------------------------------------------------------------------------


def quantize_groups(kind: str, dtype: str):
    """The prim_func of mxfp8 and mxfp4: (x, codes, scale): x (groups, 32) of `dtype`, all groups of all rows in one list."""
    n = T.dynamic("n")

    @T.prim_func
    def quantize_groups(
        x: T.Tensor((n, MX_GROUP), dtype),
        codes: T.Tensor((n, group_bytes(kind)), "uint8"),
        scale: T.Tensor((n, 1), "uint8"),
    ):
        with T.Kernel(T.ceildiv(n, _GROUPS), threads=128) as bx:
            first = bx * _GROUPS
            part = (slice(first, first + _GROUPS), slice(None))
            T.mx_quantize(x[part], codes[part], scale[part], format=kind)

    return quantize_groups


def quantize_rows(dtype: str):
    """The prim_func of fp8: (x, codes, scale), x (rows, groups, 32) of `dtype`.

    scale = float32(amax / 448), at least the smallest normal, 1 for a row of zeros. Quotients are taken in integers with a bit
    for what is left: a target's division may be off in its last place, and a tie is not to be told from its neighbours then.
    """
    rows, groups = T.dynamic("rows"), T.dynamic("groups")

    @T.prim_func
    def quantize_rows(
        x: T.Tensor((rows, groups, MX_GROUP), dtype),
        codes: T.Tensor((rows, groups, MX_GROUP), "uint8"),
        scale: T.Tensor((rows,), "float32"),
    ):
        with T.Kernel(rows, threads=128) as row:
            amax_f = T.alloc_fragment((1, _COLUMNS), "int32")
            row_amax_f = T.alloc_fragment((1,), "int32")
            scale_s = T.alloc_shared((1,), "int32")
            T.clear(amax_f)
            for step in T.serial(T.ceildiv(groups * MX_GROUP, _COLUMNS)):
                for i, j in T.Parallel(1, _COLUMNS):
                    value = x[row, step * (_COLUMNS // MX_GROUP) + j // MX_GROUP, j % MX_GROUP]
                    amax_f[i, j] = T.max(amax_f[i, j], _bits(value) & 0x7FFFFFFF)
            T.reduce_max(amax_f, row_amax_f, dim=1)
            for i in T.Parallel(1):
                scale_s[i] = _row_scale(row_amax_f[i])
                scale[row] = T.reinterpret(scale_s[i], "float32")
            for step in T.serial(T.ceildiv(groups * MX_GROUP, _COLUMNS)):
                for j in T.Parallel(_COLUMNS):
                    group = step * (_COLUMNS // MX_GROUP) + j // MX_GROUP
                    if group < groups:
                        codes[row, group, j % MX_GROUP] = _row_code(_bits(x[row, group, j % MX_GROUP]), scale_s[0])

    return quantize_rows


def _bits(value):
    return T.reinterpret(T.cast(value, "float32"), "int32")


def _normalized(magnitude):
    """Return the bits with the exponent going on below 0 where the number is subnormal."""
    units = T.reinterpret(T.cast(magnitude, "float32"), "int32") - ((BIAS + MANTISSA_BITS - 1) << MANTISSA_BITS)
    is_subnormal = mask(magnitude - _ONE)
    return (units & is_subnormal) | (magnitude & ~is_subnormal)


def _row_scale(amax):
    """Return the bits of float32(amax / 448), of the bits of amax."""
    fraction, exponent = math.frexp(E4M3.max)
    divisor, power = int(fraction * 8), exponent - 3  # 448 = 7 * 2^6
    bits = _normalized(amax)
    # 5 bits more than a float32 has, over 7, and one for the remainder: the conversion rounds as the exact quotient would.
    numerator = ((bits & _FRACTION) | _ONE) << 5
    quotient = T.truncdiv(numerator, divisor)
    sticky = quotient * 2 + T.min(numerator - quotient * divisor, 1)
    rounded = T.reinterpret(T.cast(sticky, "float32"), "int32")
    scale = T.max(rounded + (((bits >> MANTISSA_BITS) - BIAS - MANTISSA_BITS - 6 - power) << MANTISSA_BITS), _ONE)
    is_zero, is_finite = mask(amax - 1), mask(amax - INF)
    return (((scale & ~is_zero) | (bits_of(1.0) & is_zero)) & is_finite) | (bits_of(math.nan) & ~is_finite)


def _row_code(bits, scale):
    """Return the E4M3 code of x / scale, both as bits."""
    x = _normalized(bits & 0x7FFFFFFF)
    # 7 bits and one for the remainder: more than E4M3 keeps. The scale is a normal number.
    numerator, denominator = ((x & _FRACTION) | _ONE) << 7, (scale & _FRACTION) | _ONE
    quotient = T.truncdiv(numerator, denominator)
    sticky = T.reinterpret(T.cast(quotient * 2 + T.min(numerator - quotient * denominator, 1), "float32"), "int32")
    exponent = (x >> MANTISSA_BITS) - (scale >> MANTISSA_BITS) - 8
    magnitude = T.max(sticky + (exponent << MANTISSA_BITS), 0)
    return T.cast(encode(magnitude, mask(bits) & 1, E4M3), "uint8")


# --- tiles -----------------------------------------------------------------------------------------------------------


class Operand:
    """The K tiles of one operand of a product: `fetch` loads codes and scales into registers, `place` decodes them into a tile.

    With the product of the tile before between the two, loads are under way while it runs.
    """

    def __init__(self, kind: str, rows: int, block_K: int):
        """Allocate the registers, inside a kernel."""
        self.kind, self.rows, self.block_K, self.groups = kind, rows, block_K, block_K // MX_GROUP
        self.codes_f = T.alloc_fragment((rows, self.groups * group_bytes(kind)), codes_dtype(kind))
        self.scale_f = T.alloc_fragment((rows, self.groups), "uint8") if kind in ("mxfp8", "mxfp4") else None

    def fetch(self, codes, scale, index, k, num_groups) -> None:
        """Load tile k of rows codes[index(i)], zeros from group `num_groups` on and where there is no such row: what tensors
        hold behind K, NaN perhaps, is not read."""
        entries = group_bytes(self.kind)

        @T.macro
        def fetch(k):
            for i, j in T.Parallel(self.rows, self.groups * entries):
                at = (*index(i), k * self.groups + j // entries, j % entries)
                zero = T.cast(0, self.codes_f.dtype)
                self.codes_f[i, j] = T.if_then_else(k * self.groups + j // entries < num_groups, codes[at], zero)
            if self.scale_f is not None:
                for i, j in T.Parallel(self.rows, self.groups):
                    at = (*index(i), k * self.groups + j)
                    self.scale_f[i, j] = T.if_then_else(k * self.groups + j < num_groups, scale[at], T.uint8(0))

        fetch(k)

    def place(self, tile_s) -> None:
        """Write the tile; scales of rows (fp8) are left to the sum."""
        codes = tile(_NAME, "codes", self.codes_f)
        scale = None if self.scale_f is None else tile(_NAME, "scale", self.scale_f)

        @T.macro
        def place():
            if self.kind in WIDE:
                T.copy(self.codes_f, tile_s)
            else:
                for i, k in T.Parallel(self.rows, self.block_K):
                    tile_s[i, k] = _value(self.kind, codes, scale, i, k, tile_s.dtype)

        place()


def _value(kind: str, codes, scale, i, k, dtype: str):
    if kind == "mxfp4":
        return mxfp4_value(codes, scale, i, k, dtype)
    value = decode(codes[i, k], E4M3)
    return T.cast(value if kind == "fp8" else value * T.e8m0_to_float(scale[i, k // MX_GROUP]), dtype)


def store_tile(kind: str, block_M: int, block_N: int):
    """The macro that writes a float32 fragment as rows from `row` on and columns of tile bx, quantised; not of fp8."""
    groups_N, entries = block_N // MX_GROUP, group_bytes(kind)

    @T.macro
    def store(values_f, codes, scale, row, bx):
        if kind in WIDE:
            for i, j in T.Parallel(block_M, block_N):
                codes[row + i, bx * groups_N + j // MX_GROUP, j % MX_GROUP] = T.cast(values_f[i, j], kind)
        else:
            codes_s = T.alloc_shared((block_M, groups_N * entries), "uint8")
            scale_s = T.alloc_shared((block_M, groups_N), "uint8")
            T.mx_quantize(values_f, codes_s, scale_s, format=kind)
            for i, j in T.Parallel(block_M, groups_N * entries):
                codes[row + i, bx * groups_N + j // entries, j % entries] = codes_s[i, j]
            for i, j in T.Parallel(block_M, groups_N):
                scale[row + i, bx * groups_N + j] = scale_s[i, j]

    return store

"""The formats that the GEMMs take activations in: how they are stored, quantised, and read as tiles.

| a_format | codes, for K = 32 * groups | scale |
| --- | --- | --- |
| bfloat16, float16 | (rows, groups, 32) of that dtype | none |
| fp8 | (rows, groups, 32) uint8, bits of E4M3 | (rows,) float32 |
| mxfp8 | (rows, groups, 32) uint8, bits of E4M3 | (rows, groups) uint8, E8M0 |
| mxfp4 | (rows, groups, 16) uint8, low nibble = even k | (rows, groups) uint8, E8M0 |

Codes and scales are those of `quantization.quantize`, bit for bit, on every target. A group (for fp8 a row) with a NaN or an
infinity gets the scale NaN. The GEMMs multiply 16-bit tiles: bfloat16 holds every code times its scale exactly, and the scale
of a whole row multiplies the accumulator.
"""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import math
from collections.abc import Callable

from tilelang_ext import language as T
from tilelang_ext.codes import BIAS, INF, MANTISSA_BITS, bits_of, decode, encode, mask
from tilelang_ext.formats import CODES_PER_BYTE, E4M3, MX_GROUP
from tilelang_ext.kernels.mxfp4_moe.problem import Problem
from tilelang_ext.language.mxfp4_dequant import mxfp4_value
from tilelang_ext.language.tile import tile

_NAME = "mxfp4_moe"
SIXTEEN_BITS = ("bfloat16", "float16")  # formats without codes
A_FORMATS = (*SIXTEEN_BITS, "fp8", "mxfp8", "mxfp4")
_GROUPS = 64  # that a block of `quantize_groups` takes
_COLUMNS = 256  # of a row that `quantize_rows` takes at a time
_FRACTION = (1 << MANTISSA_BITS) - 1
_ONE = 1 << MANTISSA_BITS


def hidden_format(a_format: str) -> str:
    """Return the format of the hidden rows between the GEMMs.

    It is the format of x except for fp8, whose scale needs a whole row, while a block of the first GEMM has some columns of it.
    """
    return "mxfp8" if a_format == "fp8" else a_format


def tile_dtype(a_format: str) -> str:
    """Return the dtype of the tiles that the GEMMs multiply."""
    return a_format if a_format in SIXTEEN_BITS else "bfloat16"


def group_entries(a_format: str) -> int:
    """Return how many entries of codes hold 32 elements."""
    return MX_GROUP // CODES_PER_BYTE if a_format == "mxfp4" else MX_GROUP


def codes_dtype(a_format: str) -> str:
    """Return the dtype of codes in the kernels."""
    return a_format if a_format in SIXTEEN_BITS else "uint8"


def tensor_types(a_format: str, rows, groups) -> tuple:
    """Return the types of codes and scale in a prim_func; the scale's is None for 16 bits."""
    codes = T.Tensor((rows, groups, group_entries(a_format)), codes_dtype(a_format))
    if a_format in SIXTEEN_BITS:
        return codes, None
    return codes, T.Tensor((rows,), "float32") if a_format == "fp8" else T.Tensor((rows, groups), "uint8")


def empty_tensors(a_format: str, rows: int, k: int, device) -> tuple:
    """Return tensors for (rows, k) in a format: codes and scale, or for 16 bits one tensor; `device` as `problem` has it."""
    groups = k // MX_GROUP
    codes = device.empty(rows, groups, group_entries(a_format), dtype=codes_dtype(a_format))
    if a_format in SIXTEEN_BITS:
        return (codes,)
    return codes, (device.empty(rows, dtype="float32") if a_format == "fp8" else device.empty(rows, groups, dtype="uint8"))


# --- quantisation ----------------------------------------------------------------------------------------------------


def compile_quantize(problem: Problem, device) -> Callable:
    """Return quantize(x), which gives x (tokens, H) as codes and scales of the problem's format, or x alone for 16 bits."""
    a_format = problem.a_format
    if a_format in SIXTEEN_BITS:
        return lambda x: (x.unflatten(1, (-1, MX_GROUP)),)
    if a_format == "fp8":
        by_row = device.compile(quantize_rows, problem.dtype)
    else:
        by_group = device.compile(quantize_groups, a_format, problem.dtype)

    def quantize(x) -> tuple:
        codes, scale = empty_tensors(a_format, *x.shape, device)
        x = x.unflatten(1, (-1, MX_GROUP))
        if a_format == "fp8":
            by_row(x, codes, scale)
        else:
            by_group(x.flatten(0, 1), codes.flatten(0, 1), scale.view(-1, 1))
        return codes, scale

    return quantize


def quantize_groups(a_format: str, dtype: str):
    """Return the prim_func for mxfp8 and mxfp4: (x, codes, scale), with x (groups, 32) of `dtype`, the groups of all rows."""
    n = T.dynamic("n")

    @T.prim_func
    def quantize_groups(
        x: T.Tensor((n, MX_GROUP), dtype),
        codes: T.Tensor((n, group_entries(a_format)), "uint8"),
        scale: T.Tensor((n, 1), "uint8"),
    ):
        with T.Kernel(T.ceildiv(n, _GROUPS), threads=128) as bx:
            first = bx * _GROUPS
            part = (slice(first, first + _GROUPS), slice(None))
            T.mx_quantize(x[part], codes[part], scale[part], format=a_format)

    return quantize_groups


def quantize_rows(dtype: str):
    """Return the prim_func for fp8: (x, codes, scale), with x (rows, groups, 32) of `dtype`.

    scale = float32(amax / 448), at least the smallest normal number, and 1 for a row of zeros. Quotients are computed in
    integers with one more bit for the remainder: the division of a target may be off in its last place, which would make a tie
    look like one of its neighbours.
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
    """Return the bits of a magnitude as if subnormal numbers were normalised, with exponents below 0."""
    units = T.reinterpret(T.cast(magnitude, "float32"), "int32") - ((BIAS + MANTISSA_BITS - 1) << MANTISSA_BITS)
    is_subnormal = mask(magnitude - _ONE)
    return (units & is_subnormal) | (magnitude & ~is_subnormal)


def _row_scale(amax):
    """Return the bits of float32(amax / 448), given the bits of amax."""
    fraction, exponent = math.frexp(E4M3.max)
    divisor, power = int(fraction * 8), exponent - 3  # 448 = 7 * 2^6
    bits = _normalized(amax)
    # The quotient by 7 has at least as many bits as a float32, and one more says whether there is a remainder: converting it
    # rounds as converting the exact quotient would.
    numerator = ((bits & _FRACTION) | _ONE) << 5
    quotient = T.truncdiv(numerator, divisor)
    sticky = quotient * 2 + T.min(numerator - quotient * divisor, 1)
    rounded = T.reinterpret(T.cast(sticky, "float32"), "int32")
    scale = T.max(rounded + (((bits >> MANTISSA_BITS) - BIAS - MANTISSA_BITS - 6 - power) << MANTISSA_BITS), _ONE)
    is_zero, is_finite = mask(amax - 1), mask(amax - INF)
    return (((scale & ~is_zero) | (bits_of(1.0) & is_zero)) & is_finite) | (bits_of(math.nan) & ~is_finite)


def _row_code(bits, scale):
    """Return the E4M3 code of x / scale, both given as bits."""
    x = _normalized(bits & 0x7FFFFFFF)
    # 7 bits and one for the remainder are more than E4M3 keeps. The scale is a normal number.
    numerator, denominator = ((x & _FRACTION) | _ONE) << 7, (scale & _FRACTION) | _ONE
    quotient = T.truncdiv(numerator, denominator)
    sticky = T.reinterpret(T.cast(quotient * 2 + T.min(numerator - quotient * denominator, 1), "float32"), "int32")
    exponent = (x >> MANTISSA_BITS) - (scale >> MANTISSA_BITS) - 8
    magnitude = T.max(sticky + (exponent << MANTISSA_BITS), 0)
    return T.cast(encode(magnitude, mask(bits) & 1, E4M3), "uint8")


# --- tiles -----------------------------------------------------------------------------------------------------------


class OperandTile:
    """The K tiles of one operand of a GEMM, in registers: `fetch` loads codes and scales, `decode_to` writes their values.

    With the MMAs of the tile before between the two, the loads are in flight while those run.
    """

    def __init__(self, a_format: str, rows: int, block_K: int):
        """Allocate the registers; call it inside a kernel. Weights have the format mxfp4."""
        self.a_format, self.rows, self.block_K, self.groups = a_format, rows, block_K, block_K // MX_GROUP
        self.codes_f = T.alloc_fragment((rows, self.groups * group_entries(a_format)), codes_dtype(a_format))
        self.scale_f = T.alloc_fragment((rows, self.groups), "uint8") if a_format in ("mxfp8", "mxfp4") else None

    def fetch(self, codes, scale, index, k, num_groups) -> None:
        """Load tile k of the rows codes[index(i)].

        From group `num_groups` on the tile is zero and nothing is read: tensors may hold anything there, NaN too.
        """
        entries = group_entries(self.a_format)

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

    def decode_to(self, tile_s) -> None:
        """Write the values of the tile to `tile_s`. The scales of whole rows (fp8) are left to the accumulator."""
        codes = tile(_NAME, "codes", self.codes_f)
        scale = None if self.scale_f is None else tile(_NAME, "scale", self.scale_f)

        @T.macro
        def decode_to():
            if self.a_format in SIXTEEN_BITS:
                T.copy(self.codes_f, tile_s)
            else:
                for i, k in T.Parallel(self.rows, self.block_K):
                    tile_s[i, k] = _value(self.a_format, codes, scale, i, k, tile_s.dtype)

        decode_to()


def _value(a_format: str, codes, scale, i, k, dtype: str):
    if a_format == "mxfp4":
        return mxfp4_value(codes, scale, i, k, dtype)
    value = decode(codes[i, k], E4M3)
    return T.cast(value if a_format == "fp8" else value * T.e8m0_to_float(scale[i, k // MX_GROUP]), dtype)


def store_tile(a_format: str, block_M: int, block_N: int):
    """Return the macro store(values_f, codes, scale, row, bx), which quantises a float32 tile and stores it.

    The tile starts at row `row` and column bx * block_N. Not for fp8, whose scale needs the whole row.
    """
    groups_N, entries = block_N // MX_GROUP, group_entries(a_format)

    @T.macro
    def store(values_f, codes, scale, row, bx):
        if a_format in SIXTEEN_BITS:
            for i, j in T.Parallel(block_M, block_N):
                codes[row + i, bx * groups_N + j // MX_GROUP, j % MX_GROUP] = T.cast(values_f[i, j], a_format)
        else:
            codes_s = T.alloc_shared((block_M, groups_N * entries), "uint8")
            scale_s = T.alloc_shared((block_M, groups_N), "uint8")
            T.mx_quantize(values_f, codes_s, scale_s, format=a_format)
            for i, j in T.Parallel(block_M, groups_N * entries):
                codes[row + i, bx * groups_N + j // entries, j % entries] = codes_s[i, j]
            for i, j in T.Parallel(block_M, groups_N):
                scale[row + i, bx * groups_N + j] = scale_s[i, j]

    return store

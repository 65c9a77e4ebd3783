"""What a call of `T.gemm_blockscaled` says, and what it may not say where upstream has no instruction for it.

The scale of element k of row i stands in column (k_start + k) / granularity of SFA. Columns are bytes, or floats, or uint32
words of four bytes, the lowest first. Scales in shared memory may be a window on K: their columns repeat.

| scales | dtype | format |
| --- | --- | --- |
| words, bytes | uint32, uint8 | E8M0; E4M3 for E2M1 operands with 16 of K per scale (NVFP4), as upstream reads them on sm_120 |
| bytes of a type | float8_e8m0fnu, float8_e4m3fn | their own |
| floats | float32, float16, bfloat16 | their own |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tilelang import language as T
from tilelang.tileop.base import GemmWarpPolicy
from tilelang.utils.language import is_full_region
from tvm import arith, tirx
from tvm.ir import Op, Range

from tilelang_ext.codes import decode, power_of_two
from tilelang_ext.formats import (
    CODES_PER_BYTE,
    E2M1,
    E4M3,
    E8M0,
    FP8_OPERANDS,
    NVFP4_GROUP,
    OCP_OF_FNUZ,
    FloatFormat,
    format_of,
)
from tilelang_ext.marks import GEMM_BLOCKSCALED

NAME = "T.gemm_blockscaled"
FP8 = tuple(format.dtype for format in FP8_OPERANDS)

_PACKED = "uint8"  # two codes of E2M1, neighbours along K
_OPERANDS = (*FP8, E2M1.dtype, _PACKED)
_FLOATS = ("float32", "float16", "bfloat16")
_WORD, _BYTES_PER_WORD = "uint32", 4
_SCALES = (_WORD, "uint8", E8M0.dtype, E4M3.dtype, *_FLOATS)
_SUMS = _FLOATS  # of C
_HINTS = {
    **dict.fromkeys((E2M1.dtype, E8M0.dtype), "pass the codes as uint8"),
    **{fnuz.dtype: "convert codes and scales with tilelang_ext.quantization.fnuz_to_ocp" for fnuz in OCP_OF_FNUZ},
}
_GEMM = "tl.tileop.gemm"
_SLOTS = {"SFA": 13, "SFB": 14}  # of the call
_BARRIER = 16  # of tilelang 0.1.14's gemm; that of products in tensor memory waits for one
_SLOTS_0_1_14 = (*range(10), *range(16, 22))  # of the same in a call of tilelang 0.1.14
_SCOPES = {"shared.dyn": "shared", "local.fragment": "fragment", "": "global"}


@dataclass(frozen=True)
class Scales:
    """The scales of one operand: a region (rows, columns) and what a column covers."""

    region: tirx.BufferRegion
    granularity: int  # elements of K that share a scale
    format: FloatFormat | None  # None: a float
    k_start: Any  # element of K, among those that have scales, where the tile begins

    def stored(self, i, k) -> tirx.PrimExpr:
        """Return the scale of row i at element k of the tile: its code as a uint32, or a float32."""
        dtype = str(self.region.buffer.dtype)
        group = (self.k_start + k) // self.granularity
        column = group // _BYTES_PER_WORD if dtype == _WORD else group
        *lead, rows, columns = self.region.region
        if scope_of(self.region.buffer) == "shared":
            column = column % columns.extent
        row, column, inside = rows.min + i, columns.min + column, None
        if scope_of(self.region.buffer) == "global":
            # Rows past the region are not stored. Past its end along K lie codes of zero, which an infinite scale would not
            # keep; a byte there is that of the last group, which these rows have anyway.
            *_, last_row, last_column = (
                T.min(axis.min + axis.extent, extent) - 1
                for axis, extent in zip(self.region.region, self.region.buffer.shape, strict=True)
            )
            inside = column <= last_column
            row, column = T.min(row, last_row), T.min(column, last_column)
        element = self.region.buffer[(*(axis.min for axis in lead), row, column)]
        if self.format is None:
            value = T.cast(element, "float32")
            return value if inside is None else T.if_then_else(inside, value, T.float32(0))
        if dtype == _WORD:
            return (element >> T.cast(group % _BYTES_PER_WORD * 8, _WORD)) & T.uint32(0xFF)
        return T.cast(element if dtype == "uint8" else T.reinterpret(element, "uint8"), _WORD)

    def at(self, i, k) -> tirx.PrimExpr:
        """Return the factor of row i at element k of the tile as float32."""
        stored = self.stored(i, k)
        if self.format is None:
            return stored
        return power_of_two(stored) if self.format is E8M0 else decode(stored, self.format)


@dataclass(frozen=True)
class Operand:
    """A (rows, K) or (K, rows), B likewise: rows are M of A and N of B."""

    region: tirx.BufferRegion
    k_is_first: bool

    @property
    def dtype(self) -> str:
        return str(self.region.buffer.dtype)

    @property
    def codes_per_element(self) -> int:
        return CODES_PER_BYTE if self.dtype == _PACKED else 1

    @property
    def format(self) -> FloatFormat:
        return E2M1 if self.dtype == _PACKED else format_of(self.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, K)."""
        first, second = (int(axis.extent) for axis in self.region.region[-2:])
        rows, k = (second, first) if self.k_is_first else (first, second)
        return rows, k * self.codes_per_element

    def value(self, i, k) -> tirx.PrimExpr:
        """Return element k of row i as float32."""
        *lead, first, second = (axis.min for axis in self.region.region)
        step = k // self.codes_per_element
        at = (first + step, second + i) if self.k_is_first else (first + i, second + step)
        element = self.region.buffer[(*lead, *at)]
        if self.dtype == _PACKED:
            shift = T.cast(k % CODES_PER_BYTE * E2M1.bits, "int32")
            return decode((T.cast(element, "int32") >> shift) & 0xF, E2M1)
        if self.dtype == E2M1.dtype:
            return T.cast(element, "float32")
        return decode(T.reinterpret(element, "uint8"), self.format)

    def along_k(self, k: int, size: int) -> tirx.BufferRegion:
        """Return `size` elements of K from `k` on, of all rows, of an operand with one code per element."""
        *lead, first, second = self.region.region
        of_k, of_rows = (first, second) if self.k_is_first else (second, first)
        of_k = Range.from_min_extent(of_k.min + k, size)
        return tirx.BufferRegion(self.region.buffer, [*lead, *((of_k, of_rows) if self.k_is_first else (of_rows, of_k))])


@dataclass(frozen=True)
class BlockScaledGemm:
    """C[i, j] += sum over k of (scale_a A)[i, k] * (scale_b B)[k, j], or = where `clear_accum`."""

    A: Operand
    B: Operand
    C: tirx.BufferRegion
    scale_a: Scales
    scale_b: Scales
    policy: GemmWarpPolicy
    clear_accum: Any  # bool, or an expression

    @property
    def M(self) -> int:
        return self.A.shape[0]

    @property
    def N(self) -> int:
        return self.B.shape[0]

    @property
    def K(self) -> int:
        return self.A.shape[1]

    @property
    def is_in_place(self) -> bool:
        """Whether float32 sums can be kept in C."""
        return str(self.C.buffer.dtype) == "float32" and scope_of(self.C.buffer) == "fragment" and is_full_region(self.C)

    @property
    def group(self) -> int:
        """How many neighbours along K, counted from the tile's first, provably have the same scales."""
        start = arith.Analyzer().modular_set(tirx.convert(self.scale_a.k_start))
        return math.gcd(self.K, self.scale_a.granularity, self.scale_b.granularity, int(start.coeff), int(start.base))


def product_of(call) -> tirx.Call | None:
    """Return a call of a block-scaled product that needs no tensor memory, None for anything else.

    tilelang 0.1.14 has no operator for it: there `T.mma_gemm_blockscaled` is its `gemm`, with the scales behind all other
    arguments. Returned is the call with its arguments in the slots of the newer operator.
    """
    if not isinstance(call, tirx.Call) or not isinstance(call.op, Op):
        return None
    if call.op.name == GEMM_BLOCKSCALED:
        return call
    if call.op.name == _GEMM and "sf_a_granularity_k" in call.annotations and isinstance(call.args[_BARRIER], tirx.IntImm):
        return tirx.Call(call.dtype, call.op, [call.args[slot] for slot in _SLOTS_0_1_14], annotations=call.annotations)
    return None


def read(call: tirx.Call, without: tuple[str, ...] = ()) -> BlockScaledGemm:
    """Return what a call says, for a target that lacks the dtypes `without`.

    Raises TypeError for dtypes and scopes, ValueError for shapes, NotImplementedError for options.
    """
    A, B, C = (region_of(argument) for argument in call.args[:3])
    transpose_A, transpose_B = bool(call.args[3]), bool(call.args[4])
    a, b = Operand(A, transpose_A), Operand(B, not transpose_B)
    _check_options(call.annotations)
    for name, region, scopes, dtypes in (
        ("A", A, ("shared", "fragment"), _OPERANDS),
        ("B", B, ("shared", "fragment"), _OPERANDS),
        ("C", C, ("fragment", "shared"), _SUMS),
        *((name, region_of(call.args[slot]), ("shared", "fragment", "global"), _SCALES) for name, slot in _SLOTS.items()),
    ):
        _check_type(name, region, scopes, tuple(dtype for dtype in dtypes if dtype not in without))
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{NAME}: K of A and B must agree; got {a.shape[1]} and {b.shape[1]}; check the shapes (uint8 holds two "
            "codes per byte), transpose_A and transpose_B"
        )
    scales = []
    for (name, slot), operand, key in zip(_SLOTS.items(), (a, b), "ab", strict=True):
        granularity = int(call.annotations[f"sf_{key}_granularity_k"])
        scales.append(_scales(name, region_of(call.args[slot]), granularity, operand, call.args[15]))
    clear_accum = call.args[9]
    if isinstance(clear_accum, tirx.IntImm):
        clear_accum = bool(int(clear_accum))
    return BlockScaledGemm(a, b, C, *scales, GemmWarpPolicy(int(call.args[8])), clear_accum)


def region_of(argument: tirx.Call) -> tirx.BufferRegion:
    """Return what an operand of a tile operator covers; the call holds an element, the kind of access and extents."""
    load, _, *extents = argument.args
    return tirx.BufferRegion(load.buffer, [Range.from_min_extent(a, b) for a, b in zip(load.indices, extents, strict=True)])


def scope_of(buffer: tirx.Buffer) -> str:
    return _SCOPES.get(buffer.scope(), buffer.scope())


def _check_options(annotations) -> None:
    layout = str(getattr(annotations.get("sf_layout"), "value", annotations.get("sf_layout", "rowmajor")))
    if layout != "rowmajor":
        raise NotImplementedError(
            f"{NAME}: sf_layout must be 'rowmajor' but for E2M1 with NVFP4 scales on sm_120; got {layout!r}; store the "
            "scales as (rows, K / (4 * granularity)) words, or (rows, K / granularity) bytes"
        )
    if int(annotations.get("use_2cta", 0)):
        raise NotImplementedError(f"{NAME}: use_2cta needs C in the tensor memory of sm_100; got True; leave it out")


def _check_type(name: str, region: tirx.BufferRegion, scopes: tuple, dtypes: tuple) -> None:
    buffer, scope = region.buffer, scope_of(region.buffer)
    if scope not in scopes:
        raise TypeError(
            f"{NAME}: {name} must be {' or '.join(scopes)} but on sm_100; got {buffer.name} in scope {scope}; copy it with "
            "T.copy"
        )
    if str(buffer.dtype) not in dtypes:
        hint = _HINTS.get(str(buffer.dtype), "convert it")
        raise TypeError(f"{NAME}: {name} must be {', '.join(dtypes)}; got {buffer.dtype} ({buffer.name}); {hint}")


def _scales(name: str, region: tirx.BufferRegion, granularity: int, operand: Operand, k_start) -> Scales:
    if len(region.region) < 2:
        raise ValueError(f"{NAME}: {name} must have rows and columns; got {region}; one word per row is a column: (rows, 1)")
    dtype = str(region.buffer.dtype)
    *lead, rows, _ = region.region
    wanted = operand.shape[0]
    if granularity < 1:
        raise ValueError(f"{NAME}: the granularity of {name} must be at least 1; got {granularity}; MX has 32, NVFP4 16")
    if any(not _equal(axis.extent, 1) for axis in lead) or not _equal(rows.extent, wanted):
        raise ValueError(
            f"{NAME}: {name} must have one row per row of its operand, {wanted}; got {region}; slice the scales as the operand"
        )
    format: FloatFormat | None = E8M0
    if dtype in _FLOATS:
        format = None
    elif dtype == E4M3.dtype or (dtype != E8M0.dtype and operand.format is E2M1 and granularity == NVFP4_GROUP):
        format = E4M3
    return Scales(region, granularity, format, k_start)


def _equal(first, second) -> bool:
    return arith.Analyzer().can_prove_equal(tirx.convert(first), tirx.convert(second))

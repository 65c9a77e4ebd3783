"""Which layout do these scales have, and what is the factor of one element?

The operand of a product has (rows, K) elements: rows are M of A and N of B. Its scales are a buffer, a region of one, or a
number. Their layout is the one that the caller names; without a name it follows from their shape and dtype, where exactly one
layout fits. Scales are sliced as their operand is, or they are the scales of the whole matrix of which the operand is a region.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tilelang.language as T
from tilelang.utils.language import to_buffer_region
from tvm import tirx

from tilelang_ext.formats import E8M0, FP8_BLOCK, BlockScaledLayout
from tilelang_ext.language.e8m0 import e8m0_to_float
from tilelang_ext.language.tile import differ, equal

_FLOATS = ("float32", "float16", "bfloat16")
_BYTES = ("uint8", E8M0.dtype)


@dataclass(frozen=True)
class Scales:
    """The scales of one operand: `at(i, k)` is the factor of row i at element k of the operand, as float32."""

    layout: BlockScaledLayout
    k0: Any  # element of K, among those that have scales, where the operand begins
    at: Callable
    region: Callable | None = None  # (k, size) -> the E8M0 bytes of all rows from element k of the operand on

    @property
    def grouped(self) -> bool:
        """Whether the scale changes along K."""
        return self.layout.k is not None


def read_scales(
    intrinsic: str, name: str, operand, layout: BlockScaledLayout | None, shape: tuple, begin: tuple, matrix: tuple
) -> Scales:
    """Read the scales of an operand of `shape` (rows, K) that begins at `begin` of a matrix of `matrix` (rows, K).

    `layout` is the caller's, or None where the scales' own shape and dtype must decide. Raises TypeError for a dtype that the
    layout does not have, ValueError for a shape that fits no layout, or fits two that mean different scales.
    """
    where = f"{intrinsic}: {name}"
    if isinstance(operand, tirx.PrimExpr) and not isinstance(operand, tirx.BufferLoad):
        _check_dtype(where, str(operand.dtype), BlockScaledLayout.per_tensor())
        return Scales(BlockScaledLayout.per_tensor(), 0, lambda i, k: T.cast(operand, "float32"))
    if layout is not None and not isinstance(layout, BlockScaledLayout):
        raise TypeError(
            f"{intrinsic}: scale_layout must be a T.BlockScaledLayout; got {layout!r}; pass one, such as "
            "T.BlockScaledLayout.block(128, 128), .per_row() or .e8m0_k32()"
        )
    region = to_buffer_region(operand)
    layout, (row0, k0) = _choose(intrinsic, name, region, layout, shape, begin, matrix)
    _check_dtype(where, str(region.buffer.dtype), layout)
    buffer, extents, begins = region.buffer, [axis.extent for axis in region.region], [axis.min for axis in region.region]
    ends = [T.min(first + extent, size) for first, extent, size in zip(begins, extents, buffer.shape, strict=True)]

    # Rows past the end are not stored, so any scale will do. Past the end of K lie elements that the copies filled with zeros:
    # a scale there counts as 0, since it could be infinite. A byte of E8M0 is never infinite, and its index is clamped: a
    # select costs registers that the many scales of a step do not leave (45 spills on gfx1100).
    def at(i, k):
        row = 0 if layout.rows is None else T.min((row0 + i) // layout.rows, extents[-2 if len(extents) > 1 else 0] - 1)
        group = 0 if layout.k is None else (k0 + k) // layout.k
        if len(begins) > 1:
            index = [*begins[:-2], begins[-2] + row, begins[-1] + group]
        else:
            index = [begins[0] + (row if layout.k is None else group)]
        if layout.scale_format == E8M0:
            index[-1] = T.min(index[-1], ends[-1] - 1)
            return e8m0_to_float(buffer[tuple(index)])
        value = T.cast(buffer[tuple(index)], "float32")
        return value if layout.k is None else T.if_then_else(index[-1] < ends[-1], value, T.float32(0))

    def bytes_of(k, size):
        row, group = begins[-2] + row0, begins[-1] + (k0 + k) // layout.k
        axes = (
            *(slice(first, first + 1) for first in begins[:-2]),
            slice(row, row + shape[0]),
            slice(group, group + size // layout.k),
        )
        return buffer[axes]

    has_bytes_per_row = layout.scale_format == E8M0 and layout.rows == 1 and len(begins) > 1
    return Scales(layout, k0, at, bytes_of if has_bytes_per_row else None)


def _choose(
    intrinsic: str, name: str, region: tirx.BufferRegion, layout: BlockScaledLayout | None, shape, begin, matrix
) -> tuple[BlockScaledLayout, tuple]:
    """Return the layout of the scales in `region`, and the operand's first (row, element of K) among those they cover."""
    rows, K = shape
    extents, dtype = [axis.extent for axis in region.region], str(region.buffer.dtype)
    candidates = [layout] if layout is not None else _layouts_of(dtype)
    places = [((0, 0), shape)]
    whole = all(
        equal(axis.min, 0) and equal(axis.extent, size) for axis, size in zip(region.region, region.buffer.shape, strict=True)
    )
    if whole and not (equal(matrix[0], rows) and equal(matrix[1], K)):
        places.append((begin, matrix))  # scales of the whole matrix, of which the operand is a region
    found = {}
    for candidate in candidates:
        for place, covered in places:  # the whole matrix comes last, and wins where both fit
            fits = _fits(extents, candidate, *covered)
            if fits or (fits is None and layout is not None):
                found[candidate] = place
    if len({(_reach(candidate.rows, rows), _reach(candidate.k, K)) for candidate in found}) > 1:
        names = " or ".join(map(_describe, found))
        raise ValueError(f"{intrinsic}: {name} of shape {extents} reads as {names}; got no scale_layout; pass scale_layout")
    if not found:
        _check_dtype(f"{intrinsic}: {name}", dtype, layout)
        if layout is not None and layout.k is not None and layout.scale_format is not None and not equal(K % layout.k, 0):
            raise ValueError(f"{intrinsic}: K must be a multiple of the scale group {layout.k}; got K = {K}; pad K with zeros")
        wanted = ", ".join(_describe(candidate) for candidate in candidates)
        for candidate in candidates:
            turned = [*extents[:-2], *extents[:-3:-1]]
            if len(extents) > 1 and any(_fits(turned, candidate, *covered) for _, covered in places):
                raise ValueError(
                    f"{intrinsic}: {name} must have shape {_text(turned)} for {_describe(candidate)}; got {_text(extents)}; "
                    "pass the transpose, which holds the scales of one row next to one another"
                )
        raise ValueError(
            f"{intrinsic}: {name} must fit {wanted} of an operand with {rows} rows and K = {K}; got shape {extents}; "
            "slice the scales as the operand is sliced, or pass scale_layout"
        )
    return next(iter(found.items()))


def _text(extents) -> str:
    return f"({', '.join(str(extent) for extent in extents)})"


def _layouts_of(dtype: str) -> list[BlockScaledLayout]:
    """Return the layouts that scales of this dtype may have where the caller names none."""
    if dtype in _BYTES:
        return [BlockScaledLayout.e8m0_k32()]
    blocks = BlockScaledLayout.block(1, FP8_BLOCK), BlockScaledLayout.block(FP8_BLOCK, FP8_BLOCK)
    return [BlockScaledLayout.per_tensor(), BlockScaledLayout.per_row(), *blocks]


def _check_dtype(where: str, dtype: str, layout: BlockScaledLayout | None) -> None:
    allowed, what = [*_FLOATS, *_BYTES], ""
    if layout is not None:
        allowed, what = [*(_BYTES if layout.scale_format == E8M0 else _FLOATS)], f" for {_describe(layout)}"
    if dtype not in allowed:
        raise TypeError(f"{where} must be {', '.join(allowed)}{what}; got {dtype}; convert the scales")


def _fits(extents, layout: BlockScaledLayout, rows, K) -> bool | None:
    """Whether scales of these extents cover rows x K: True, False, or None where symbolic extents leave it open."""
    row_blocks = 1 if layout.rows is None else _ceildiv(rows, layout.rows)
    k_blocks = 1 if layout.k is None else _ceildiv(K, layout.k)
    if layout.scale_format is not None and differ(K % layout.k, 0):
        return False
    if len(extents) == 1 and layout.k is None:
        wanted = [row_blocks]
    elif len(extents) == 1 and layout.scale_format is not None:
        wanted = [k_blocks]  # shared by all rows
    elif len(extents) >= 2:
        wanted = [*(1 for _ in extents[2:]), row_blocks, k_blocks]
    else:
        return False
    pairs = list(zip(extents, wanted, strict=True))
    if all(equal(got, want) for got, want in pairs):
        return True
    return False if any(differ(got, want) for got, want in pairs) else None


def _reach(block: int | None, extent) -> object:
    """Return a block's extent as far as the operand goes: layouts that agree on it mean the same scales."""
    if isinstance(extent, int):
        return extent if block is None else min(block, extent)
    return "all" if block is None else block


def _describe(layout: BlockScaledLayout) -> str:
    if layout == BlockScaledLayout.per_tensor():
        return "per_tensor()"
    if layout == BlockScaledLayout.per_row():
        return "per_row()"
    if layout == BlockScaledLayout.e8m0_k32():
        return "e8m0_k32()"
    return f"block({layout.rows}, {layout.k})"


def _ceildiv(extent, block: int):
    return -(-extent // block) if isinstance(extent, int) else (extent + block - 1) // block

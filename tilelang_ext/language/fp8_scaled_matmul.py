"""`T.fp8_scaled_matmul`: a product of fp8 tiles whose scales may cover the tensor, rows, blocks or 32 elements of K.

    C[i, j] += sum over groups g of scale_a[i, g] * scale_b[j, g] * (A[i, g] . B[g, j])

| operand | shape | dtype | scope |
| --- | --- | --- | --- |
| A | (M, K), or (K, M) transposed | an fp8 type | shared, global, fragment |
| B | (K, N), or (N, K) transposed | an fp8 type, its own | shared, global |
| scale_a, scale_b | see `BlockScaledLayout`; rows are M of A and N of B | float32, float16, bfloat16; uint8 or e8m0 | any |
| C | (M, N) | float32, float16, bfloat16 | fragment, shared, global |

Each may be a buffer or a region of one. The sum is kept in float32: at most 128 of K go into one accumulator of the matrix
unit, groups are scaled as they are added, whole-K scales are applied once at the end, and C is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import tilelang.language as T
from tilelang.utils.language import to_buffer_region
from tvm import arith, tirx

from tilelang_ext.formats import E8M0, FP8_BLOCK, FP8_OPERANDS, BlockScaledLayout
from tilelang_ext.language.block_scaled import block_scaled
from tilelang_ext.language.e8m0 import e8m0_to_float

READ_ONCE = "read_once"  # T.Parallel's annotation where scales are read: Metal stages them, see metal.staged_reads
_NAME = "T.fp8_scaled_matmul"
_OPERAND_DTYPES = tuple(format.dtype for format in FP8_OPERANDS)
_ACCUMULATOR_DTYPES = ("float32", "float16", "bfloat16")
_SCALE_DTYPES = {False: ("float32", "float16", "bfloat16"), True: ("uint8", E8M0.dtype)}  # by "is a byte of E8M0"
_STAGING_BYTES = 16 * 1024  # for staged tiles of global operands: half of what the smallest target has
_MATRIX_K = 32  # what matrix units take at most in one instruction
_PROMOTE_K = 128  # K elements summed in the matrix unit before the sum moves on in float32


@dataclass(frozen=True)
class _Tile:
    """A two-dimensional tile: its buffer, the leading indices that are fixed, the first row and column, the extents."""

    name: str
    buffer: tirx.Buffer
    lead: tuple
    row: Any  # an int or an expression, as all that follow
    col: Any
    rows: Any
    cols: Any

    @property
    def dtype(self) -> str:
        return str(self.buffer.dtype)

    @property
    def scope(self) -> str:
        scope = self.buffer.scope()
        return {"local.fragment": "fragment", "shared.dyn": "shared", "": "global"}.get(scope, scope)

    def index(self, i, j) -> tuple:
        return (*self.lead, self.row + i, self.col + j)

    def slice(self, i, rows, j, cols) -> tirx.BufferRegion:
        first, second = self.row + i, self.col + j
        axes = *(slice(at, at + 1) for at in self.lead), slice(first, first + rows), slice(second, second + cols)
        return self.buffer[axes]


@dataclass(frozen=True)
class _Scale:
    """The scales of one operand: `at(i, k)` is the factor of row i at element k of the tile."""

    layout: BlockScaledLayout
    k0: Any  # element of K, among those that have scales, where the tile begins
    at: Callable
    region: Callable | None = None  # (k, size) -> the bytes of E8M0 of all rows from element k of the tile on

    @property
    def grouped(self) -> bool:
        return self.layout.k is not None


def fp8_scaled_matmul(
    A,
    scale_a,
    B,
    scale_b,
    C,
    *,
    transpose_A: bool = False,
    transpose_B: bool = False,
    scale_layout: BlockScaledLayout | tuple[BlockScaledLayout, BlockScaledLayout] | None = None,
    clear_accum: bool = False,
    require_native: bool = False,
) -> None:
    """Add the product of two fp8 tiles, each times its scales, to C; with `clear_accum` overwrite C.

    `scale_layout` says what a scale covers, one layout for both operands or (A's, B's); left out, it follows from the
    scales' shapes and dtypes. What C held is never scaled. M, N and the K of tiles in shared memory or fragments are
    constants; the K of global operands may be symbolic. Where the matrix unit takes no fp8, codes are decoded to half, which is
    exact; with `require_native` lowering to such a target raises NotImplementedError instead.

    Raises TypeError for dtypes and scopes, ValueError for shapes and layouts, NotImplementedError for what no target has.
    """
    a, b, c = _tile("A", A), _tile("B", B), _tile("C", C)
    _check_types(a, b, c)
    M, K = (a.cols, a.rows) if transpose_A else (a.rows, a.cols)
    N, K_b = (b.rows, b.cols) if transpose_B else (b.cols, b.rows)
    for what, first, second in (("M of A and C", M, c.rows), ("N of B and C", N, c.cols), ("K of A and B", K, K_b)):
        if not _equal(first, second):
            raise ValueError(
                f"{_NAME}: {what} must agree; got {first} and {second}; check the shapes and transpose_A, transpose_B"
            )
    M, N = _constant("M", M), _constant("N", N)
    if a.scope != "global" or b.scope != "global":
        K = _constant("K of a tile in shared memory or a fragment", K)
    layouts = scale_layout if isinstance(scale_layout, tuple) else (scale_layout, scale_layout)
    a_origin = (a.col, a.row) if transpose_A else (a.row, a.col)
    b_origin = (b.row, b.col) if transpose_B else (b.col, b.row)
    scales = (
        _scale("scale_a", scale_a, M, K, layouts[0], a_origin, _extents(a.buffer, transpose_A)),
        _scale("scale_b", scale_b, N, K, layouts[1], b_origin, _extents(b.buffer, not transpose_B)),
    )

    step = min(_PROMOTE_K, K) if isinstance(K, int) else _PROMOTE_K
    if a.scope == b.scope == "global" and _reaches_end(a, transpose_A, K) and _reaches_end(b, not transpose_B, K):
        step = -(-step // _MATRIX_K) * _MATRIX_K
    groups = [k for scale in scales if (k := scale.layout.k) is not None]
    group = min([step, *groups])
    if any(k % group for k in groups) or step % group:
        raise ValueError(
            f"{_NAME}: scale groups along K must divide one another; got {groups} and a K tile of {step}; use 32 or 128"
        )
    if a.scope == "fragment" and isinstance(K, int) and group < K:
        raise NotImplementedError(
            f"{_NAME}: A in a fragment is used whole, so K must be at most one scale group and 128; got K = {K} with groups "
            f"of {group}; keep A in shared memory, or call once a group"
        )

    for tile, scale in zip((a, b), scales, strict=True):
        if scale.layout.k is not None and _differ(scale.k0 % min(scale.layout.k, step), 0):
            raise ValueError(
                f"{_NAME}: a region beside the scales of the whole matrix must begin at a scale group; got {tile.name} from "
                f"{scale.k0} of K on with groups of {scale.layout.k}; begin at a multiple of {scale.layout.k}"
            )
    _check_tail(a, transpose_A, K, step)
    _check_tail(b, not transpose_B, K, step)
    staged = a.scope == "global" or b.scope == "global"
    stages = 2 if 2 * (M + N) * step <= _STAGING_BYTES else 1
    once = not staged and group >= K  # one product: the accumulator of the matrix unit is the sum
    factor_of_rows = _factor(scales, 0, grouped=False)
    annotations = {"require_native_fp8": 1} if require_native else {}

    # Constants reach macros as closures: a macro turns the numbers it is given into variables.
    @T.macro
    def add_product(total, A_k, B_k, factor, marks):
        if once:
            T.gemm(A_k, B_k, total, transpose_A=transpose_A, transpose_B=transpose_B, clear_accum=True, annotations=annotations)
            if factor is not None:
                for i, j in T.Parallel(M, N, annotations={READ_ONCE: 1}):
                    total[i, j] *= factor(i, j)
        else:
            partial = T.alloc_fragment((M, N), "float32")
            T.gemm(
                A_k,
                B_k,
                partial,
                transpose_A=transpose_A,
                transpose_B=transpose_B,
                clear_accum=True,
                annotations=annotations | marks[0],
            )
            for i, j in T.Parallel(M, N, annotations={READ_ONCE: 1} | marks[1]):
                total[i, j] += partial[i, j] if factor is None else partial[i, j] * factor(i, j)

    def add_products(total, A_s: _Tile, B_s: _Tile, size: int, k) -> None:
        """Add the products of `size` elements of K, from element `k` of the operands on, one a scale group."""
        for number, offset in enumerate(range(0, size, group)):
            width = min(group, size - offset)
            A_k = _along_k(A_s, transpose_A, M, offset, width)
            B_k = _along_k(B_s, not transpose_B, N, offset, width)
            marks = [mark(total, A_s, B_s, size, k, 2 * number + i) for i in (0, 1)]
            add_product(total, A_k, B_k, _factor(scales, k + offset, grouped=True), marks)

    def mark(total, A_s: _Tile, B_s: _Tile, size: int, k, part: int) -> dict:
        """Return the mark of one statement of `add_products` for units that take scales, {} where they could not."""
        region_a, region_b = (scale.region for scale in scales)
        if once or transpose_A or not transpose_B or A_s.scope == "fragment" or region_a is None or region_b is None:
            return {}
        A, B = _along_k(A_s, False, M, 0, size), _along_k(B_s, False, N, 0, size)
        return block_scaled(total, A, region_a(k, size), B, region_b(k, size), K - k, part=part)

    @T.macro
    def scaled_matmul():
        total = T.alloc_fragment((M, N), "float32")
        if not once:
            T.clear(total)
        if staged:
            A_s = T.alloc_shared((step, M) if transpose_A else (M, step), a.dtype)
            B_s = T.alloc_shared((N, step) if transpose_B else (step, N), b.dtype)
            for t in T.Pipelined(T.ceildiv(K, step), num_stages=stages):
                if a.scope == "global":
                    T.copy(_along_k(a, transpose_A, M, t * step, step), A_s)
                if b.scope == "global":
                    T.copy(_along_k(b, not transpose_B, N, t * step, step), B_s)
                A_t = _tile("A", A_s) if a.scope == "global" else _from_k(a, transpose_A, t * step)
                B_t = _tile("B", B_s) if b.scope == "global" else _from_k(b, not transpose_B, t * step)
                add_products(total, A_t, B_t, step, t * step)
        else:
            add_products(total, a, b, K, 0)
        for i, j in T.Parallel(M, N, annotations={READ_ONCE: 1}):
            value = total[i, j] if factor_of_rows is None else total[i, j] * factor_of_rows(i, j)
            if clear_accum:
                c.buffer[c.index(i, j)] = T.cast(value, c.dtype)
            else:
                c.buffer[c.index(i, j)] = T.cast(T.cast(c.buffer[c.index(i, j)], "float32") + value, c.dtype)

    scaled_matmul()


def _along_k(tile: _Tile, k_is_first: bool, extent: int, k, size: int):
    """Return `size` elements along K from `k` on, over the whole other axis: a region, or a fragment as it is."""
    if tile.scope == "fragment":
        return tile.buffer
    return tile.slice(k, size, 0, extent) if k_is_first else tile.slice(0, extent, k, size)


def _from_k(tile: _Tile, k_is_first: bool, k) -> _Tile:
    """Return the tile from element `k` of K on."""
    return replace(tile, row=tile.row + k) if k_is_first else replace(tile, col=tile.col + k)


def _factor(scales: tuple[_Scale, _Scale], k, *, grouped: bool) -> Callable | None:
    """Return (i, j) -> product of the scales that are applied a group (or once), None if there are none."""
    a, b = scales
    if a.grouped is grouped and b.grouped is grouped:
        return lambda i, j: a.at(i, k) * b.at(j, k)
    if a.grouped is grouped:
        return lambda i, j: a.at(i, k)
    if b.grouped is grouped:
        return lambda i, j: b.at(j, k)
    return None


def _tile(name: str, operand) -> _Tile:
    region = to_buffer_region(operand)
    if len(region.region) < 2:
        raise ValueError(
            f"{_NAME}: {name} must have at least 2 dimensions; got {len(region.region)} ({region.buffer.name}); "
            "a product with a vector is a product with one row"
        )
    *lead, rows, cols = region.region
    if any(not _equal(axis.extent, 1) for axis in lead):
        raise ValueError(
            f"{_NAME}: leading dimensions of {name} must be fixed; got {region}; index them, as in {name}[stage, :, :]"
        )
    return _Tile(
        name, region.buffer, tuple(axis.min for axis in lead), rows.min, cols.min, _integer(rows.extent), _integer(cols.extent)
    )


def _check_types(a: _Tile, b: _Tile, c: _Tile) -> None:
    for tile in (a, b):
        if tile.dtype not in _OPERAND_DTYPES:
            hint = "E8M0 is a format of scales, pass it as scale_a or scale_b" if tile.dtype == E8M0.dtype else "use T.gemm"
            raise TypeError(f"{_NAME}: {tile.name} must be one of {', '.join(_OPERAND_DTYPES)}; got {tile.dtype}; {hint}")
    if c.dtype not in _ACCUMULATOR_DTYPES:
        raise TypeError(f"{_NAME}: C must be {', '.join(_ACCUMULATOR_DTYPES)}; got {c.dtype}; cast after the product")
    allowed = {"A": ("shared", "global", "fragment"), "B": ("shared", "global"), "C": ("fragment", "shared", "global")}
    for tile in (a, b, c):
        if tile.scope not in allowed[tile.name]:
            raise TypeError(
                f"{_NAME}: {tile.name} must be {', '.join(allowed[tile.name])}; got {tile.buffer.name} in scope {tile.scope}; "
                "copy it to shared memory with T.copy"
            )


def _check_tail(tile: _Tile, k_is_first: bool, K, step: int) -> None:
    """A copy of a whole step past K is masked by the end of the buffer only."""
    if tile.scope == "global" and not _equal(K % step, 0) and not _reaches_end(tile, k_is_first, K):
        raise ValueError(
            f"{_NAME}: K of a region must be a multiple of {step} or reach the end of its buffer; got {tile.name} with "
            f"K = {K}; pass a K that does, or the whole buffer"
        )


def _reaches_end(tile: _Tile, k_is_first: bool, K) -> bool:
    """Whether nothing follows the tile along K: a copy past its end then reads zeros."""
    begin, extent = (tile.row, tile.buffer.shape[-2]) if k_is_first else (tile.col, tile.buffer.shape[-1])
    return _equal(begin + K, extent)


def _scale(name: str, operand, rows, K, layout, origin, full) -> _Scale:
    """Read one operand of scales; `origin` and `full` place the tile (row, k) in its own buffer."""
    if isinstance(operand, tirx.PrimExpr) and not isinstance(operand, tirx.BufferLoad):
        _check_scale_dtype(name, str(operand.dtype), BlockScaledLayout.per_tensor())
        return _Scale(BlockScaledLayout.per_tensor(), 0, lambda i, k: T.cast(operand, "float32"))
    region = to_buffer_region(operand)
    buffer, extents = region.buffer, [axis.extent for axis in region.region]
    dtype = str(buffer.dtype)
    whole = all(
        _equal(axis.min, 0) and _equal(axis.extent, size) for axis, size in zip(region.region, buffer.shape, strict=True)
    )
    readings = [layout] if layout is not None else _layouts_of(dtype)
    places = [((0, 0), (rows, K))]
    if whole and not (_equal(full[0], rows) and _equal(full[1], K)):
        places.append((origin, full))  # scales of the whole matrix, of which the operand is a region
    found = {}
    for reading in readings:
        for place, (all_rows, all_k) in places:  # the whole matrix comes last, and wins where both fit
            fits = _fits(extents, reading, all_rows, all_k)
            if fits or (fits is None and layout is not None):
                found[reading] = place
    if len({(_reach(reading.rows, rows), _reach(reading.k, K)) for reading in found}) > 1:
        names = " or ".join(map(_describe, found))
        raise ValueError(f"{_NAME}: {name} of shape {extents} reads as {names}; got no scale_layout; pass scale_layout")
    if not found:
        _check_scale_dtype(name, dtype, layout)
        if layout is not None and layout.k is not None and layout.scale_format is not None and not _equal(K % layout.k, 0):
            raise ValueError(f"{_NAME}: K must be a multiple of the scale group {layout.k}; got K = {K}; pad K with zeros")
        wanted = ", ".join(_describe(reading) for reading in readings)
        raise ValueError(
            f"{_NAME}: {name} must fit {wanted} of an operand with {rows} rows and K = {K}; got shape {extents}; "
            "slice the scales as the operand is sliced, or pass scale_layout"
        )
    reading, (row0, k0) = next(iter(found.items()))
    _check_scale_dtype(name, dtype, reading)
    begins = [axis.min for axis in region.region]
    ends = [T.min(begin + extent, size) for begin, extent, size in zip(begins, extents, buffer.shape, strict=True)]

    # Rows past the end are not stored: any scale will do. Past the end of K lie elements that the copies filled with zeros: a
    # scale there counts as 0, since it could be infinite. A byte cannot, and is clamped: a choice costs registers that the
    # many scales of a step do not leave (45 spills on gfx1100).
    def at(i, k):
        row = 0 if reading.rows is None else T.min((row0 + i) // reading.rows, extents[-2 if len(extents) > 1 else 0] - 1)
        group = 0 if reading.k is None else (k0 + k) // reading.k
        if len(begins) > 1:
            index = [*begins[:-2], begins[-2] + row, begins[-1] + group]
        else:
            index = [begins[0] + (row if reading.k is None else group)]
        if reading.scale_format is E8M0:
            index[-1] = T.min(index[-1], ends[-1] - 1)
            return e8m0_to_float(buffer[tuple(index)])
        value = T.cast(buffer[tuple(index)], "float32")
        return value if reading.k is None else T.if_then_else(index[-1] < ends[-1], value, T.float32(0))

    def bytes_of(k, size):
        row, group = begins[-2] + row0, begins[-1] + (k0 + k) // reading.k
        axes = (
            *(slice(first, first + 1) for first in begins[:-2]),
            slice(row, row + rows),
            slice(group, group + size // reading.k),
        )
        return buffer[axes]

    is_bytes_a_row = reading.scale_format is E8M0 and reading.rows == 1 and len(begins) > 1
    return _Scale(reading, k0, at, bytes_of if is_bytes_a_row else None)


def _layouts_of(dtype: str) -> list[BlockScaledLayout]:
    if dtype in _SCALE_DTYPES[True]:
        return [BlockScaledLayout.e8m0_k32()]
    blocks = BlockScaledLayout.block(1, FP8_BLOCK), BlockScaledLayout.block(FP8_BLOCK, FP8_BLOCK)
    return [BlockScaledLayout.per_tensor(), BlockScaledLayout.per_row(), *blocks]


def _check_scale_dtype(name: str, dtype: str, layout: BlockScaledLayout | None) -> None:
    allowed = [
        d for byte, dtypes in _SCALE_DTYPES.items() for d in dtypes if layout is None or byte == (layout.scale_format is E8M0)
    ]
    if dtype not in allowed:
        what = "" if layout is None else f" for {_describe(layout)}"
        raise TypeError(f"{_NAME}: {name} must be {', '.join(allowed)}{what}; got {dtype}; convert the scales")


def _fits(extents, layout: BlockScaledLayout, rows, K) -> bool | None:
    """Whether scales of this shape cover rows x K: True, False, or None where symbolic extents leave it open."""
    row_blocks = 1 if layout.rows is None else _ceildiv(rows, layout.rows)
    k_blocks = 1 if layout.k is None else _ceildiv(K, layout.k)
    if layout.scale_format is not None and _differ(K % layout.k, 0):
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
    if all(_equal(got, want) for got, want in pairs):
        return True
    return False if any(_differ(got, want) for got, want in pairs) else None


def _reach(block: int | None, extent) -> object:
    """Return a block's extent as far as the tile goes: readings that agree on it mean the same."""
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


def _extents(buffer: tirx.Buffer, k_is_first: bool) -> tuple:
    """Return (rows, K) of the whole matrix that a buffer holds."""
    first, second = (_integer(extent) for extent in buffer.shape[-2:])
    return (second, first) if k_is_first else (first, second)


def _ceildiv(extent, block: int):
    return -(-extent // block) if isinstance(extent, int) else (extent + block - 1) // block


def _integer(extent):
    return int(extent) if isinstance(extent, (int, tirx.IntImm)) else extent


def _constant(what: str, extent) -> int:
    if not isinstance(extent, int):
        raise ValueError(f"{_NAME}: {what} must be a constant; got {extent}; tile it and mask the tail when copying")
    return extent


def _equal(first, second) -> bool:
    if isinstance(first, int) and isinstance(second, int):
        return first == second
    return arith.Analyzer().can_prove_equal(tirx.convert(first), tirx.convert(second))


def _differ(first, second) -> bool:
    if isinstance(first, int) and isinstance(second, int):
        return first != second
    return arith.Analyzer().can_prove(tirx.convert(first) != tirx.convert(second))

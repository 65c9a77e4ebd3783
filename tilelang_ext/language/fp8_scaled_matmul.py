"""`T.fp8_scaled_matmul`: a product of fp8 tiles whose scales may cover the tensor, rows, blocks or 32 elements of K.

    C[i, j] += sum over groups g of scale_a[i, g] * scale_b[j, g] * (A[i, g] . B[g, j])

| operand | shape | dtype | scope |
| --- | --- | --- | --- |
| A | (M, K), or (K, M) transposed | an fp8 type | shared, global, fragment |
| B | (K, N), or (N, K) transposed | an fp8 type, its own | shared, global |
| scale_a, scale_b | see `BlockScaledLayout`; rows are M of A and N of B | float32, float16, bfloat16; uint8 or e8m0 | any |
| C | (M, N) | float32, float16, bfloat16 | fragment, shared, global |

Each may be a buffer or a region of one. The sum is kept in float32: at most 128 of K go into one accumulator of the matrix
unit, groups are scaled as they are added, scales of the whole K are applied once at the end, and C is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tilelang.language as T

from tilelang_ext.formats import E8M0, FP8_OPERANDS, BlockScaledLayout
from tilelang_ext.language.block_scaled import block_scaled
from tilelang_ext.language.scaled_product import scaled_product
from tilelang_ext.language.scales import Scales, read_scales
from tilelang_ext.language.tile import Tile, differ, equal, integer, tile
from tilelang_ext.marks import READ_ONCE, REQUIRE_NATIVE_FP8, SCALED_PRODUCT

_NAME = "T.fp8_scaled_matmul"
_OPERAND_DTYPES = tuple(format.dtype for format in FP8_OPERANDS)
_ACCUMULATOR_DTYPES = ("float32", "float16", "bfloat16")
_STAGING_BYTES = 16 * 1024  # for staged tiles of global operands: half of what the smallest target has
_MATRIX_K = 32  # what matrix units take at most in one instruction
_PROMOTE_K = 128  # K elements summed in the matrix unit before the sum moves on in float32


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
    use_fast_accum: bool = False,
    require_native: bool = False,
) -> None:
    """Add the product of two fp8 tiles, each times its scales, to C; with `clear_accum` overwrite C.

    `scale_layout` says what a scale covers: one layout for both operands, or a pair for A and B. Without it, the layout
    follows from the shapes and dtypes of the scales. What C held is never scaled. M, N and the K of tiles in shared memory or
    fragments are constants; the K of global operands may be symbolic. Where the matrix unit takes no fp8, codes are decoded to
    half, which is exact; with `require_native`, lowering to such a target raises NotImplementedError instead.

    On Hopper the sums of a loop over K move on to float32 every 128 elements. `use_fast_accum` lets them stay in the matrix
    unit, which keeps fewer bits, where no scale changes along K; elsewhere it changes nothing.

    Raises TypeError for dtypes and scopes, ValueError for shapes and layouts, NotImplementedError for what no target has.
    """
    a, b, c = tile(_NAME, "A", A), tile(_NAME, "B", B), tile(_NAME, "C", C)
    _check_types(a, b, c)
    (M, K), (N, K_b) = _rows_and_k(a.shape, transpose_A), _rows_and_k(b.shape, not transpose_B)
    for what, first, second in (("M of A and C", M, c.shape[0]), ("N of B and C", N, c.shape[1]), ("K of A and B", K, K_b)):
        if not equal(first, second):
            raise ValueError(
                f"{_NAME}: {what} must agree; got {first} and {second}; check the shapes and transpose_A, transpose_B"
            )
    M, N = _constant("M", M), _constant("N", N)
    if a.scope != "global" or b.scope != "global":
        K = _constant("K of a tile in shared memory or a fragment", K)
    layouts = scale_layout if isinstance(scale_layout, tuple) else (scale_layout, scale_layout)
    scales = (
        _scales_of(a, transpose_A, (M, K), "scale_a", scale_a, layouts[0]),
        _scales_of(b, not transpose_B, (N, K), "scale_b", scale_b, layouts[1]),
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
            f"of {group}; keep A in shared memory, or call once per group"
        )

    for operand, scale in zip((a, b), scales, strict=True):
        if scale.layout.k is not None and differ(scale.k0 % min(scale.layout.k, step), 0):
            raise ValueError(
                f"{_NAME}: a region beside the scales of the whole matrix must begin at a scale group; got {operand.name} from "
                f"{scale.k0} of K on with groups of {scale.layout.k}; begin at a multiple of {scale.layout.k}"
            )
    _check_tail(a, transpose_A, K, step)
    _check_tail(b, not transpose_B, K, step)
    staged = a.scope == "global" or b.scope == "global"
    stages = 2 if 2 * (M + N) * step <= _STAGING_BYTES else 1
    once = not staged and group >= K  # one product: the accumulator of the matrix unit is the sum
    factor_of_rows = _factor(scales, 0, grouped=False)
    annotations = {REQUIRE_NATIVE_FP8: 1} if require_native else {}

    product_mark: dict[str, list] = {}
    rest_mark: dict[str, list] = {}
    if once and not clear_accum and not transpose_A and transpose_B and a.scope == "shared" and c.scope == "fragment":
        of_step, of_all_k = (
            (_of_rows(scales[0], grouped=grouped), _of_rows(scales[1], grouped=grouped)) for grouped in (True, False)
        )
        A, B, C = (operand.region(*((0, extent) for extent in operand.shape)) for operand in (a, b, c))
        product_mark = scaled_product(A, B, C, of_step, of_all_k, fast=use_fast_accum)
        rest_mark = {SCALED_PRODUCT: []}

    # Constants reach macros as closures: a macro turns the numbers it is given into variables.
    @T.macro
    def add_product(total, A_k, B_k, factor, marks):
        if once:
            T.gemm(
                A_k,
                B_k,
                total,
                transpose_A=transpose_A,
                transpose_B=transpose_B,
                clear_accum=True,
                annotations=annotations | product_mark,
            )
            if factor is not None:
                for i, j in T.Parallel(M, N, annotations={READ_ONCE: 1} | rest_mark):
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

    def add_products(total, A_s: Tile, B_s: Tile, size: int, k) -> None:
        """Add the products of `size` elements of K, from element `k` of the operands on, one per scale group."""
        for number, offset in enumerate(range(0, size, group)):
            width = min(group, size - offset)
            A_k = _along_k(A_s, transpose_A, M, offset, width)
            B_k = _along_k(B_s, not transpose_B, N, offset, width)
            marks = [mark(total, A_s, B_s, size, k, 2 * number + i) for i in (0, 1)]
            add_product(total, A_k, B_k, _factor(scales, k + offset, grouped=True), marks)

    def mark(total, A_s: Tile, B_s: Tile, size: int, k, part: int) -> dict:
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
                A_t = tile(_NAME, "A", A_s) if a.scope == "global" else _from_k(a, transpose_A, t * step)
                B_t = tile(_NAME, "B", B_s) if b.scope == "global" else _from_k(b, not transpose_B, t * step)
                add_products(total, A_t, B_t, step, t * step)
        else:
            add_products(total, a, b, K, 0)
        for i, j in T.Parallel(M, N, annotations={READ_ONCE: 1} | rest_mark):
            value = total[i, j] if factor_of_rows is None else total[i, j] * factor_of_rows(i, j)
            if clear_accum:
                c.buffer[c.index(i, j)] = T.cast(value, c.dtype)
            else:
                c.buffer[c.index(i, j)] = T.cast(T.cast(c.buffer[c.index(i, j)], "float32") + value, c.dtype)

    scaled_matmul()


def _rows_and_k(pair: Sequence, k_is_first: bool) -> tuple:
    """Return what belongs to an operand's two axes as (rows, K), the rows being M of A and N of B."""
    first, second = pair
    return (second, first) if k_is_first else (first, second)


def _scales_of(operand: Tile, k_is_first: bool, shape: tuple, name: str, scale, layout: BlockScaledLayout | None) -> Scales:
    begin = _rows_and_k(operand.begin, k_is_first)
    matrix = _rows_and_k([integer(extent) for extent in operand.buffer.shape[-2:]], k_is_first)
    return read_scales(_NAME, name, scale, layout, shape, begin, matrix)


def _along_k(operand: Tile, k_is_first: bool, rows: int, k, size: int):
    """Return `size` elements along K from `k` on, of all rows: a region, or a fragment as it is."""
    if operand.scope == "fragment":
        return operand.buffer
    return operand.region(*_rows_and_k(((0, rows), (k, size)), k_is_first))


def _from_k(operand: Tile, k_is_first: bool, k) -> Tile:
    """Return the operand from element `k` of K on."""
    return operand.moved(*_rows_and_k((0, k), k_is_first))


def _factor(scales: tuple[Scales, Scales], k, *, grouped: bool) -> Callable | None:
    """Return (i, j) -> product of the scales that change along K (`grouped`) or that do not; None if there are none."""
    a, b = scales
    if a.grouped is grouped and b.grouped is grouped:
        return lambda i, j: a.at(i, k) * b.at(j, k)
    if a.grouped is grouped:
        return lambda i, j: a.at(i, k)
    if b.grouped is grouped:
        return lambda i, j: b.at(j, k)
    return None


def _of_rows(scale: Scales, *, grouped: bool) -> Callable:
    """Return i -> the scale of row i of a tile that is one step of K; 1 if it is not `grouped` as asked."""
    return (lambda i: scale.at(i, 0)) if scale.grouped is grouped else (lambda i: T.float32(1))


def _check_types(a: Tile, b: Tile, c: Tile) -> None:
    for operand in (a, b):
        hint = "E8M0 is a format of scales, pass it as scale_a or scale_b" if operand.dtype == E8M0.dtype else "use T.gemm"
        operand.check_dtype(*_OPERAND_DTYPES, hint=hint)
    c.check_dtype(*_ACCUMULATOR_DTYPES, hint="cast after the product")
    hint = "copy it to shared memory with T.copy"
    a.check_scope("shared", "global", "fragment", hint=hint)
    b.check_scope("shared", "global", hint=hint)
    c.check_scope("fragment", "shared", "global", hint=hint)


def _check_tail(operand: Tile, k_is_first: bool, K, step: int) -> None:
    """A copy of a whole step past K is masked by the end of the buffer only."""
    if operand.scope == "global" and not equal(K % step, 0) and not _reaches_end(operand, k_is_first, K):
        raise ValueError(
            f"{_NAME}: K of a region must be a multiple of {step} or reach the end of its buffer; got {operand.name} with "
            f"K = {K}; pass a K that does, or the whole buffer"
        )


def _reaches_end(operand: Tile, k_is_first: bool, K) -> bool:
    """Whether the buffer ends where the operand ends along K: a copy past that end then reads zeros."""
    axis = -2 if k_is_first else -1
    return equal(operand.begin[axis] + K, operand.buffer.shape[axis])


def _constant(what: str, extent) -> int:
    if not isinstance(extent, int):
        raise ValueError(f"{_NAME}: {what} must be a constant; got {extent}; tile it and mask the tail when copying")
    return extent

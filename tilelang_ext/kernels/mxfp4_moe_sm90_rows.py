"""Rows of tokens for the products of a mixture of experts on Hopper: put in sorted order, and quantised to E4M3.

A row's scale is that of `quantize.quantize`: float32(amax / 448), at least the smallest normal, 1 for a row of zeros. A row
with a NaN or an infinity gets the scale NaN. Its codes are those of `quantize.quantize` too, for scales of at least 2^-93.
"""

import math

from tilelang_ext import language as T
from tilelang_ext.formats import E4M3, MX_GROUP
from tilelang_ext.language.narrow_floats import INF

# The one barrier is where it must be, and accesses stay inside by the limits below.
PASS_CONFIGS = {"tl.disable_safe_memory_legalize": True, "tl.disable_thread_storage_sync": True}
_THREADS, _ELEMENTS = 128, 8  # of 16 bytes
_COLUMNS = _THREADS * _ELEMENTS


def scatter():
    """The prim_func: (x, positions, sorted_x), rows of x (tokens, H) bfloat16 to where `moe_sort` has put their slots.

    Rows that are padding are left as they are.
    """
    tokens, top_k, groups, rows = (T.dynamic(name) for name in ("tokens", "top_k", "groups", "rows"))
    H = groups * MX_GROUP

    @T.prim_func
    def scatter(
        x: T.Tensor((tokens, H), "bfloat16"),
        positions: T.Tensor((tokens, top_k), "int32"),
        sorted_x: T.Tensor((rows, H), "bfloat16"),
    ):
        with T.Kernel(tokens, T.ceildiv(H, _COLUMNS), threads=_THREADS) as (token, by):  # y ends at 65535
            values = T.alloc_local((_ELEMENTS,), "bfloat16")
            column = by * _COLUMNS + T.get_thread_binding() * _ELEMENTS
            if column < H:
                for v in T.vectorized(_ELEMENTS):
                    values[v] = x[token, column + v]
                for slot in T.serial(top_k):
                    row = T.alloc_var("int32", positions[token, slot])
                    if row >= 0:
                        for v in T.vectorized(_ELEMENTS):
                            sorted_x[row, column + v] = values[v]

    return scatter


@T.macro
def _scale_of(x, row, K):
    """Return the scale of a row; the threads of the block find it together."""
    values, largest_s = T.alloc_local((_ELEMENTS,), "bfloat16"), T.alloc_shared((_THREADS // 32,), "int32")
    amax, tx = T.alloc_var("int32", 0), T.get_thread_binding()
    for step in T.serial(T.ceildiv(K, _COLUMNS)):
        column = step * _COLUMNS + tx * _ELEMENTS
        if column < K:
            for v in T.vectorized(_ELEMENTS):
                values[v] = x[row, column + v]
            for v in T.unroll(_ELEMENTS):  # as integers: a NaN is the largest
                amax = T.max(amax, T.reinterpret(T.cast(values[v], "float32"), "int32") & 0x7FFFFFFF)
    amax = T.warp_reduce_max(amax)
    if tx % 32 == 0:
        largest_s[tx // 32] = amax
    T.sync_threads()
    for warp in T.unroll(_THREADS // 32):
        amax = T.max(amax, largest_s[warp])
    scale = T.alloc_var("float32", T.max(T.reinterpret(amax, "float32") / T.float32(E4M3.max), T.float32(2.0**-126)))
    if amax == 0:
        scale = T.float32(1)
    if amax >= INF:
        scale = T.float32(math.nan)
    return scale


@T.macro
def _codes_of(x, row, column, scale, codes):
    values, quotients = T.alloc_local((_ELEMENTS,), "bfloat16"), T.alloc_local((_ELEMENTS,), "float32")
    for v in T.vectorized(_ELEMENTS):
        values[v] = x[row, column + v]
    for v in T.unroll(_ELEMENTS):
        quotients[v] = _rounded_to_odd(T.cast(values[v], "float32"), scale)
    for v in T.vectorized(_ELEMENTS):
        codes[v] = T.cast(quotients[v], "float8_e4m3fn")


@T.macro
def _rounded_to_odd(x, scale):
    """Return x / scale for a second rounding: of two neighbours around the quotient the odd one, which is never a tie."""
    quotient = T.alloc_var("float32", x / scale)
    remainder = T.alloc_var("float32", T.call_pure_extern("float32", "fmaf", -quotient, scale, x))
    bits = T.alloc_var("int32", T.reinterpret(quotient, "int32"))
    if remainder != T.float32(0):
        bits = (bits - T.cast((T.reinterpret(remainder, "int32") ^ bits) < 0, "int32")) | 1
    return T.reinterpret(bits, "float32")


def scatter_quantized():
    """The prim_func: (x, positions, codes, scale), rows of x (tokens, H) bfloat16 as E4M3 to where their slots are.

    codes (rows, H), scale (rows,) float32. Rows that are padding are left as they are.
    """
    tokens, top_k, groups, rows = (T.dynamic(name) for name in ("tokens", "top_k", "groups", "rows"))
    H = groups * MX_GROUP

    @T.prim_func
    def scatter_quantized(
        x: T.Tensor((tokens, H), "bfloat16"),
        positions: T.Tensor((tokens, top_k), "int32"),
        codes: T.Tensor((rows, H), "float8_e4m3fn"),
        scale: T.Tensor((rows,), "float32"),
    ):
        with T.Kernel(tokens, threads=_THREADS) as token:
            own = T.alloc_local((_ELEMENTS,), "float8_e4m3fn")
            tx = T.get_thread_binding()
            row_scale = _scale_of(x, token, H)
            for slot in T.serial(T.ceildiv(top_k, _THREADS)):
                if slot * _THREADS + tx < top_k:
                    row = T.alloc_var("int32", positions[token, slot * _THREADS + tx])
                    if row >= 0:
                        scale[row] = row_scale
            for step in T.serial(T.ceildiv(H, _COLUMNS)):
                column = step * _COLUMNS + tx * _ELEMENTS
                if column < H:
                    _codes_of(x, token, column, row_scale, own)
                    for slot in T.serial(top_k):
                        row = T.alloc_var("int32", positions[token, slot])
                        if row >= 0:
                            for v in T.vectorized(_ELEMENTS):
                                codes[row, column + v] = own[v]

    return scatter_quantized


def quantize_sorted():
    """The prim_func: (x, positions, codes, scale), rows of x (rows, K) bfloat16 as E4M3, those in which a slot is.

    positions (slots,) of `moe_sort`, codes (rows, K), scale (rows,) float32. Other rows are left as they are.
    """
    slots, groups, rows = T.dynamic("slots"), T.dynamic("groups"), T.dynamic("rows")
    K = groups * MX_GROUP

    @T.prim_func
    def quantize_sorted(
        x: T.Tensor((rows, K), "bfloat16"),
        positions: T.Tensor((slots,), "int32"),
        codes: T.Tensor((rows, K), "float8_e4m3fn"),
        scale: T.Tensor((rows,), "float32"),
    ):
        with T.Kernel(slots, threads=_THREADS) as slot:
            own = T.alloc_local((_ELEMENTS,), "float8_e4m3fn")
            tx, row = T.get_thread_binding(), T.alloc_var("int32", positions[slot])
            if row >= 0:
                row_scale = _scale_of(x, row, K)
                if tx == 0:
                    scale[row] = row_scale
                for step in T.serial(T.ceildiv(K, _COLUMNS)):
                    column = step * _COLUMNS + tx * _ELEMENTS
                    if column < K:
                        _codes_of(x, row, column, row_scale, own)
                        for v in T.vectorized(_ELEMENTS):
                            codes[row, column + v] = own[v]

    return quantize_sorted

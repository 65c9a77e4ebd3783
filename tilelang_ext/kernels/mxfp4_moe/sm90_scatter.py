"""Rows of tokens for the products of a mixture of experts on Hopper: put in sorted order, and quantised to E4M3.

A row's scale is that of `quantization.quantize`: float32(amax / 448), at least the smallest normal, 1 for a row of zeros. A row
with a NaN or an infinity gets the scale NaN. Its codes are those of `quantization.quantize` too, for scales of at least 2^-93.

A block of threads holds a row in registers between its largest element and its codes, all its loads under way together. Blocks
start before the launch before theirs has ended, and wait for its end; docs/design/decisions.md has what may come before.
"""

import math
from collections.abc import Callable

from tilelang_ext import language as T
from tilelang_ext.formats import E4M3, MX_GROUP
from tilelang_ext.kernels.mxfp4_moe.problem import Problem
from tilelang_ext.kernels.mxfp4_moe.routing import MAX_TOP_K
from tilelang_ext.language.narrow_floats import INF

# The one barrier is where it must be, and accesses stay inside by the limits below.
PASS_CONFIGS = {"tl.disable_safe_memory_legalize": True, "tl.disable_thread_storage_sync": True}
_ELEMENTS = 8  # of 16 bytes
_THREADS = 128  # of `scatter`; each thread has a slot at most, here and where rows are quantised
assert _THREADS > MAX_TOP_K
_COLUMNS = _THREADS * _ELEMENTS
_SIGN = -(1 << 31)


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
            values, rows_s = T.alloc_local((_ELEMENTS,), "bfloat16"), T.alloc_shared((MAX_TOP_K,), "int32")
            tx = T.get_thread_binding()
            # A variable: of the same expression in an address, nvcc 13.0 makes four stores of one.
            chunk = T.alloc_var("int32", by * _THREADS + tx)
            if chunk * _ELEMENTS < H:
                for v in T.vectorized(_ELEMENTS):
                    values[v] = x[token, chunk * _ELEMENTS + v]  # of a launch before the sort
            T.pdl_sync()
            T.pdl_trigger()
            if tx < top_k:
                rows_s[tx] = positions[token, tx]
            T.sync_threads()
            if chunk * _ELEMENTS < H:
                for slot in T.serial(top_k):
                    row = T.alloc_var("int32", rows_s[slot])
                    if row >= 0:
                        for v in T.vectorized(_ELEMENTS):
                            sorted_x[row, chunk * _ELEMENTS + v] = values[v]

    return scatter


def _quantizer(columns: int):
    """Return (threads, allocate, load, scale_of, quantize, store): the macros by which a block quantises a row."""
    # As few threads as hold a row: many small blocks, of which some load while others wait for their largest element.
    threads = _THREADS if columns <= 2048 else 2 * _THREADS
    steps = -(-columns // (threads * _ELEMENTS))

    def allocate(dtype: str):
        return T.alloc_local((steps * _ELEMENTS,), dtype)

    @T.macro
    def load(x, row, values, tx):
        for step in T.unroll(steps):
            for v in T.vectorized(_ELEMENTS):
                column = (step * threads + tx) * _ELEMENTS
                values[step * _ELEMENTS + v] = T.if_then_else(column < columns, x[row, column + v], T.bfloat16(0))

    @T.macro
    def scale_of(values, tx):
        """Return the scale, which the threads find together; what they wrote to shared memory before is seen after."""
        largest_s, amax = T.alloc_shared((threads // 32,), "int32"), T.alloc_var("int32", 0)
        for i in T.unroll(steps * _ELEMENTS):  # as integers: a NaN is the largest
            amax = T.max(amax, T.reinterpret(T.cast(values[i], "float32"), "int32") & ~_SIGN)
        amax = T.warp_reduce_max(amax)
        if tx % 32 == 0:
            largest_s[tx // 32] = amax
        T.sync_threads()
        for warp in T.unroll(threads // 32):
            amax = T.max(amax, largest_s[warp])
        scale = T.alloc_var("float32", T.max(T.reinterpret(amax, "float32") / T.float32(E4M3.max), T.float32(2.0**-126)))
        if amax == 0:
            scale = T.float32(1)
        if amax >= INF:
            scale = T.float32(math.nan)
        return scale

    @T.macro
    def quantize(values, scale, codes):
        quotients, inverse = T.alloc_local((_ELEMENTS,), "float32"), T.alloc_var("float32", T.float32(1) / scale)
        for step in T.unroll(steps):
            for v in T.unroll(_ELEMENTS):
                quotients[v] = _rounded_to_odd(T.cast(values[step * _ELEMENTS + v], "float32"), scale, inverse)
            for v in T.vectorized(_ELEMENTS):
                codes[step * _ELEMENTS + v] = T.cast(quotients[v], "float8_e4m3fn")

    @T.macro
    def store(own, codes, row, tx):
        for step in T.unroll(steps):
            column = (step * threads + tx) * _ELEMENTS
            if column < columns:
                for v in T.vectorized(_ELEMENTS):
                    codes[row, column + v] = own[step * _ELEMENTS + v]

    return threads, allocate, load, scale_of, quantize, store


def _fma(a, b, c):
    return T.call_pure_extern("float32", "fmaf", a, b, c)


@T.macro
def _rounded_to_odd(x, scale, inverse):
    """Return x / scale for a second rounding: of two neighbours around the quotient the odd one, which is never a tie.

    x * inverse is within two units of it; with what remains added, one of the neighbours, or the quotient itself if it is a
    float: remainders are exact, and that of a neighbour says on which side it lies. The sign of -0 is lost on the way.
    """
    guess = T.alloc_var("float32", x * inverse)
    quotient = T.alloc_var("float32", _fma(_fma(-guess, scale, x), inverse, guess))
    remainder = T.alloc_var("float32", _fma(-quotient, scale, x))
    bits = T.alloc_var("int32", T.reinterpret(quotient, "int32"))
    if remainder != T.float32(0):
        bits = (bits - T.cast((T.reinterpret(remainder, "int32") ^ bits) < 0, "int32")) | 1
    return T.reinterpret(bits | T.reinterpret(x, "int32") & T.int32(_SIGN), "float32")


def scatter_quantized(columns: int):
    """The prim_func: (x, positions, codes, scale), rows of x (tokens, columns) bfloat16 as E4M3 to where their slots are.

    codes (rows, columns), scale (rows,) float32. Rows that are padding are left as they are.
    """
    tokens, top_k, rows = (T.dynamic(name) for name in ("tokens", "top_k", "rows"))
    threads, allocate, load, scale_of, quantize, store = _quantizer(columns)

    @T.prim_func
    def scatter_quantized(
        x: T.Tensor((tokens, columns), "bfloat16"),
        positions: T.Tensor((tokens, top_k), "int32"),
        codes: T.Tensor((rows, columns), "float8_e4m3fn"),
        scale: T.Tensor((rows,), "float32"),
    ):
        with T.Kernel(tokens, threads=threads) as token:
            values, own = allocate("bfloat16"), allocate("float8_e4m3fn")
            tx, rows_s = T.get_thread_binding(), T.alloc_shared((MAX_TOP_K,), "int32")
            own_row = T.alloc_var("int32", -1)
            load(x, token, values, tx)  # of a launch before the sort
            T.pdl_sync()
            T.pdl_trigger()
            if tx < top_k:
                own_row = positions[token, tx]
                rows_s[tx] = own_row
            row_scale = scale_of(values, tx)
            if own_row >= 0:
                scale[own_row] = row_scale
            quantize(values, row_scale, own)
            for slot in T.serial(top_k):
                row = T.alloc_var("int32", rows_s[slot])
                if row >= 0:
                    store(own, codes, row, tx)

    return scatter_quantized


def quantize_sorted(columns: int):
    """The prim_func: (x, positions, codes, scale), rows of x (rows, columns) bfloat16 as E4M3, those in which a slot is.

    positions (slots,) of `moe_sort`, codes (rows, columns), scale (rows,) float32. Other rows are left as they are.
    """
    slots, rows = T.dynamic("slots"), T.dynamic("rows")
    threads, allocate, load, scale_of, quantize, store = _quantizer(columns)

    @T.prim_func
    def quantize_sorted(
        x: T.Tensor((rows, columns), "bfloat16"),
        positions: T.Tensor((slots,), "int32"),
        codes: T.Tensor((rows, columns), "float8_e4m3fn"),
        scale: T.Tensor((rows,), "float32"),
    ):
        with T.Kernel(slots, threads=threads) as slot:
            values, own = allocate("bfloat16"), allocate("float8_e4m3fn")
            tx, row = T.get_thread_binding(), T.alloc_var("int32", positions[slot])  # of a launch before the product
            T.pdl_sync()
            T.pdl_trigger()
            if row >= 0:
                load(x, row, values, tx)
                row_scale = scale_of(values, tx)
                if tx == 0:
                    scale[row] = row_scale
                quantize(values, row_scale, own)
                store(own, codes, row, tx)

    return quantize_sorted


def compile_scatter(problem: Problem, device) -> Callable:
    """Return scatter(x, routing), which returns the rows of x in sorted order and their scales (for bfloat16 none: empty)."""
    H = problem.hidden_size
    if problem.a_format == "bfloat16":
        put_in_order = device.compile(scatter, pass_configs=PASS_CONFIGS)
    else:
        put_in_order = device.compile(scatter_quantized, H, pass_configs=PASS_CONFIGS)

    def run(x, routing) -> tuple:
        rows = len(routing.token_ids)
        if problem.a_format == "bfloat16":
            sorted_x, scale = device.empty(rows, H, dtype="bfloat16"), device.empty(0, dtype="float32")
            put_in_order(x, routing.positions, sorted_x)
        else:
            sorted_x, scale = _empty_rows(rows, H, device)
            put_in_order(x, routing.positions, sorted_x, scale)
        return sorted_x, scale

    return run


def compile_requantize(problem: Problem, device) -> Callable:
    """Return requantize(hidden, routing), which returns the hidden rows as the second GEMM takes them, and their scales."""
    if problem.a_format == "bfloat16":
        return lambda hidden, routing: (hidden, device.empty(0, dtype="float32"))
    quantize = device.compile(quantize_sorted, problem.intermediate_size, pass_configs=PASS_CONFIGS)

    def run(hidden, routing) -> tuple:
        codes, scale = _empty_rows(*hidden.shape, device)
        quantize(hidden, routing.positions.flatten(), codes, scale)
        return codes, scale

    return run


def _empty_rows(rows: int, columns: int, device) -> tuple:
    """Return tensors for rows of E4M3 and their scales."""
    return device.empty(rows, columns, dtype="float8_e4m3fn"), device.empty(rows, dtype="float32")

"""Rows of activations for the GEMMs of a mixture of experts on Hopper: put in sorted order, and quantised to E4M3.

| kernel | one block has | reads | writes |
| --- | --- | --- | --- |
| `scatter` | a token, 1024 columns | x | the rows of its slots |
| `scatter_quantized` | a token | x | the rows of its slots as E4M3, and their scales |
| `quantize_sorted` | a slot | its hidden row | the same row as E4M3, and its scale |

The scale of a row is that of `quantization.quantize`: float32(amax / 448), at least the smallest normal number, and 1 for a row
of zeros. A row with a NaN or an infinity gets the scale NaN. The codes are those of `quantization.quantize` for scales of at
least 2^-93.

`T.moe_gather` reads a row once for each of its slots; here a token's row is read, and quantised, once for all of them.

Warp roles: none, all threads of a block do the same. There is no pipeline: a block loads its row into registers, all loads in
flight together, and many blocks per SM overlap. Timeline of a block that quantises:

    load the row | amax of the warp, barrier, amax of the block | scale | quantise | store

With PDL, blocks start before the kernel launched before them has ended. They load what that kernel does not write, and wait for
its end before all else; docs/design/decisions.md lists what may come before.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tilelang_ext import language as T
from tilelang_ext.codes import INF
from tilelang_ext.formats import E4M3, MX_GROUP
from tilelang_ext.kernels.mxfp4_moe.problem import MAX_TOP_K, Problem
from tilelang_ext.kernels.sm90 import pdl
from tilelang_ext.kernels.sm90.roles import WARP

# The one barrier is where it must be, and the kernels' own bounds checks keep all accesses inside.
PASS_CONFIGS = {"tl.disable_safe_memory_legalize": True, "tl.disable_thread_storage_sync": True}
_ELEMENTS = 8  # of a load of 16 bytes
_THREADS = 128  # of a block; each thread reads the row of at most one slot
assert _THREADS > MAX_TOP_K
_COLUMNS = _THREADS * _ELEMENTS
_SIGN = -(1 << 31)


def scatter():
    """Return the prim_func (x, positions, sorted_x), which copies the rows of x to the rows of their slots.

    x (tokens, H) bfloat16, positions (tokens, top_k) as `moe_sort` writes it, sorted_x (rows, H) bfloat16. Rows of padding are
    not written.
    """
    tokens, top_k, groups, rows = (T.dynamic(name) for name in ("tokens", "top_k", "groups", "rows"))
    H = groups * MX_GROUP

    @T.prim_func
    def scatter(
        x: T.Tensor((tokens, H), "bfloat16"),
        positions: T.Tensor((tokens, top_k), "int32"),
        sorted_x: T.Tensor((rows, H), "bfloat16"),
    ):
        with T.Kernel(tokens, T.ceildiv(H, _COLUMNS), threads=_THREADS) as (token, by):  # the second axis ends at 65535
            values, rows_s = T.alloc_local((_ELEMENTS,), "bfloat16"), T.alloc_shared((MAX_TOP_K,), "int32")
            tx = T.get_thread_binding()
            # A variable, since nvcc 13.0 splits each 16-byte store into four when the address has the expression itself.
            chunk = T.alloc_var("int32", by * _THREADS + tx)
            if chunk * _ELEMENTS < H:
                for v in T.vectorized(_ELEMENTS):
                    values[v] = x[token, chunk * _ELEMENTS + v]  # x was written before the sort
            pdl.wait()
            pdl.trigger()
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


def scatter_quantized(columns: int):
    """Return the prim_func (x, positions, codes, scale), which writes the rows of x as E4M3 to the rows of their slots.

    x (tokens, columns) bfloat16, positions (tokens, top_k) as `moe_sort` writes it, codes (rows, columns), scale (rows,)
    float32. Rows of padding are not written.
    """
    tokens, top_k, rows = (T.dynamic(name) for name in ("tokens", "top_k", "rows"))
    row_of_block = _Row(columns)

    @T.prim_func
    def scatter_quantized(
        x: T.Tensor((tokens, columns), "bfloat16"),
        positions: T.Tensor((tokens, top_k), "int32"),
        codes: T.Tensor((rows, columns), "float8_e4m3fn"),
        scale: T.Tensor((rows,), "float32"),
    ):
        with T.Kernel(tokens, threads=row_of_block.threads) as token:
            values, codes_r = row_of_block.alloc("bfloat16"), row_of_block.alloc("float8_e4m3fn")
            tx, rows_s = T.get_thread_binding(), T.alloc_shared((MAX_TOP_K,), "int32")
            thread_row = T.alloc_var("int32", -1)  # of slot tx
            row_of_block.load(x, token, values, tx)  # x was written before the sort
            pdl.wait()
            pdl.trigger()
            if tx < top_k:
                thread_row = positions[token, tx]
                rows_s[tx] = thread_row
            row_scale = row_of_block.scale(values, tx)  # with the barrier that makes rows_s visible
            if thread_row >= 0:
                scale[thread_row] = row_scale
            row_of_block.quantize(values, row_scale, codes_r)
            for slot in T.serial(top_k):
                row = T.alloc_var("int32", rows_s[slot])
                if row >= 0:
                    row_of_block.store(codes_r, codes, row, tx)

    return scatter_quantized


def quantize_sorted(columns: int):
    """Return the prim_func (x, positions, codes, scale), which writes the rows of x that have a slot as E4M3.

    x (rows, columns) bfloat16, positions (slots,) as `moe_sort` writes it, codes (rows, columns), scale (rows,) float32. Other
    rows are not written.
    """
    slots, rows = T.dynamic("slots"), T.dynamic("rows")
    row_of_block = _Row(columns)

    @T.prim_func
    def quantize_sorted(
        x: T.Tensor((rows, columns), "bfloat16"),
        positions: T.Tensor((slots,), "int32"),
        codes: T.Tensor((rows, columns), "float8_e4m3fn"),
        scale: T.Tensor((rows,), "float32"),
    ):
        with T.Kernel(slots, threads=row_of_block.threads) as slot:
            values, codes_r = row_of_block.alloc("bfloat16"), row_of_block.alloc("float8_e4m3fn")
            tx, row = T.get_thread_binding(), T.alloc_var("int32", positions[slot])  # written before the first GEMM
            pdl.wait()
            pdl.trigger()
            if row >= 0:
                row_of_block.load(x, row, values, tx)
                row_scale = row_of_block.scale(values, tx)
                if tx == 0:
                    scale[row] = row_scale
                row_of_block.quantize(values, row_scale, codes_r)
                row_of_block.store(codes_r, codes, row, tx)

    return quantize_sorted


# --- one row in the registers of a block -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """How a block quantises a row of `columns`: each thread has eight columns of every `threads` * 8."""

    columns: int

    @property
    def threads(self) -> int:
        """As few as hold a row: many small blocks, of which some load while others wait for their largest element."""
        return _THREADS if self.columns <= 2048 else 2 * _THREADS

    @property
    def steps(self) -> int:
        """Loads of 16 bytes of a thread."""
        return -(-self.columns // (self.threads * _ELEMENTS))

    def alloc(self, dtype: str):
        return T.alloc_local((self.steps * _ELEMENTS,), dtype)

    def load(self, x, row, values, tx) -> None:
        """Load the thread's columns of a row, and zeros past the last."""
        columns, steps, threads = self.columns, self.steps, self.threads

        @T.macro
        def emit(row):
            for step in T.unroll(steps):
                for v in T.vectorized(_ELEMENTS):
                    column = (step * threads + tx) * _ELEMENTS
                    values[step * _ELEMENTS + v] = T.if_then_else(column < columns, x[row, column + v], T.bfloat16(0))

        emit(row)

    def scale(self, values, tx):
        """Return the scale, which the threads find together; what they wrote to shared memory before is visible afterwards."""
        steps, warps = self.steps, self.threads // WARP

        @T.macro
        def emit():
            largest_s, amax = T.alloc_shared((warps,), "int32"), T.alloc_var("int32", 0)
            for i in T.unroll(steps * _ELEMENTS):  # as integers, of which a NaN is the largest
                amax = T.max(amax, T.reinterpret(T.cast(values[i], "float32"), "int32") & ~_SIGN)
            amax = T.warp_reduce_max(amax)
            if tx % WARP == 0:
                largest_s[tx // WARP] = amax
            T.sync_threads()
            for warp in T.unroll(warps):
                amax = T.max(amax, largest_s[warp])
            scale = T.alloc_var("float32", T.max(T.reinterpret(amax, "float32") / T.float32(E4M3.max), T.float32(2.0**-126)))
            if amax == 0:
                scale = T.float32(1)
            if amax >= INF:
                scale = T.float32(math.nan)
            return scale

        return emit()

    def quantize(self, values, scale, codes_r) -> None:
        """Write the codes of the thread's columns: the quotients, rounded once."""
        steps = self.steps

        @T.macro
        def emit(scale):
            quotients, inverse = T.alloc_local((_ELEMENTS,), "float32"), T.alloc_var("float32", T.float32(1) / scale)
            for step in T.unroll(steps):
                for v in T.unroll(_ELEMENTS):
                    quotients[v] = _rounded_to_odd(T.cast(values[step * _ELEMENTS + v], "float32"), scale, inverse)
                for v in T.vectorized(_ELEMENTS):
                    codes_r[step * _ELEMENTS + v] = T.cast(quotients[v], "float8_e4m3fn")

        emit(scale)

    def store(self, codes_r, codes, row, tx) -> None:
        """Store the thread's columns of a row."""
        columns, steps, threads = self.columns, self.steps, self.threads

        @T.macro
        def emit(row):
            for step in T.unroll(steps):
                column = (step * threads + tx) * _ELEMENTS
                if column < columns:
                    for v in T.vectorized(_ELEMENTS):
                        codes[row, column + v] = codes_r[step * _ELEMENTS + v]

        emit(row)


def _fma(a, b, c):
    return T.call_pure_extern("float32", "fmaf", a, b, c)


@T.macro
def _rounded_to_odd(x, scale, inverse):
    """Return x / scale, prepared for a second rounding: if it is no float, that of its two neighbours whose last bit is odd.

    An odd neighbour is never a tie. x * inverse is within two units of the quotient; adding what remains gives one of the
    neighbours, or the quotient itself if it is a float. Remainders are exact, and the sign of a neighbour's remainder says on
    which side it lies. The sign of -0 is lost on the way and put back.
    """
    guess = T.alloc_var("float32", x * inverse)
    quotient = T.alloc_var("float32", _fma(_fma(-guess, scale, x), inverse, guess))
    remainder = T.alloc_var("float32", _fma(-quotient, scale, x))
    bits = T.alloc_var("int32", T.reinterpret(quotient, "int32"))
    if remainder != T.float32(0):
        bits = (bits - T.cast((T.reinterpret(remainder, "int32") ^ bits) < 0, "int32")) | 1
    return T.reinterpret(bits | T.reinterpret(x, "int32") & T.int32(_SIGN), "float32")


# --- host ------------------------------------------------------------------------------------------------------------


def compile_scatter(problem: Problem, device) -> Callable:
    """Return scatter(x, routing), which returns the rows of x in sorted order, and their scales (empty for bfloat16)."""
    H = problem.hidden_size
    if problem.a_format == "bfloat16":
        kernel = device.compile(scatter, pass_configs=PASS_CONFIGS)
    else:
        kernel = device.compile(scatter_quantized, H, pass_configs=PASS_CONFIGS)

    def run(x, routing) -> tuple:
        rows = routing.token_ids.shape[0]
        if problem.a_format == "bfloat16":
            sorted_x, scale = device.empty(rows, H, dtype="bfloat16"), device.empty(0, dtype="float32")
            kernel(x, routing.positions, sorted_x)
        else:
            sorted_x, scale = _empty_rows(rows, H, device)
            kernel(x, routing.positions, sorted_x, scale)
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

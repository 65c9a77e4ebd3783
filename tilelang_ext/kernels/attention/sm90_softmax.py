"""The online softmax on Hopper, of the accumulators of a warpgroup's MMA, in registers.

With g = lane / 4 and t = lane % 4, element 4 j + 2 r + i of an accumulator is row g + 8 r of the warp's 16, column
8 j + 2 t + i (PTX ISA 9.7.15, D of wgmma). Four lanes share a row, so its maximum takes two shuffles; its sum is left in parts.
"""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import LOG2_E, Operands, Problem
from tilelang_ext.kernels.attention.tiles import Tile

SOURCE = """
#ifndef TILELANG_EXT_EXP2
#define TILELANG_EXT_EXP2
__device__ __forceinline__ float tilelang_ext_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float tilelang_ext_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif
"""  # of a kernel that calls the functions below
_NOTHING = -T.infinity("float32")


def exp2(x):
    """Return 2^x in one instruction; numbers below 2^-126 are 0."""
    return T.call_pure_extern("float32", "tilelang_ext_exp2", x)


def log2(x):
    """Return the logarithm of x in one instruction."""
    return T.call_pure_extern("float32", "tilelang_ext_log2", x)


@dataclass(frozen=True, eq=False)
class Softmax:
    """The two rows of a thread: float32 (2,) each, for rows g and g + 8."""

    problem: Problem
    row: Any  # row g in the tile
    column: Any  # 2 t
    maximum: Any  # of q . k
    shift: Any  # the maximum times the scale, subtracted from exponents; 0 while no key was seen
    total: Any  # of this thread's columns
    factor: Any  # what O is to be multiplied by; at the end, what it is multiplied by before it is rounded
    scale: Any  # of q . k, in the units of exponents of 2: a number, or a variable
    bits: int = 0  # powers are 2^bits times as large, up to 2^bits, where they are rounded to 8 bits

    def start(self) -> None:
        """Begin a tile."""
        maximum, total = self.maximum, self.total

        @T.macro
        def emit():
            for r in T.unroll(2):
                maximum[r] = _NOTHING
                total[r] = T.float32(0)

        emit()

    def hide(self, S, tile: Tile, key, rows: tuple, block_N: int) -> None:
        """Hide keys of the block that begins at `key` from the queries that may not see them.

        `rows` are the first and the last row of the tile for which the whole warpgroup asks.
        """
        row, column = self.row, self.column

        @T.macro
        def emit(key):
            if tile.has_hidden(key, rows, block_N):
                for r in T.unroll(2):
                    first = tile.first_key(row + 8 * r) - key - column
                    end = tile.end_key(row + 8 * r) - key - column
                    for j in T.unroll(block_N // 8):
                        for i in T.unroll(2):
                            if (j * 8 + i >= end) or (j * 8 + i < first):
                                S[4 * j + 2 * r + i] = _NOTHING

        emit(key)

    def update(self, S, block_N: int) -> None:
        """Take the maxima of a block, and the factors that follow for what came before it."""
        maximum, shift, total, factor = self.maximum, self.shift, self.total, self.factor
        scale, bits = self.scale, self.bits

        def shifted(exponent):
            return exponent - T.float32(bits) if bits else exponent

        @T.macro
        def emit():
            for r in T.unroll(2):
                peak = T.alloc_var("float32", maximum[r])
                for j in T.unroll(block_N // 8):
                    peak = T.max(peak, T.max(S[4 * j + 2 * r], S[4 * j + 2 * r + 1]))
                peak = T.max(peak, T.shfl_xor(peak, 1))
                peak = T.max(peak, T.shfl_xor(peak, 2))
                # A row that has seen no key yet: 2^(-inf - 0) is 0, where -inf - -inf would be NaN.
                shift[r] = T.if_then_else(peak == _NOTHING, T.float32(0), shifted(peak * scale))
                factor[r] = exp2(shifted(maximum[r] * scale) - shift[r])
                maximum[r] = peak
                total[r] = total[r] * factor[r]

        emit()

    def exponentiate(self, S, first: int, groups: int) -> None:
        """Replace some groups of eight columns of S by their powers, and add them to the sums."""
        shift, total, scale = self.shift, self.total, self.scale

        @T.macro
        def emit():
            for r in T.unroll(2):
                for j in T.unroll(groups):
                    for i in T.unroll(2):
                        S[4 * (first + j) + 2 * r + i] = exp2(S[4 * (first + j) + 2 * r + i] * scale - shift[r])
                        total[r] = total[r] + S[4 * (first + j) + 2 * r + i]

        emit()

    def finish(self, operands: Operands, tile: Tile) -> None:
        """Store lse, and leave in `factor` what rows of O are to be multiplied by."""
        problem, row, column = self.problem, self.row, self.column
        maximum, total_r, factor, scale, bits = self.maximum, self.total, self.factor, self.scale, self.bits

        @T.macro
        def emit():
            for r in T.unroll(2):
                total = T.alloc_var("float32", total_r[r])
                total = total + T.shfl_xor(total, 1)
                total = total + T.shfl_xor(total, 2)
                peak = T.alloc_var("float32", maximum[r] * scale - T.float32(bits))
                part = T.alloc_var("float32", T.float32(1))  # of the sum's unit in what O is divided by
                if problem.has_sinks:
                    sink = T.alloc_var("float32", operands.sinks[tile.head_of(row + 8 * r)] * T.float32(LOG2_E))
                    common = T.alloc_var("float32", T.max(peak, sink))
                    part = T.if_then_else(peak == _NOTHING, T.float32(0), exp2(peak - common))
                    total = total * part + T.if_then_else(sink == _NOTHING, T.float32(0), exp2(sink - common))
                    peak = common
                factor[r] = T.if_then_else(total > T.float32(0), part / total, T.float32(0))
                query = tile.query_of(row + 8 * r)
                if (query < tile.end) and (column == 0):
                    operands.lse[tile.batch, tile.head_of(row + 8 * r), query] = T.if_then_else(
                        total > T.float32(0), (peak + log2(total)) * T.float32(1 / LOG2_E), _NOTHING
                    )

        emit()

    def finish_part(self, operands: Operands, tile: Tile) -> None:
        """Store the logarithms of a part's sums, and leave in `factor` what rows of O are to be multiplied by."""
        row, column, scale, bits = self.row, self.column, self.scale, self.bits
        maximum, total_r, factor = self.maximum, self.total, self.factor

        @T.macro
        def emit():
            for r in T.unroll(2):
                total = T.alloc_var("float32", total_r[r])
                total = total + T.shfl_xor(total, 1)
                total = total + T.shfl_xor(total, 2)
                factor[r] = T.if_then_else(total > T.float32(0), T.float32(1) / total, T.float32(0))
                if (tile.num_blocks > 0) and (column == 0):
                    operands.partial_lse[tile.part, row + 8 * r] = T.if_then_else(
                        total > T.float32(0), maximum[r] * scale - T.float32(bits) + log2(total), _NOTHING
                    )

        emit()


def alloc_softmax(problem: Problem, row, column, scale=None, bits: int = 0) -> Softmax:
    """Allocate the registers of a thread whose first row and column are these; the scale is the problem's by default."""
    scale = T.float32(problem.scale_log2) if scale is None else scale

    @T.macro
    def alloc():
        maximum, shift = T.alloc_local((2,), "float32"), T.alloc_local((2,), "float32")
        total, factor = T.alloc_local((2,), "float32"), T.alloc_local((2,), "float32")
        return maximum, shift, total, factor

    return Softmax(problem, row, column, *alloc(), scale, bits)


def store_rows(operands: Operands, O, factor, tile: Tile, row, first_channel: int, column, groups: int) -> None:
    """Multiply the accumulator of two rows by their factors, and store groups of eight channels from `first_channel` on."""
    head_dim, dtype = int(operands.out.shape[3]), str(operands.out.dtype)

    @T.macro
    def emit():
        for r in T.unroll(2):
            query = tile.query_of(row + 8 * r)
            if query < tile.end:
                for j in T.unroll(groups):
                    if first_channel + j * 8 < head_dim:
                        for i in T.vectorized(2):
                            operands.out[tile.batch, query, tile.head_of(row + 8 * r), first_channel + j * 8 + column + i] = (
                                T.cast(O[4 * j + 2 * r + i] * factor[r], dtype)
                            )

    emit()


def store_part(operands: Operands, O, softmax: Softmax, tile: Tile, groups: int) -> None:
    """Multiply the accumulator of two rows by their factors, and store it as the part of a tile, of which there is at least one
    key block.
    """

    @T.macro
    def emit():
        for r in T.unroll(2):
            if tile.num_blocks > 0:
                for j in T.unroll(groups):
                    for i in T.vectorized(2):
                        operands.partial[tile.part, softmax.row + 8 * r, j * 8 + softmax.column + i] = (
                            O[4 * j + 2 * r + i] * softmax.factor[r]
                        )

    emit()

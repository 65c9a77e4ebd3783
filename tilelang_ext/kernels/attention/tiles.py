"""Where a tile of queries lies, which keys it sees, and which tile, or part of one, a persistent block takes next.

A tile is `block_M` queries of one head of one sequence, or as many rows of `pack` heads: row r is query r // pack of head
r % pack. Then the tile has fewer queries, whose windows have fewer keys together. Its key blocks begin where its first query's
keys begin, and are as many as reach its last query's keys.

Tiles that all have equally many key blocks come in waves of one tile per persistent block, and what remains after the full
waves would leave blocks idle. So their key blocks are dealt out evenly: every block gets a range of them, which lies in at
most two tiles, and computes a part of each; `sm90_parts` sums the parts.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.probabilities import KEY_UNIT
from tilelang_ext.kernels.attention.problem import DecodeOperands, DecodeProblem, DecodeResults, Operands, Problem

PARTS = 2  # of tiles that the range of a persistent block lies in, at most
SHORT_WINDOW = 512  # keys, up to which heads are packed into tiles, and tiles come head by head
MIN_DIVIDED_BLOCKS = 12  # key blocks of a tile, below which parts and their sum cost more than idle blocks
PANEL = 64  # elements of 16 bits in a swizzled row of 128 bytes of shared memory


@dataclass(frozen=True, eq=False)
class Tile:
    """A tile, in int32 variables: rows are those of the tensors."""

    problem: Problem
    block_N: int
    registers: Any

    @property
    def batch(self):
        return self.registers[0]

    @property
    def head(self):
        return self.registers[1]

    @property
    def kv_head(self):
        return self.registers[2]

    @property
    def query(self):
        """The first row of q."""
        return self.registers[3]

    @property
    def end(self):
        """The end of the sequence's rows of q."""
        return self.registers[4]

    @property
    def shift(self):
        """Position of a query among the rows of k, minus its row of q."""
        return self.registers[5]

    @property
    def first(self):
        """The sequence's first row of k."""
        return self.registers[6]

    @property
    def last(self):
        """The end of the sequence's rows of k."""
        return self.registers[7]

    @property
    def last_block(self):
        """The first row of k of the last key block."""
        return self.registers[8]

    @property
    def num_blocks(self):
        return self.registers[9]

    @property
    def part(self):
        """Number of the part of a tile that this is; -1 for a whole tile."""
        return self.registers[10]

    def key(self, i):
        """Return the first row of k of the i-th key block, counted from the last one."""
        return self.last_block - i * self.block_N

    def query_of(self, row):
        """Return the row of q of a row of the tile."""
        return self.query + (T.truncdiv(row, self.problem.pack) if self.problem.pack > 1 else row)

    def head_of(self, row):
        """Return the head of q of a row of the tile."""
        return self.head + T.truncmod(row, self.problem.pack) if self.problem.pack > 1 else self.head

    def first_key(self, row):
        """Return the first row of k that a row of the tile sees."""
        if not self.problem.window:
            return self.first
        return T.max(self.first, self.query_of(row) + self.shift - self.problem.window + 1)

    def end_key(self, row):
        """Return the end of the rows of k that a row of the tile sees."""
        if not self.problem.is_causal:
            return self.last
        return T.min(self.last, self.query_of(row) + self.shift + 1)

    def has_hidden(self, key, rows: tuple, block_N: int):
        """Return whether any row of the tile, from the first to the last of `rows`, may not see a key of the block at `key`."""
        past = key + block_N > self.end_key(rows[0])
        return past | (key < self.first_key(rows[1])) if self.problem.window else past


def alloc_tile(problem: Problem, block_N: int) -> Tile:
    """Allocate the variables of a tile."""
    return Tile(problem, block_N, T.alloc_local((11,), "int32"))


def row_tiles(problem: Problem, operands: Operands, block_M: int):
    """Return the tiles of one head, or pack of heads: of sequences with lengths at most one more of each than all rows fill."""
    q, cu_q = operands.q, operands.cu_q
    if problem.has_lengths:
        return T.truncdiv(q.shape[1], block_M) + cu_q.shape[0] - 1
    return T.ceildiv(q.shape[1], block_M // problem.pack)


def locate(operands: Operands, block_M: int, row_tile, batch_head, tile: Tile) -> None:
    """Write the tile number `row_tile` of a head, counted over the batch; past the last one it has no rows."""
    problem, block_N, registers = tile.problem, tile.block_N, tile.registers
    pack, S_q, S_k = problem.pack, operands.q.shape[1], operands.k.shape[1]
    packs, packs_of_kv_head = operands.q.shape[2], T.truncdiv(operands.q.shape[2], operands.k.shape[2])
    if pack > 1:
        packs, packs_of_kv_head = T.truncdiv(packs, pack), T.truncdiv(packs_of_kv_head, pack)

    @T.macro
    def find_sequence(row_tile):
        """Sequences are walked from the first, by the tiles that their rows fill."""
        tiles_before = T.alloc_var("int32", init=0)
        registers[3], registers[4], registers[6], registers[7] = 0, 0, 0, 0
        for sequence in T.serial(operands.cu_q.shape[0] - 1):
            begin, end = operands.cu_q[sequence], operands.cu_q[sequence + 1]
            tiles = T.truncdiv(end - begin + block_M - 1, block_M)
            if (row_tile >= tiles_before) and (row_tile < tiles_before + tiles):
                registers[3], registers[4] = begin + (row_tile - tiles_before) * block_M, end
                registers[6], registers[7] = operands.cu_k[sequence], operands.cu_k[sequence + 1]
            tiles_before = tiles_before + tiles

    @T.macro
    def emit(row_tile, batch_head):
        registers[0] = T.truncdiv(batch_head, packs)
        registers[1] = (batch_head - registers[0] * packs) * pack
        registers[2] = T.truncdiv(batch_head - registers[0] * packs, packs_of_kv_head)
        if problem.has_lengths:
            find_sequence(row_tile)
        else:
            registers[3], registers[4], registers[6], registers[7] = row_tile * (block_M // pack), S_q, 0, S_k
        registers[5] = registers[7] - registers[4]
        begin = T.alloc_var("int32", tile.first_key(0))
        if problem.is_fp8:  # blocks of transposed values begin at a multiple of it
            begin = T.truncdiv(begin, KEY_UNIT) * KEY_UNIT
        end = T.alloc_var("int32", tile.end_key(T.min(block_M, (tile.end - tile.query) * pack) - 1))
        registers[9] = T.if_then_else(
            (end > begin) & (tile.query < tile.end), T.truncdiv(end - begin + block_N - 1, block_N), 0
        )
        registers[8] = begin + (registers[9] - 1) * block_N
        registers[10] = -1

    emit(row_tile, batch_head)


@dataclass(frozen=True, eq=False)
class Remainder:
    """The tiles that remain after the full waves, and the ranges of their key blocks that persistent blocks get.

    With P persistent blocks, R tiles and n key blocks of each, key block u of them all belongs to tile u // n, and to the range
    of the persistent block ((u + 1) P - 1) // (R n).
    """

    num_blocks: int  # persistent ones
    registers: Any  # int32 (3,)

    @property
    def tiles(self):
        """Tiles that are divided: all that remain, or none where that would not pay."""
        return self.registers[0]

    @property
    def full_waves(self):
        """Waves before these."""
        return self.registers[1]

    @property
    def key_blocks(self):
        """Key blocks of a tile."""
        return self.registers[2]

    def begin(self, block):
        """Return the first key block of a persistent block's range."""
        units = T.cast(self.tiles * block, "int64") * self.key_blocks
        return T.cast(T.truncdiv(units, self.num_blocks), "int32")

    def block_of(self, unit):
        """Return the persistent block to which a key block belongs."""
        units = T.cast(self.tiles, "int64") * self.key_blocks
        return T.cast(T.truncdiv((T.cast(unit, "int64") + 1) * self.num_blocks - 1, units), "int32")


def divided_tiles(num_tiles, key_blocks, num_blocks: int):
    """Return `Remainder.tiles`."""
    rest = T.truncmod(num_tiles, num_blocks)
    leaves_idle = T.if_then_else(rest * 8 <= num_blocks * 7, rest, 0)
    return T.if_then_else(key_blocks >= MIN_DIVIDED_BLOCKS, leaves_idle, 0)


def alloc_remainder(num_tiles, key_blocks, num_blocks: int) -> Remainder:
    """Allocate the variables of what remains after the full waves."""

    @T.macro
    def alloc():
        registers = T.alloc_local((3,), "int32")
        registers[0] = divided_tiles(num_tiles, key_blocks, num_blocks)
        registers[1] = T.truncdiv(num_tiles, num_blocks)
        registers[2] = key_blocks
        return registers

    return Remainder(num_blocks, alloc())


@dataclass(frozen=True, eq=False)
class TileOrder:
    """The tiles of one persistent block, wave by wave.

    Causal tiles, and those of long windows, come by the number of their keys, longest first, and every other wave is dealt out
    backwards, so that all blocks end at about the same time. Others come head by head, whose keys and values stay in the L2
    cache; with a `remainder` those that do not fill a wave in parts.
    """

    problem: Problem
    operands: Operands
    block_M: int
    num_blocks: int
    block: Any
    remainder: Remainder | None = None

    @property
    def num_waves(self):
        whole = T.ceildiv(self.num_tiles, self.num_blocks)
        if self.remainder is None:
            return whole
        return T.if_then_else(self.remainder.tiles > 0, self.remainder.full_waves + PARTS, whole)

    @property
    def num_tiles(self):
        q = self.operands.q
        return row_tiles(self.problem, self.operands, self.block_M) * q.shape[0] * self.packs

    @property
    def packs(self):
        """Packs of heads of q."""
        heads = self.operands.q.shape[2]
        return T.truncdiv(heads, self.problem.pack) if self.problem.pack > 1 else heads

    def with_parts(self, block_N: int) -> "TileOrder":
        """Return the order in which tiles that do not fill a wave are divided."""
        key_blocks = T.ceildiv(self.operands.k.shape[1], block_N)
        return replace(self, remainder=alloc_remainder(self.num_tiles, key_blocks, self.num_blocks))

    def find(self, wave, tile: Tile) -> None:
        """Write the tile of a wave; one without rows past the last."""
        problem, operands, block_M, num_blocks, block = (
            self.problem,
            self.operands,
            self.block_M,
            self.num_blocks,
            self.block,
        )
        batch_heads, num_tiles = operands.q.shape[0] * self.packs, self.num_tiles
        of_head = row_tiles(problem, operands, block_M)
        is_by_length = problem.has_lengths or (problem.is_causal and not 0 < problem.window <= SHORT_WINDOW)
        remainder, registers, block_N = self.remainder, tile.registers, tile.block_N

        @T.macro
        def emit_part(segment):
            """The part of the `segment`-th of the tiles in the block's range."""
            begin = T.alloc_var("int32", remainder.begin(block))
            end = T.alloc_var("int32", remainder.begin(block + 1))
            number = T.alloc_var("int32", T.truncdiv(begin, remainder.key_blocks) + segment)
            begin = T.max(begin - number * remainder.key_blocks, 0)
            end = T.min(end - number * remainder.key_blocks, remainder.key_blocks)
            number = number + remainder.full_waves * num_blocks
            batch_head = T.truncdiv(number, of_head)
            locate(operands, block_M, T.if_then_else(end > begin, number - batch_head * of_head, of_head), batch_head, tile)
            registers[8] = registers[8] - begin * block_N
            registers[9] = T.max(end - begin, 0)
            registers[10] = PARTS * block + segment

        @T.macro
        def emit(wave):
            place = T.if_then_else(wave % 2 == 1, num_blocks - 1 - block, block) if is_by_length else block
            number = T.alloc_var("int32", wave * num_blocks + place)
            row_tile = T.alloc_var("int32", 0)
            batch_head = T.alloc_var("int32", 0)
            if is_by_length:
                row_tile = of_head - 1 - T.truncdiv(number, batch_heads)
                batch_head = T.truncmod(number, batch_heads)
            else:
                batch_head = T.truncdiv(number, of_head)
                row_tile = number - batch_head * of_head
            if number >= num_tiles:
                row_tile, batch_head = of_head, 0
            locate(operands, block_M, row_tile, batch_head, tile)

        @T.macro
        def emit_either(wave):
            if (remainder.tiles > 0) and (wave >= remainder.full_waves):
                emit_part(wave - remainder.full_waves)
            else:
                emit(wave)

        if remainder is None:
            emit(wave)
        else:
            emit_either(wave)


def prim_func(problem: Problem, emit: Callable, part: tuple[int, int] | None = None, transposes: bool = False):
    """Return the prim_func (q, k, v, sinks, cu_q, cu_k, q_scale, k_scale, v_scale, out, lse) with the body emit(operands).

    With the rows and channels of a `part` of a tile it has two parameters more: partial and partial_lse. With `transposes` v is
    (batch, kv_heads, head_dim, keys), as `sm90_transpose` leaves it.
    """
    types = problem.types()
    if transposes:
        types.v = types.v_transposed
    if part:
        partial, partial_lse = types_of_parts(*part)

        @T.prim_func
        def attention(
            q: types.q,
            k: types.k,
            v: types.v,
            sinks: types.sinks,
            cu_q: types.cu_q,
            cu_k: types.cu_k,
            q_scale: types.q_scale,
            k_scale: types.k_scale,
            v_scale: types.v_scale,
            out: types.out,
            lse: types.lse,
            partial: partial,
            partial_lse: partial_lse,
        ):
            emit(Operands(q, k, v, sinks, cu_q, cu_k, q_scale, k_scale, v_scale, out, lse, partial, partial_lse))

    else:

        @T.prim_func
        def attention(
            q: types.q,
            k: types.k,
            v: types.v,
            sinks: types.sinks,
            cu_q: types.cu_q,
            cu_k: types.cu_k,
            q_scale: types.q_scale,
            k_scale: types.k_scale,
            v_scale: types.v_scale,
            out: types.out,
            lse: types.lse,
        ):
            emit(Operands(q, k, v, sinks, cu_q, cu_k, q_scale, k_scale, v_scale, out, lse))

    return attention


def decode_prim_func(problem: DecodeProblem, emit: Callable):
    """Return the prim_func (q, cache_k, cache_v, seqlens, page_table, k_scale, v_scale, partial, partial_lse).

    Its body is emit(operands, seqlens, page_table, results).
    """
    types = problem.types()

    @T.prim_func
    def split_kv(
        q: types.q,
        cache_k: types.cache_k,
        cache_v: types.cache_v,
        seqlens: types.seqlens,
        page_table: types.page_table,
        k_scale: types.k_scale,
        v_scale: types.v_scale,
        partial: types.partial,
        partial_lse: types.partial_lse,
    ):
        emit(
            DecodeOperands(q, cache_k, cache_v, k_scale, v_scale),
            seqlens,
            page_table,
            DecodeResults(partial, partial_lse),
        )

    return split_kv


def decode_and_sum_prim_func(problem: DecodeProblem, emit: Callable):
    """Return the prim_func (..., partial, partial_lse, given, sinks, out, lse), which adds the ranges that it computes.

    The first parameters and the body are those of `decode_prim_func`.
    """
    types = problem.types()

    @T.prim_func
    def attention_decode(
        q: types.q,
        cache_k: types.cache_k,
        cache_v: types.cache_v,
        seqlens: types.seqlens,
        page_table: types.page_table,
        k_scale: types.k_scale,
        v_scale: types.v_scale,
        partial: types.partial,
        partial_lse: types.partial_lse,
        given: types.given,
        sinks: types.sinks,
        out: types.out,
        lse: types.lse,
    ):
        emit(
            DecodeOperands(q, cache_k, cache_v, k_scale, v_scale),
            seqlens,
            page_table,
            DecodeResults(partial, partial_lse, given, sinks, out, lse),
        )

    return attention_decode


def types_of_parts(rows: int, channels: int) -> tuple:
    """Return the types of partial and partial_lse."""
    parts = T.dynamic("parts")
    return T.Tensor((parts, rows, channels), "float32"), T.Tensor((parts, rows), "float32")


def of_head(scale, head):
    """Return a head's scale, where there may be one for all."""
    return scale[T.min(head, scale.shape[0] - 1)]

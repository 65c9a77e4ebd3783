"""Where a tile of queries lies, which keys it sees, and which tile a persistent block takes next.

A tile is `block_M` queries of one head of one sequence. Its key blocks end where its last query's keys end, and begin at a
multiple of `block_N` at which its first query's window has begun.
"""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import Operands, Problem

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

    def key(self, i):
        """Return the first row of k of the i-th key block, counted from the last one."""
        return self.last_block - i * self.block_N

    def first_key(self, row):
        """Return the first row of k that a row of the tile sees."""
        if not self.problem.window:
            return self.first
        return T.max(self.first, self.query + row + self.shift - self.problem.window + 1)

    def end_key(self, row):
        """Return the end of the rows of k that a row of the tile sees."""
        if not self.problem.is_causal:
            return self.last
        return T.min(self.last, self.query + row + self.shift + 1)

    def has_hidden(self, key, rows: tuple, block_N: int):
        """Return whether any row of the tile, from the first to the last of `rows`, may not see a key of the block at `key`."""
        past = key + block_N > self.end_key(rows[0])
        return past | (key < self.first_key(rows[1])) if self.problem.window else past


def alloc_tile(problem: Problem, block_N: int) -> Tile:
    """Allocate the variables of a tile."""
    return Tile(problem, block_N, T.alloc_local((10,), "int32"))


def row_tiles(problem: Problem, operands: Operands, block_M: int):
    """Return the tiles of one head: of sequences with lengths at most one more of each than all rows fill."""
    q, cu_q = operands.q, operands.cu_q
    if problem.has_lengths:
        return T.truncdiv(q.shape[1], block_M) + cu_q.shape[0] - 1
    return T.ceildiv(q.shape[1], block_M)


def locate(operands: Operands, block_M: int, row_tile, batch_head, tile: Tile) -> None:
    """Write the tile number `row_tile` of a head, counted over the batch; past the last one it has no rows."""
    problem, block_N, registers = tile.problem, tile.block_N, tile.registers
    S_q, S_k, heads = operands.q.shape[1], operands.k.shape[1], operands.q.shape[2]

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
        registers[0] = T.truncdiv(batch_head, heads)
        registers[1] = batch_head - registers[0] * heads
        registers[2] = T.truncdiv(registers[1], T.truncdiv(heads, operands.k.shape[2]))
        if problem.has_lengths:
            find_sequence(row_tile)
        else:
            registers[3], registers[4], registers[6], registers[7] = row_tile * block_M, S_q, 0, S_k
        registers[5] = registers[7] - registers[4]
        begin = T.alloc_var("int32", tile.first_key(0))
        end = T.alloc_var("int32", tile.end_key(T.min(block_M, tile.end - tile.query) - 1))
        registers[9] = T.if_then_else(
            (end > begin) & (tile.query < tile.end), T.truncdiv(end - begin + block_N - 1, block_N), 0
        )
        registers[8] = begin + (registers[9] - 1) * block_N

    emit(row_tile, batch_head)


@dataclass(frozen=True, eq=False)
class TileOrder:
    """The tiles of one persistent block, wave by wave.

    Causal tiles come by the number of their keys, longest first, and every other wave is dealt out backwards, so that all
    blocks end at about the same time. Others come head by head, whose keys and values stay in the L2 cache.
    """

    problem: Problem
    operands: Operands
    block_M: int
    num_blocks: int
    block: Any

    @property
    def num_waves(self):
        return T.ceildiv(self.num_tiles, self.num_blocks)

    @property
    def num_tiles(self):
        q = self.operands.q
        return row_tiles(self.problem, self.operands, self.block_M) * q.shape[0] * q.shape[2]

    def find(self, wave, tile: Tile) -> None:
        """Write the tile of a wave; one without rows past the last."""
        problem, operands, block_M, num_blocks, block = (
            self.problem,
            self.operands,
            self.block_M,
            self.num_blocks,
            self.block,
        )
        batch_heads, num_tiles = operands.q.shape[0] * operands.q.shape[2], self.num_tiles
        of_head = row_tiles(problem, operands, block_M)
        is_by_length = problem.has_lengths or (problem.causal and not problem.window)

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

        emit(wave)

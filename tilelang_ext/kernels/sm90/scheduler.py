"""The persistent walk over tiles: one block per SM, which takes every `num_blocks`-th tile.

    for wave in T.serial(scheduler.num_waves):
        tile = scheduler.tile(wave)

Producers and consumers of a block walk alone, each by its own count: they meet at the barriers of the pipeline only, so that
the producer loads the next tile while the consumers still finish this one.
"""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T


@dataclass(frozen=True, eq=False)
class PersistentScheduler:
    """The tiles of one block: `block`, `block` + `num_blocks`, ... below `num_tiles`."""

    num_blocks: int
    block: Any  # the index of the block in its grid
    num_tiles: Any

    @property
    def num_waves(self):
        """Number of tiles of this block."""
        return T.ceildiv(self.num_tiles - self.block, self.num_blocks)

    @property
    def has_tiles(self):
        """Whether this block has a tile at all."""
        return self.num_tiles > self.block

    def tile(self, wave):
        """Return the tile of a wave, counted from 0."""
        return wave * self.num_blocks + self.block


@dataclass(frozen=True, eq=False)
class EqualParts:
    """The K blocks of all tiles in one line, tile after tile, of which every block or cluster has an equal part.

        for i in T.serial(parts.num_segments):
            parts.take(i, ...)

    A part is walked over from its last tile to its first. Where it ends inside a tile, that comes first, and its accumulators
    are given away; the part that has a tile's last K blocks finishes it (`SplitTiles`), when the others have long been there.
    It waits for parts of lower number alone, which the GPU starts first, so that no two wait for each other.
    """

    number: Any  # of this block's part
    num_parts: Any
    iterations: Any  # K blocks of a tile
    total: Any  # K blocks of all tiles
    begin: Any  # first iteration of this part
    end: Any  # the one behind its last

    @property
    def num_segments(self):
        """Tiles of which this part has K blocks."""
        first = T.truncdiv(self.begin, self.iterations)
        return T.if_then_else(self.end > self.begin, T.truncdiv(self.end - 1, self.iterations) - first + 1, 0)

    def take(self, i, tile, first_k, num_k) -> None:
        """Write the tile of the i-th segment and its K blocks to registers, int32 (1,)."""
        begin, end, iterations = self.begin, self.end, self.iterations

        @T.macro
        def emit(i):
            tile[0] = T.truncdiv(end - 1, iterations) - i
            first_k[0] = T.max(begin - tile[0] * iterations, 0)
            num_k[0] = T.min(end - tile[0] * iterations, iterations) - first_k[0]

        emit(i)

    def givers(self, tile):
        """Return how many parts, those of the numbers before this one, give it their accumulators of a tile."""
        return self.number - T.truncdiv((tile * self.iterations + 1) * self.num_parts - 1, self.total)


FEWEST_ITERATIONS = 4  # of an equal part


def equal_parts(num_parts: int, number, num_tiles, iterations) -> EqualParts:
    """Divide the K blocks of tiles of `iterations` each among `num_parts`, or fewer, where they are few."""

    @T.macro
    def alloc():
        total = T.alloc_var("int32", num_tiles * iterations)
        parts = T.alloc_var("int32", T.min(T.int32(num_parts), T.max(T.truncdiv(total, FEWEST_ITERATIONS), 1)))
        begin = T.alloc_var("int32", T.truncdiv(T.min(number, parts) * total, parts))
        end = T.alloc_var("int32", T.truncdiv(T.min(number + 1, parts) * total, parts))
        return parts, total, begin, end

    parts, total, begin, end = alloc()
    return EqualParts(number, parts, iterations, total, begin, end)


@dataclass(frozen=True, eq=False)
class GroupedTiles:
    """The order of a matrix of tiles: down `group_rows` rows of tiles, then to the next column; then the next group of rows.

    The tiles that run at the same time then share rows of A and columns of B, which stay in the L2 cache.
    """

    group_rows: int
    tile_columns: Any  # a Python number, or an expression of the kernel
    tile_rows: Any

    @property
    def num_tiles(self):
        return self.tile_rows * self.tile_columns

    def tile_coord(self, tile, tile_row, tile_column) -> None:
        """Write the row and the column of a tile, counted in tiles, to two registers, int32 (1,)."""
        tiles_of_group = self.group_rows * self.tile_columns
        group_rows, tile_rows = self.group_rows, self.tile_rows

        @T.macro
        def write(tile):
            group = tile // tiles_of_group
            size = T.min(T.int32(group_rows), tile_rows - group * group_rows)
            tile_row[0] = group * group_rows + tile % tiles_of_group % size
            tile_column[0] = tile % tiles_of_group // size

        @T.macro
        def write_by_truncation(tile):
            # Nothing is negative, which upstream proves of constants alone: floors of other divisions take a dozen each.
            tile_row[0] = T.truncdiv(tile, tiles_of_group) * group_rows
            size = T.alloc_var("int32", T.min(T.int32(group_rows), tile_rows - tile_row[0]))
            within = T.alloc_var("int32", T.truncmod(tile, tiles_of_group))
            tile_row[0] = tile_row[0] + T.truncmod(within, size)
            tile_column[0] = T.truncdiv(within, size)

        if isinstance(self.tile_columns, int):
            write(tile)
        else:
            write_by_truncation(tile)


@dataclass(frozen=True, eq=False)
class StreamKScheduler:
    """The tiles of one block where the last ones are divided along K, so that no SM waits for the others to end.

        for i in T.serial(work.num_segments):
            work.take(i)                    # K blocks of work.first to work.last of tile work.tile, counted in iterations

    Every row of tiles has equally many blocks, block % rows: those with the same number, block // rows, walk over their rows in
    step, so that columns of B come from memory once. Blocks that remain do nothing.

    Each block walks over `whole` tiles of its row as by `PersistentScheduler`. The K blocks of the row's other tiles, fewer
    than two for each of its blocks, lie in one line, tile after tile, of which every block takes an equal part. It walks
    over its part from the last tile to the first: a block that ends inside a tile takes that first and gives its
    accumulators to others (`is_given`), and the block that has a tile's last K blocks finishes it (`SplitTiles`), when the
    others have long been there. It waits for blocks of lower index alone, which the GPU starts first, so that no two wait
    for each other.
    """

    rows: Any  # of tiles, at most as many as `GroupedTiles` walks together
    row: Any  # of this block
    number: Any  # of this block among those of its row
    row_blocks: Any  # blocks of a row
    iterations: Any  # of a tile
    registers: Any  # int32 (_REGISTERS,)

    @property
    def whole(self):
        """Tiles that this block multiplies alone, before the ones that are divided."""
        return self.registers[0]

    @property
    def begin(self):
        """First iteration of this block's part of all iterations of the divided tiles."""
        return self.registers[1]

    @property
    def end(self):
        return self.registers[2]

    @property
    def total(self):
        """Iterations of all divided tiles of the row."""
        return self.registers[3]

    @property
    def sharers(self):
        """Blocks that have a part of them."""
        return self.registers[4]

    @property
    def column(self):
        """Column of the tile that was taken."""
        return self.registers[5]

    @property
    def tile(self):
        """The tile that was taken, by the order of `GroupedTiles`."""
        return self.column * self.rows + self.row

    @property
    def first(self):
        return self.registers[6]

    @property
    def last(self):
        return self.registers[7]

    @property
    def gives(self):
        """1 if this block's part ends inside a tile, else 0."""
        return T.if_then_else(T.truncmod(self.end, self.iterations) > 0, 1, 0)

    @property
    def num_segments(self):
        owned = T.truncdiv(self.end, self.iterations) - T.truncdiv(self.begin, self.iterations)
        return self.gives + self.whole + owned

    @property
    def is_given(self):
        """Whether another block finishes the tile that was taken."""
        return self.last < self.iterations

    @property
    def givers(self):
        """Blocks that give this one their accumulators of the tile that was taken: those with the numbers before its own."""
        iteration = (self.column - self.whole * self.row_blocks) * self.iterations
        return self.number - T.truncdiv((iteration + 1) * self.sharers - 1, self.total)

    def giver(self, i):
        """Return the block that is the i-th of them."""
        return (self.number - 1 - i) * self.rows + self.row

    def take(self, i) -> None:
        """Take the i-th segment of this block."""
        number_of_block, row_blocks, iterations, registers = self.number, self.row_blocks, self.iterations, self.registers

        @T.macro
        def emit(i):
            number = T.alloc_var("int32", i - self.gives)
            if (number >= 0) & (number < self.whole):
                registers[5] = number * row_blocks + number_of_block
                registers[6] = 0
                registers[7] = iterations
            else:
                # Of the divided tiles: the one in which the part ends, if it ends in one, then those before it.
                number = T.if_then_else(number < 0, 0, number - self.whole + 1)
                divided = T.alloc_var("int32", T.truncdiv(self.end, iterations) - number)
                registers[5] = self.whole * row_blocks + divided
                registers[6] = T.max(self.begin - divided * iterations, 0)
                registers[7] = T.min(self.end - divided * iterations, iterations)

        emit(i)


_REGISTERS = 8
_FEWEST_ITERATIONS = 2  # of a block's part


def start_stream_k(num_blocks: int, block, tile_columns, tile_rows, iterations) -> StreamKScheduler:
    """Allocate the walk of one role over a matrix of tiles of `iterations` each."""

    @T.macro
    def alloc():
        registers = T.alloc_local((_REGISTERS,), "int32")
        row = T.alloc_var("int32", T.truncmod(block, tile_rows))
        number = T.alloc_var("int32", T.truncdiv(block, tile_rows))
        row_blocks = T.alloc_var("int32", T.truncdiv(num_blocks, tile_rows))
        waves = T.alloc_var("int32", T.truncdiv(tile_columns, row_blocks))
        # Where tiles fill their waves, none is divided.
        whole = T.alloc_var("int32", T.if_then_else(T.truncmod(tile_columns, row_blocks) == 0, waves, T.max(waves - 1, 0)))
        registers[3] = (tile_columns - whole * row_blocks) * iterations
        registers[4] = T.min(T.max(T.truncdiv(registers[3], _FEWEST_ITERATIONS), 1), row_blocks)
        registers[1] = T.truncdiv(T.min(number, registers[4]) * registers[3], registers[4])
        registers[2] = T.truncdiv(T.min(number + 1, registers[4]) * registers[3], registers[4])
        registers[0] = T.if_then_else(number < row_blocks, whole, 0)
        return row, number, row_blocks, registers

    row, number, row_blocks, registers = alloc()
    return StreamKScheduler(tile_rows, row, number, row_blocks, iterations, registers)

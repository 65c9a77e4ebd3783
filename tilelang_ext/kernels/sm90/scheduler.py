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

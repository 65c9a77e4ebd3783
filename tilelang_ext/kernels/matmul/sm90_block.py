"""What the roles of the persistent kernel for Hopper share: constants, shared memory, and where a unit of work lies."""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.problem import Problem
from tilelang_ext.kernels.matmul.sm90_config import BLOCK_K, Config, columns_loaded
from tilelang_ext.kernels.sm90.cluster_sum import ClusterSum
from tilelang_ext.kernels.sm90.epilogue import (
    DeferredSubtiles,
    SubtileStores,
)
from tilelang_ext.kernels.sm90.pipeline import Pipeline
from tilelang_ext.kernels.sm90.roles import Roles
from tilelang_ext.kernels.sm90.scheduler import EqualParts, GroupedTiles, PersistentScheduler

WGMMA_M = 64  # rows of one MMA of a warpgroup


@dataclass(frozen=True, eq=False)
class Traits:
    """The host's constants of one kernel, and the sizes; those of the transposed product where operands are swapped."""

    problem: Problem
    config: Config
    M: Any
    N: Any
    K: Any
    splits: Any  # 1, or the extent of `partial`
    stores_by_tma: bool  # whether rows of out are multiples of 16 bytes

    @property
    def roles(self) -> Roles:
        return Roles(self.config.num_consumers)

    @property
    def is_split(self) -> bool:
        return self.config.is_split

    @property
    def leaves_sum(self) -> bool:
        """Whether accumulators go to `partial`, which another kernel sums."""
        return self.is_split and not self.config.adds and self.config.joined == 1

    @property
    def mma_tiles(self) -> int:
        """MMAs of a consumer for one K block, below each other."""
        return self.config.block_M // (WGMMA_M * self.config.num_consumers)

    @property
    def subtiles(self) -> int:
        """Subtiles of an MMA tile, beside each other."""
        return self.config.block_N // self.config.subtile_N

    @property
    def is_thin(self) -> bool:
        """Whether stages hold fewer rows of A than an MMA has."""
        return self.config.a_rows < self.config.block_M

    @property
    def shape_a(self) -> tuple:
        """Shape of `A_s`: an M-major operand lies as panels of 64 columns, one for each MMA tile."""
        num_stages, a_rows = self.config.num_stages, self.config.a_rows
        if not self.problem.a_is_k_major:
            return (num_stages, self.config.block_M // WGMMA_M, BLOCK_K, WGMMA_M)
        return (num_stages * a_rows + WGMMA_M - a_rows, BLOCK_K) if self.is_thin else (num_stages, a_rows, BLOCK_K)

    @property
    def cluster_dims(self) -> dict:
        """Arguments of T.Kernel."""
        blocks = self.config.cluster_blocks
        return {"cluster_dims": (blocks, 1, 1)} if blocks > 1 else {}

    @property
    def shape_b(self) -> tuple:
        """Shape of `B_s`: an N-major operand lies as panels of 64 columns, the last of which may have columns of no MMA."""
        rows = columns_loaded(self.config.block_N, self.problem.b_is_k_major)
        return (self.config.num_stages, *((rows, BLOCK_K) if self.problem.b_is_k_major else (BLOCK_K, rows)))

    @property
    def tiles_below(self) -> int:
        """Blocks of a cluster below each other, which share the loads of B."""
        return self.config.tiles_below

    @property
    def tiles_beside(self) -> int:
        """Blocks of a cluster beside each other, which share the loads of A."""
        return self.config.tiles_beside

    def row_in_cluster(self, rank):
        """Return how many tiles of the cluster lie above that of a block."""
        return T.truncdiv(rank, self.tiles_beside) if self.tiles_beside > 1 else rank

    def column_in_cluster(self, rank):
        """Return how many tiles of the cluster lie beside that of a block, to the left."""
        return T.truncmod(rank, self.tiles_beside) if self.tiles_below > 1 else rank


@dataclass(frozen=True, eq=False)
class Block:
    """What the roles of a block share."""

    A_s: Any  # Traits.shape_a
    B_s: Any  # Traits.shape_b
    pipeline: Pipeline
    tiles: GroupedTiles
    scheduler: PersistentScheduler | EqualParts
    rank: Any  # of the block in its cluster
    thread: Any
    sums: ClusterSum | None = None


@dataclass(frozen=True, eq=False)
class Consumer:
    """What one consumer warpgroup has of its own."""

    row: int  # its first row of the tile
    accumulators: list  # of each MMA tile, (WGMMA_M, block_N), float32
    stores: SubtileStores | None  # None where accumulators go to `partial`
    deferred: DeferredSubtiles | None


@dataclass(frozen=True, eq=False)
class Unit:
    """Row and column of the result at which a tile begins, and the K blocks of a unit of it; int32 (1,) each."""

    tile_row: Any  # in tiles
    tile_column: Any
    split: Any
    first_k: Any
    num_k: Any
    tile: Any  # its number


def alloc_unit() -> Unit:
    return Unit(*(T.alloc_local((1,), "int32") for _ in range(6)))


@T.macro
def find_unit(traits, block, wave, unit):
    """Write where the unit of a wave lies."""
    number = 0 if traits.config.streams else block.scheduler.tile(wave)
    all_k_blocks = T.ceildiv(traits.K, BLOCK_K)
    if traits.config.streams:
        block.scheduler.take(wave, unit.tile, unit.first_k, unit.num_k)
        block.tiles.tile_coord(unit.tile[0], unit.tile_row, unit.tile_column)
    elif traits.config.joined > 1:
        unit.split[0] = block.rank
        k_blocks = T.truncdiv(all_k_blocks + traits.config.joined - 1, traits.config.joined)
        unit.first_k[0] = unit.split[0] * k_blocks
        unit.num_k[0] = T.min(k_blocks, all_k_blocks - unit.first_k[0])
        block.tiles.tile_coord(number, unit.tile_row, unit.tile_column)
    elif traits.is_split:
        # Units that run at the same time share their K blocks, which stay in the L2 cache.
        unit.split[0] = T.truncdiv(number, block.tiles.num_tiles)
        k_blocks = T.truncdiv(all_k_blocks + traits.splits - 1, traits.splits)
        unit.first_k[0] = unit.split[0] * k_blocks
        unit.num_k[0] = T.min(k_blocks, all_k_blocks - unit.first_k[0])
        unit.tile[0] = number - unit.split[0] * block.tiles.num_tiles
        block.tiles.tile_coord(unit.tile[0], unit.tile_row, unit.tile_column)
    else:
        unit.first_k[0], unit.num_k[0] = 0, all_k_blocks
        block.tiles.tile_coord(number, unit.tile_row, unit.tile_column)


def num_units(block: Block):
    """Return how many units this block has."""
    scheduler = block.scheduler
    return scheduler.num_segments if isinstance(scheduler, EqualParts) else scheduler.num_waves


def origin_of(traits: Traits, block: Block, unit: Unit) -> tuple:
    """Return the first row and the first column of this block's tile."""
    row, column = unit.tile_row[0], unit.tile_column[0]
    if traits.tiles_below > 1:
        row = row * traits.tiles_below + traits.row_in_cluster(block.rank)
    if traits.tiles_beside > 1:
        column = column * traits.tiles_beside + traits.column_in_cluster(block.rank)
    return row * traits.config.block_M, column * traits.config.block_N

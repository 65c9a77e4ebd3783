"""What the roles of the persistent kernel for Hopper share: its configuration and constants, shared memory, tiles, the walk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.formats import FP8_BLOCK, BlockScaledLayout
from tilelang_ext.kernels.scaled_mm.problem import Problem
from tilelang_ext.kernels.sm90.epilogue import DeferredSubtiles, SubtileStores
from tilelang_ext.kernels.sm90.pipeline import Pipeline
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, Roles
from tilelang_ext.kernels.sm90.scheduler import GroupedTiles, PersistentScheduler, start_stream_k
from tilelang_ext.kernels.sm90.split_tiles import SplitTiles

ARCH = "sm_90a"
BLOCK_K = FP8_BLOCK  # bytes of a swizzled row of shared memory, and a float32 block of scales
WGMMA_M = 64  # rows of one MMA of a warpgroup
BLOCKWISE = (BlockScaledLayout.block(1, FP8_BLOCK), BlockScaledLayout.block(FP8_BLOCK, FP8_BLOCK))

# For blockwise scales, up to so many of a consumer's registers that accumulators and scales take: those of a thread of the
# producer and of the consumers. Where K is constant, only producers that load many scales ahead need more of them.
_REGISTERS = (180, 120, 192), (256, 88, 208)
_REGISTERS_OF_CONSTANT, _FEW_SCALES = ((130, 120, 192), (172, 88, 208)), 16
_REGISTERS_OF_COPIES = 56, 224  # of a thread of a producer that copies blockwise scales, and of the consumers
SCALES_OF_B = 4  # floats of a stage for scale_b, of which a tile meets one block or two: stages begin at whole 16 bytes
_MAX_STEPS, _STEPS = 6, 4  # of an iteration of a promoted main loop: all stages up to the first number, or so many


@dataclass(frozen=True)
class Config:
    """Tile of a block, stages of the pipeline, size of a subtile, blocks of the grid, and deferred subtiles of a tile.

    A subtile has `subtile` columns of out, or of swapped operands so many rows.
    """

    block_M: int
    block_N: int
    num_stages: int
    subtile: int
    num_blocks: int
    deferred: int = 0
    num_consumers: int = 2
    is_swapped: bool = False
    divides_k: bool = False  # whether blocks share the last tiles, each some of their K blocks


def steps_of(num_stages: int) -> int:
    """Return the K blocks of an iteration of the main loop where accumulators are promoted."""
    return num_stages if num_stages <= _MAX_STEPS else _STEPS


def scale_sets_of(block_N: int, is_swapped: bool) -> int:
    """Return how many blocks of scale_b a tile of so many columns meets; swapped operands have tiles of 64, 128 or 256."""
    if is_swapped:
        return -(-block_N // FP8_BLOCK)
    return 1 if FP8_BLOCK % block_N == 0 else 2


def stage_scales(block_M: int) -> int:
    """Return the floats of a stage for blockwise scales: of the tile's rows of A, then of the blocks of B."""
    return -(-block_M // 4) * 4 + SCALES_OF_B


def promotes(problem: Problem) -> bool:
    """Whether partial accumulators are added in float32 registers, K block by K block."""
    return not problem.fast_accum or is_blockwise(problem)


def is_bound_by_loads(problem: Problem, config: Config) -> bool:
    """Whether the MMAs of a K block take less time than its loads: of tiles with few rows, or with all of a few."""
    has_all = problem.max_M <= config.block_M <= 2 * WGMMA_M
    return has_all or (config.is_swapped and config.block_M <= WGMMA_M)


def is_blockwise(problem: Problem) -> bool:
    return problem.layout_a.k is not None


@dataclass(frozen=True, eq=False)
class Traits:
    """The host's constants of one kernel, and the sizes."""

    problem: Problem
    config: Config
    M: Any
    N: Any  # a number, or an expression of the kernel
    K: Any

    @property
    def roles(self) -> Roles:
        """The producer keeps blockwise scales of some K blocks in registers, and of dynamic sizes their addresses."""
        if self.copies_scales:
            return Roles(self.config.num_consumers, *_REGISTERS_OF_COPIES)
        has_few_scales = self.has_constant_K and self.unroll * (1 + self.producer_rows + self.scale_sets) <= _FEW_SCALES
        if not self.blockwise or has_few_scales:
            return Roles(self.config.num_consumers)
        taken = (self.mma_tiles + 1) * self.mma_N // 2 + (self.mma_N // 4 if self.config.is_swapped else 4)
        registers = _REGISTERS_OF_CONSTANT if self.has_constant_K else _REGISTERS
        return Roles(self.config.num_consumers, *next((each for most, *each in registers if taken <= most), ()))

    @property
    def promotes(self) -> bool:
        return promotes(self.problem)

    @property
    def blockwise(self) -> bool:
        return is_blockwise(self.problem)

    @property
    def has_constant_K(self) -> bool:
        return isinstance(self.K, int)

    @property
    def k_blocks(self):
        return -(-self.K // BLOCK_K) if self.has_constant_K else T.ceildiv(self.K, BLOCK_K)

    @property
    def tile_columns(self):
        block_N = self.config.block_N
        return -(-self.N // block_N) if isinstance(self.N, int) else T.ceildiv(self.N, block_N)

    @property
    def mma_tiles(self) -> int:
        """MMAs of a consumer for one K block, below each other."""
        rows = self.config.block_N if self.config.is_swapped else self.config.block_M
        return rows // (WGMMA_M * self.config.num_consumers)

    @property
    def mma_N(self) -> int:
        """Columns of an MMA."""
        return self.config.block_M if self.config.is_swapped else self.config.block_N

    @property
    def mma_K(self) -> int:
        """K of an MMA whose result is promoted. A single K block is split: the errors of one MMA do not average out."""
        return BLOCK_K // 2 if self.has_constant_K and self.k_blocks == 1 else BLOCK_K

    @property
    def unroll(self) -> int:
        """K blocks of one iteration of the main loop: the number of stages makes every stage a constant.

        It is also how many K blocks ahead the producer loads scales that it does not copy.
        """
        return steps_of(self.config.num_stages) if self.promotes else 1

    @property
    def has_empty_steps(self) -> bool:
        """Whether the last iteration may have fewer K blocks than `unroll`: its other stages pass by empty."""
        return self.unroll > 1 and not (self.has_constant_K and self.k_blocks % self.unroll == 0)

    @property
    def tail(self) -> int:
        """K blocks of an iteration behind the main loop, where it is the same number for all tiles; else 0."""
        is_apart = self.has_empty_steps and self.has_constant_K and not self.config.divides_k
        return self.k_blocks % self.unroll if is_apart else 0

    @property
    def producer_arrivals(self) -> int:
        """Arrivals that commit a stage: of the thread that loads and each that copies scales, of each warp, or each thread."""
        if self.copies_scales:
            return 1 + WARP
        return WARPGROUP // WARP if self.blockwise else WARPGROUP

    @property
    def copies_scales(self) -> bool:
        """Whether blockwise scales are copied asynchronously, by a warp of their own, and multiplied by the consumers.

        Where MMAs are the limit, and K is a constant, the producer multiplies them: less is left to the consumers.
        """
        return self.blockwise and not self.has_constant_K

    @property
    def subtiles(self) -> int:
        """Subtiles of an MMA tile, beside each other."""
        return self.mma_N // self.config.subtile

    @property
    def scale_sets(self) -> int:
        """Blocks of scale_b that a tile meets."""
        return scale_sets_of(self.config.block_N, self.config.is_swapped)

    @property
    def shared_scales(self) -> tuple:
        """Shape of `scales_s`."""
        config = self.config
        if self.copies_scales:
            return config.num_stages, stage_scales(config.block_M)
        return (config.num_stages, self.scale_sets, config.block_M) if self.blockwise else (config.block_M + config.block_N,)

    @property
    def producer_rows(self) -> int:
        """Rows of A of which a producer thread loads the scales."""
        return -(-self.config.block_M // WARPGROUP)

    @property
    def producer_columns(self) -> int:
        """Columns of the tile, rows of B, of which a producer thread loads the scales."""
        return -(-self.config.block_N // WARPGROUP)

    @property
    def producer_loads_scales(self) -> bool:
        """Whether scales of all of K come through shared memory.

        There is one buffer for them. The producer writes it once it has acquired a stage for the second time in a tile: both
        consumers then work on this tile, and their epilogues of the one before, which read the buffer, are over.
        """
        is_long = not self.has_constant_K or self.k_blocks > self.config.num_stages
        return not self.blockwise and is_long and not self.config.divides_k  # part of a tile may have fewer K blocks

    @property
    def iterations(self):
        """Iterations of the main loop, all of them for one tile."""
        unroll = self.unroll
        if self.tail:
            return self.k_blocks // unroll
        return -(-self.k_blocks // unroll) if self.has_constant_K else T.ceildiv(self.k_blocks, unroll)


@dataclass(frozen=True, eq=False)
class Operands:
    """Tensors in global memory."""

    a: Any  # (M, K)
    scale_a: Any  # (M or 1, 1), or (M, K/128)
    b: Any  # (N, K)
    scale_b: Any  # (N or 1, 1), or (N/128, K/128)
    bias: Any  # (N,) or None
    out: Any  # (M, N)
    split: SplitTiles | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """What the roles of a block share."""

    A_s: Any  # (num_stages, block_M, BLOCK_K)
    B_s: Any  # (num_stages, block_N, BLOCK_K)
    # blockwise: (num_stages, scale_sets, block_M), a's scale times b's; copied: (num_stages, stage_scales), a's and then b's;
    # otherwise (block_M + block_N,)
    scales_s: Any
    pipeline: Pipeline
    tiles: GroupedTiles
    scheduler: PersistentScheduler
    thread: Any


@dataclass(frozen=True, eq=False)
class Accumulators:
    """The accumulators of one consumer, float32."""

    of_tiles: list  # of each MMA tile, (WGMMA_M, mma_N)
    partial: Any  # (WGMMA_M, mma_N), of an MMA that is promoted


@dataclass(frozen=True, eq=False)
class Consumer:
    """What one consumer warpgroup has of its own."""

    row: int  # its first row of the MMAs' rows of the tile
    accumulators: Accumulators
    row_scales: list  # of each MMA tile and each set of scales, (WGMMA_M,)
    column_scales: Any  # blockwise, of swapped operands: (mma_N,)
    stores: SubtileStores
    deferred: DeferredSubtiles


@dataclass(frozen=True, eq=False)
class Coord:
    """Row and column of the result at which a tile begins."""

    row: Any
    column: Any


@dataclass(eq=False)
class _Tiles:
    """The walk of `PersistentScheduler` by the names of `StreamKScheduler`: whole tiles alone."""

    scheduler: PersistentScheduler
    last: Any
    tile: Any = None
    first: int = 0

    @property
    def num_segments(self):
        return self.scheduler.num_waves

    def take(self, wave) -> None:
        self.tile = self.scheduler.tile(wave)


def start_walk(traits: Traits, block: Block):
    """Return a role's walk over tiles, or parts of them."""
    if not traits.config.divides_k:
        return _Tiles(block.scheduler, traits.iterations)
    scheduler, tiles = block.scheduler, block.tiles
    rows, columns = tiles.tile_rows, tiles.tile_columns
    if traits.blockwise:
        rows = _rows_in_step(scheduler.num_blocks, rows, columns)
        columns = T.truncdiv(tiles.num_tiles, rows)
    return start_stream_k(scheduler.num_blocks, scheduler.block, columns, rows, traits.iterations)


def walks_in_step(num_blocks: int, tile_rows, tile_columns):
    """Whether blocks that share tiles walk over each row of them in step: where some blocks of a row have no tile.

    Columns of B then come from memory once. Otherwise all tiles lie in one line: MMAs are the limit, and no block is left over.
    """
    return tile_rows * (tile_columns + 1) <= num_blocks


def _rows_in_step(num_blocks: int, tile_rows, tile_columns):
    @T.macro
    def alloc():
        return T.alloc_var("int32", T.if_then_else(walks_in_step(num_blocks, tile_rows, tile_columns), tile_rows, 1))

    return alloc()


def scale_row(layout: BlockScaledLayout, row):
    """Return the row of `scale` that holds the scale of a row: the only one where a scale covers all rows."""
    return 0 if layout.rows is None else row


def scale_type(problem: Problem, layout: BlockScaledLayout, rows, name: str, K=None):
    """Return the type of a scale parameter; scales of all of K are contiguous, so that neighbours load as one."""
    if layout.k is not None:
        return problem.scale(layout, rows, name, K)
    return T.Tensor((1 if layout.rows is None else rows, 1), "float32")


def fits_hopper(problem: Problem) -> bool:
    """Whether TMA and the layouts of the scales allow one of the kernels for Hopper."""
    whole_k = problem.layout_a.k is None and problem.layout_b.k is None
    aligned = problem.K % 16 == 0 and problem.N * T.dtype(problem.out_dtype).bits % 128 == 0  # bytes of rows
    return problem.arch == ARCH and aligned and (whole_k or (problem.layout_a, problem.layout_b) == BLOCKWISE)

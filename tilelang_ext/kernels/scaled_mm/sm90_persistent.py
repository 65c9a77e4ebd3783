"""Scaled matmul on Hopper: a warp-specialized persistent kernel, for many rows, and for few by swapped operands.

out[i, j] = sum over groups g of scale_a[i, g] * scale_b[j, g] * (a[i, g] . b[j, g]) + bias[j]

Warp roles, one block per SM:

| warpgroup | role | registers |
| --- | --- | --- |
| 0 | producer: TMA loads of A and B, and the scales | 40 |
| 1, and 2 if there are two | consumers: each has a part of the MMAs' rows and its epilogue | 232 |

Pipelines, producer role -> consumer role:

| pipeline | carries | full | empty |
| --- | --- | --- | --- |
| producer -> consumers | A and B of a K block of 128, their scales if blockwise | 128 threads, the bytes | 4 warps of each |
| consumer -> its TMA stores | subtiles of the result, two buffers per consumer | a named barrier of 128 threads | one thread |

Steady state:

    producer   acquire | TMA A, TMA B | scales to shared memory | commit | prefetch the next scales ; on to the next tile
    consumers  wait | issue the MMA of K block k | MMA k - 1 is complete: release | a deferred subtile of the tile before
               after the last K block: scale, add the bias, round | store most subtiles, defer the others

That is the timeline of `fast_accum`, where the accumulator stays in the tensor core. Otherwise every K block has an MMA of its
own, whose partial accumulator is promoted: the warpgroup adds it, times the scales if they are blockwise, to a float32
accumulator in registers, while the other consumer's MMA runs. Errors of the tensor core's narrower sums then do not add up.

An MMA has 64 rows and any multiple of 8 columns. With `is_swapped`, columns of out are its rows and rows of out its columns, so
that few rows, or such as fill no multiple of 64, take no more time than they need; subtiles are then stored transposed.

N and K may be arguments of the kernel, which sizes share then, where K has more blocks than the pipeline has stages
(`compile_kernel` says where). `is_whole` promises that the iterations of the main loop have all their K blocks; without it, the
last one passes on empty stages: behind the loop if K is constant, else each step asks whether it has a K block.

With `divides_k` all blocks share the last tiles, each an equal number of their iterations (stream-K: `StreamKScheduler`,
`SplitTiles`): for products whose bytes take longer than their MMAs and whose tiles do not fill the last wave.

Takes scales that cover all of K, or 1x128 beside 128x128. Floor on an H200: 2 M N K / 1.98e15 s, and the bytes of a, b and out
at 4.25e12 bytes/s (docs/design/performance.md). `sm90_config` picks the configuration.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tilelang.layout import make_full_bank_swizzled_layout, make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.formats import FP8_BLOCK, BlockScaledLayout
from tilelang_ext.kernels.scaled_mm.problem import Problem
from tilelang_ext.kernels.sm90 import split_tiles
from tilelang_ext.kernels.sm90.epilogue import DeferredSubtiles, SubtileStores, alloc_deferred, alloc_stores, round_subtile
from tilelang_ext.kernels.sm90.pipeline import Pipeline, alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, Roles, dispatch, warpgroup_sync
from tilelang_ext.kernels.sm90.scheduler import GroupedTiles, PersistentScheduler, start_stream_k
from tilelang_ext.kernels.sm90.split_tiles import SplitTiles

ARCH = "sm_90a"
BLOCK_K = FP8_BLOCK  # bytes of a swizzled row of shared memory, and a float32 block of scales
WGMMA_M = 64  # rows of one MMA of a warpgroup
BLOCKWISE = (BlockScaledLayout.block(1, FP8_BLOCK), BlockScaledLayout.block(FP8_BLOCK, FP8_BLOCK))
# TMA clips what lies past the end of a matrix, and all other indices are clamped here. Every barrier is explicit: upstream's
# search for places that lack one is up to half of the time that a kernel takes to lower.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}

# For blockwise scales, up to so many of a consumer's registers that accumulators and scales take: those of a thread of the
# producer and of the consumers. Where K is constant, only producers that load many scales ahead need more of them.
_REGISTERS = (180, 120, 192), (256, 88, 208)
_REGISTERS_OF_CONSTANT, _FEW_SCALES = ((130, 120, 192), (172, 88, 208)), 16
_GROUP_ROWS = 8  # rows of tiles that are walked together
_K_BLOCKS_PER_STORE = 2  # of the next tile, from one deferred subtile to the next
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
    is_whole: bool = True  # whether `steps_of` divides the K blocks; anything where accumulators are not promoted
    divides_k: bool = False  # whether blocks share the last tiles, each some of their K blocks


def steps_of(num_stages: int) -> int:
    """Return the K blocks of an iteration of the main loop where accumulators are promoted."""
    return num_stages if num_stages <= _MAX_STEPS else _STEPS


def scale_sets_of(block_N: int, is_swapped: bool) -> int:
    """Return how many blocks of scale_b a tile of so many columns meets; swapped operands have tiles of 64, 128 or 256."""
    if is_swapped:
        return -(-block_N // FP8_BLOCK)
    return 1 if FP8_BLOCK % block_N == 0 else 2


def _promotes(problem: Problem) -> bool:
    """Whether partial accumulators are added in float32 registers, K block by K block."""
    return not problem.fast_accum or _is_blockwise(problem)


def _is_blockwise(problem: Problem) -> bool:
    return problem.layout_a.k is not None


# --- what a kernel is made of ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Traits:
    """The host's constants of one kernel, and the sizes."""

    problem: Problem
    config: Config
    M: Any
    N: Any  # a number, or an expression of the kernel
    K: Any

    @property
    def roles(self) -> Roles:
        """The producer keeps blockwise scales of some K blocks in registers, and of dynamic sizes their addresses."""
        has_few_scales = self.has_constant_K and self.unroll * (1 + self.producer_rows + self.scale_sets) <= _FEW_SCALES
        if not self.blockwise or has_few_scales:
            return Roles(self.config.num_consumers)
        taken = (self.mma_tiles + 1) * self.mma_N // 2 + (self.mma_N // 4 if self.config.is_swapped else 4)
        registers = _REGISTERS_OF_CONSTANT if self.has_constant_K else _REGISTERS
        return Roles(self.config.num_consumers, *next((each for most, *each in registers if taken <= most), ()))

    @property
    def promotes(self) -> bool:
        return _promotes(self.problem)

    @property
    def blockwise(self) -> bool:
        return _is_blockwise(self.problem)

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

        It is also how many K blocks ahead the producer loads scales.
        """
        return steps_of(self.config.num_stages) if self.promotes else 1

    @property
    def has_empty_steps(self) -> bool:
        """Whether the last iteration may have fewer K blocks than `unroll`: its other stages pass by empty."""
        return self.unroll > 1 and not self.config.is_whole

    @property
    def tail(self) -> int:
        """K blocks of an iteration behind the main loop, which then needs no checks; 0 where the loop has the last one too."""
        is_apart = self.has_empty_steps and self.has_constant_K and not self.config.divides_k
        return self.k_blocks % self.unroll if is_apart else 0

    @property
    def subtiles(self) -> int:
        """Subtiles of an MMA tile, beside each other."""
        return self.mma_N // self.config.subtile

    @property
    def scale_sets(self) -> int:
        """Blocks of scale_b that a tile meets: scales of rows are stored times each of them."""
        return scale_sets_of(self.config.block_N, self.config.is_swapped)

    @property
    def shared_scales(self) -> tuple:
        """Shape of `scales_s`."""
        config = self.config
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
class _Block:
    """What the roles of a block share."""

    A_s: Any  # (num_stages, block_M, BLOCK_K)
    B_s: Any  # (num_stages, block_N, BLOCK_K)
    scales_s: Any  # blockwise: (num_stages, scale_sets, block_M), a's scale times b's; otherwise (block_M + block_N,)
    pipeline: Pipeline
    tiles: GroupedTiles
    scheduler: PersistentScheduler
    thread: Any


@dataclass(frozen=True, eq=False)
class _Accumulators:
    """The accumulators of one consumer, float32."""

    of_tiles: list  # of each MMA tile, (WGMMA_M, mma_N)
    partial: Any  # (WGMMA_M, mma_N), of an MMA that is promoted


@dataclass(frozen=True, eq=False)
class _Consumer:
    """What one consumer warpgroup has of its own."""

    row: int  # its first row of the MMAs' rows of the tile
    accumulators: _Accumulators
    row_scales: list  # of each MMA tile and each set of scales, (WGMMA_M,)
    column_scales: Any  # blockwise, of swapped operands: (mma_N,)
    stores: SubtileStores
    deferred: DeferredSubtiles


@dataclass(frozen=True, eq=False)
class _Coord:
    """Row and column of the result at which a tile begins."""

    row: Any
    column: Any


def scaled_matmul(problem: Problem, config: Config):
    """The prim_func: (a, scale_a, b, scale_b, out), before out bias where the problem has one, then the two tensors of
    `memory_of` where blocks share tiles.

    A problem whose N and K are 0 leaves them to the arguments.
    """
    M, N, K = T.dynamic("M"), problem.N, problem.K
    if not K:
        per_16_bytes = 128 // T.dtype(problem.out_dtype).bits
        N, K = T.dynamic(f"N_in_{per_16_bytes}") * per_16_bytes, T.dynamic("K_in_16") * 16
    traits = _Traits(problem, config, M, N, K)
    a_type, b_type = T.Tensor((M, K), problem.a_dtype), T.Tensor((N, K), problem.b_dtype)
    scale_a_type = scale_type(problem, problem.layout_a, M, "scale_a", K)
    scale_b_type = scale_type(problem, problem.layout_b, N, "scale_b", K)
    out_type = T.Tensor((M, N), problem.out_dtype)

    bias_type = None if problem.bias_dtype is None else T.Tensor((N,), problem.bias_dtype)
    split_types = [T.Tensor(shape, dtype) for shape, dtype in memory_of(config)]
    return _prim_func(traits, a_type, scale_a_type, b_type, scale_b_type, bias_type, split_types, out_type)


def _prim_func(traits, a_type, scale_a_type, b_type, scale_b_type, bias_type, split_types, out_type):
    """Return the prim_func of one of four lists of parameters."""
    if split_types:
        partial_type, given_type = split_types
    if bias_type is None and not split_types:

        @T.prim_func
        def scaled_matmul(a: a_type, scale_a: scale_a_type, b: b_type, scale_b: scale_b_type, out: out_type):
            _matmul(traits, Operands(a, scale_a, b, scale_b, None, out))
    elif not split_types:

        @T.prim_func
        def scaled_matmul(a: a_type, scale_a: scale_a_type, b: b_type, scale_b: scale_b_type, bias: bias_type, out: out_type):
            _matmul(traits, Operands(a, scale_a, b, scale_b, bias, out))
    elif bias_type is None:

        @T.prim_func
        def scaled_matmul(
            a: a_type,
            scale_a: scale_a_type,
            b: b_type,
            scale_b: scale_b_type,
            partial: partial_type,
            given: given_type,
            out: out_type,
        ):
            _matmul(traits, Operands(a, scale_a, b, scale_b, None, out, SplitTiles(partial, given)))
    else:

        @T.prim_func
        def scaled_matmul(
            a: a_type,
            scale_a: scale_a_type,
            b: b_type,
            scale_b: scale_b_type,
            bias: bias_type,
            partial: partial_type,
            given: given_type,
            out: out_type,
        ):
            _matmul(traits, Operands(a, scale_a, b, scale_b, bias, out, SplitTiles(partial, given)))

    return scaled_matmul


# --- block: shared memory, barriers, scheduler, roles ----------------------------------------------------------------


@T.macro
def _matmul(traits, operands):
    with T.Kernel(traits.config.num_blocks, threads=traits.roles.threads) as block:
        if traits.config.divides_k:
            split_tiles.declare()
        A_s = T.alloc_shared((traits.config.num_stages, traits.config.block_M, BLOCK_K), traits.problem.a_dtype)
        B_s = T.alloc_shared((traits.config.num_stages, traits.config.block_N, BLOCK_K), traits.problem.b_dtype)
        scales_s = T.alloc_shared(traits.shared_scales, "float32")
        stores = _alloc_stores(traits, operands)
        accumulators = _alloc_accumulators(traits)
        _swizzle(A_s, B_s, stores)
        pipeline = alloc_pipeline(traits.config.num_stages, WARPGROUP, traits.roles.consumer_warps)
        tile_rows = T.ceildiv(traits.M, traits.config.block_M)
        tiles = GroupedTiles(_GROUP_ROWS, traits.tile_columns, tile_rows)
        scheduler = PersistentScheduler(traits.config.num_blocks, block, tiles.num_tiles)
        thread = T.get_thread_binding()
        _dispatch_roles(traits, operands, _Block(A_s, B_s, scales_s, pipeline, tiles, scheduler, thread), accumulators, stores)


def _alloc_stores(traits: _Traits, operands: Operands) -> list[SubtileStores]:
    config = traits.config
    rows, columns = (config.subtile, WGMMA_M) if config.is_swapped else (WGMMA_M, config.subtile)
    return alloc_stores(operands.out, config.num_consumers, rows, columns)


def _alloc_accumulators(traits: _Traits) -> list[_Accumulators]:
    def alloc():
        return T.alloc_fragment((WGMMA_M, traits.mma_N), "float32")

    of_tiles = [[alloc() for _ in range(traits.mma_tiles)] for _ in range(traits.config.num_consumers)]
    return [_Accumulators(tiles, alloc()) for tiles in of_tiles]


def _swizzle(A_s, B_s, stores: list[SubtileStores]) -> None:
    """Lay shared buffers out as TMA and WGMMA take them, without bank conflicts."""
    buffers = [buffer for of_consumer in stores for buffer in of_consumer.buffers]
    operands = {buffer: make_full_bank_swizzled_layout(buffer) for buffer in (A_s, B_s)}
    T.annotate_layout({**operands, **{buffer: make_swizzled_layout(buffer) for buffer in buffers}})


def _dispatch_roles(traits: _Traits, operands: Operands, block: _Block, accumulators: list, stores: list) -> None:
    consumers = [
        (WARPGROUP, functools.partial(_consume, traits, operands, block, *of_consumer))
        for of_consumer in zip(accumulators, stores, strict=True)
    ]
    dispatch(block.thread, (WARPGROUP, functools.partial(_produce, traits, operands, block)), *consumers)


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


def _start_walk(traits: _Traits, block: _Block):
    """Return a role's walk over tiles, or parts of them."""
    if not traits.config.divides_k:
        return _Tiles(block.scheduler, traits.iterations)
    scheduler = block.scheduler
    return start_stream_k(scheduler.num_blocks, scheduler.block, scheduler.num_tiles, traits.iterations)


# --- producer --------------------------------------------------------------------------------------------------------


@T.macro
def _produce(traits, operands, block):
    """Keep the pipeline filled, tile after tile."""
    traits.roles.begin_producer()
    step = T.alloc_var("int32", init=0)  # K blocks since the kernel began
    tile_row, tile_column = T.alloc_local((1,), "int32"), T.alloc_local((1,), "int32")
    scales = _alloc_producer_scales(traits)
    walk = _start_walk(traits, block)
    for wave in T.serial(walk.num_segments):
        walk.take(wave)
        block.tiles.tile_coord(walk.tile, tile_row, tile_column)
        row, column = tile_row[0] * traits.config.block_M, tile_column[0] * traits.config.block_N
        _prefetch_first(traits, operands, block, scales, _Coord(row, column), walk.first * traits.unroll)
        for k in T.serial(walk.last - walk.first):
            _load_k_blocks(traits, operands, block, scales, _Coord(row, column), (walk.first + k) * traits.unroll, step)
            step = step + traits.unroll
        if traits.tail:
            last = traits.k_blocks - traits.tail
            _load_k_blocks(traits, operands, block, scales, _Coord(row, column), last, step, traits.tail)
            step = step + traits.unroll


def _alloc_producer_scales(traits: _Traits) -> list:
    """Allocate what a thread has loaded of the scales, for each K block of an iteration: of rows of A, then of B."""
    of_b = traits.scale_sets if traits.blockwise else traits.producer_columns
    return [T.alloc_local((traits.producer_rows + of_b,), "float32") for _ in range(traits.unroll)]


def _prefetch_first(traits: _Traits, operands: Operands, block: _Block, scales: list, tile: _Coord, k) -> None:
    """Load the row scales of a tile's first iteration, from K block k on."""
    for n in range(traits.unroll):
        _prefetch_scales(traits, operands, block, scales[n], tile, k + n)


def _load_k_blocks(traits: _Traits, operands: Operands, block: _Block, scales: list, tile: _Coord, k, step, tail=0) -> None:
    """Load the K blocks of one iteration, from K block k on: all of them, or of the last one `tail`."""
    for n in range(traits.unroll):
        _load_k_block(traits, operands, block, scales, tile, k, step, n, tail)


def _load_k_block(traits: _Traits, operands: Operands, block: _Block, scales: list, tile: _Coord, k, step, n: int, tail: int):
    """Fill the stage of K block k + n."""
    pipeline, a, b, A_s, B_s = block.pipeline, operands.a, operands.b, block.A_s, block.B_s
    block_M, block_N = traits.config.block_M, traits.config.block_N
    k, step = k + n, step + n
    stage, rows, columns = pipeline.stage(step), slice(tile.row, tile.row + block_M), slice(tile.column, tile.column + block_N)

    @T.macro
    def load():
        T.tma_copy(a[rows, k * BLOCK_K : (k + 1) * BLOCK_K], A_s[stage, :, :], barrier=pipeline.full[stage])
        T.tma_copy(b[columns, k * BLOCK_K : (k + 1) * BLOCK_K], B_s[stage, :, :], barrier=pipeline.full[stage])

    @T.macro
    def load_if_any():
        if k < traits.k_blocks:
            load()

    pipeline.acquire(stage, pipeline.empty_phase(step))
    if n > 0 and (traits.blockwise or (n == 1 and traits.producer_loads_scales)):
        _sync_producer(traits)
    if traits.has_empty_steps and not traits.tail:
        load_if_any()
    elif not tail or n < tail:
        load()
    if traits.blockwise:
        _sync_producer(traits)
        _store_row_scales(traits, block, scales[n], stage)
    if traits.producer_loads_scales and n == 0:
        _load_tile_scales(traits, operands, block, scales[0], tile, k)
    pipeline.commit(stage)
    _prefetch_scales(traits, operands, block, scales[n], tile, k + traits.unroll)


def _sync_producer(traits: _Traits) -> None:
    """Wait for the producer's other threads.

    The pipeline orders everything without: these are where upstream's search for missing barriers placed them, and the kernels
    have been measured with them.
    """
    warpgroup_sync(traits.config.num_consumers)


def _prefetch_scales(traits: _Traits, operands: Operands, block: _Block, scales, tile: _Coord, k) -> None:
    """Load the blockwise scales of K block k, one iteration ahead: of the thread's rows of A, then of B's."""
    scale_a, scale_b, last_k, rows = operands.scale_a, operands.scale_b, traits.k_blocks - 1, traits.producer_rows
    row, first, sets = tile.row + block.thread, tile.column // FP8_BLOCK, traits.scale_sets
    last = T.ceildiv(traits.N, FP8_BLOCK) - 1

    @T.macro
    def emit():
        for r in T.unroll(rows):
            scales[r] = scale_a[T.min(row + r * WARPGROUP, traits.M - 1), T.min(k, last_k)]
        for s in T.unroll(sets):
            scales[rows + s] = scale_b[first if sets == 1 else T.min(first + s, last), T.min(k, last_k)]

    if traits.blockwise:
        emit()


def _store_row_scales(traits: _Traits, block: _Block, scales, stage) -> None:
    """Write the row scales of a stage: a's scale times each of b's."""
    scales_s, thread, rows, block_M = block.scales_s, block.thread, traits.producer_rows, traits.config.block_M

    @T.macro
    def emit():
        for r in T.unroll(rows):
            if block_M % WARPGROUP == 0 or r * WARPGROUP + thread < block_M:
                for s in T.unroll(traits.scale_sets):
                    scales_s[stage, s, r * WARPGROUP + thread] = scales[r] * scales[rows + s]

    emit()


def _load_tile_scales(traits: _Traits, operands: Operands, block: _Block, scales, tile: _Coord, k) -> None:
    """Load the scales of all of K in a tile's first K block, and write them when `producer_loads_scales` says."""
    problem, rows, columns = traits.problem, traits.producer_rows, traits.producer_columns
    scale_a, scale_b, scales_s, thread = operands.scale_a, operands.scale_b, block.scales_s, block.thread
    row, column, block_M, block_N = tile.row + thread, tile.column + thread, traits.config.block_M, traits.config.block_N

    @T.macro
    def emit():
        if k == 0:
            for r in T.unroll(rows):
                scales[r] = scale_a[scale_row(problem.layout_a, T.min(row + r * WARPGROUP, traits.M - 1)), 0]
            for c in T.unroll(columns):
                scales[rows + c] = scale_b[scale_row(problem.layout_b, T.min(column + c * WARPGROUP, traits.N - 1)), 0]
        _sync_producer(traits)
        if k == traits.config.num_stages:
            for r in T.unroll(rows):
                if block_M % WARPGROUP == 0 or r * WARPGROUP + thread < block_M:
                    scales_s[r * WARPGROUP + thread] = scales[r]
            for c in T.unroll(columns):
                if block_N % WARPGROUP == 0 or c * WARPGROUP + thread < block_N:
                    scales_s[block_M + c * WARPGROUP + thread] = scales[rows + c]

    emit()


def scale_row(layout: BlockScaledLayout, row):
    """Return the row of `scale` that holds the scale of a row: the only one where a scale covers all rows."""
    return 0 if layout.rows is None else row


# --- consumers -------------------------------------------------------------------------------------------------------


@T.macro
def _consume(traits, operands, block, accumulators, stores):
    """Multiply and store the consumer's part, tile after tile."""
    traits.roles.begin_consumer()
    step = T.alloc_var("int32", init=0)  # K blocks since the kernel began
    tile_row, tile_column = T.alloc_local((1,), "int32"), T.alloc_local((1,), "int32")
    consumer = _alloc_consumer(traits, accumulators, stores)
    walk = _start_walk(traits, block)
    for wave in T.serial(walk.num_segments):
        walk.take(wave)
        block.tiles.tile_coord(walk.tile, tile_row, tile_column)
        if traits.promotes:
            _clear(accumulators.of_tiles)
        for k in T.serial(walk.last - walk.first):
            _multiply_k_blocks(traits, block, consumer, wave, tile_column[0] * traits.config.block_N, k, walk.first, step)
            step = step + traits.unroll
        if traits.tail:
            _multiply_tail(traits, block, consumer, tile_column[0] * traits.config.block_N, step)
            step = step + traits.unroll
        if not traits.promotes:
            T.wait_wgmma(0)
            block.pipeline.release(block.pipeline.stage(step - 1), block.thread % WARP)
            _fence(traits, accumulators.of_tiles)
        coord = _Coord(tile_row[0] * traits.config.block_M, tile_column[0] * traits.config.block_N)
        _finish(traits, operands, block, consumer, walk, coord)
    consumer.deferred.store_all(block.scheduler.has_tiles)
    stores.drain()


def _alloc_consumer(traits: _Traits, accumulators: _Accumulators, stores: SubtileStores) -> _Consumer:
    sets = traits.scale_sets if traits.blockwise and not traits.config.is_swapped else 1
    row_scales = [[T.alloc_fragment((WGMMA_M,), "float32") for _ in range(sets)] for _ in range(traits.mma_tiles)]
    column_scales = T.alloc_fragment((traits.mma_N,), "float32") if traits.blockwise and traits.config.is_swapped else None
    count = 0 if traits.config.is_swapped else traits.subtiles
    deferred = alloc_deferred(stores, count, traits.config.deferred, _K_BLOCKS_PER_STORE)
    row = stores.warpgroup * traits.mma_tiles * WGMMA_M
    return _Consumer(row, accumulators, row_scales, column_scales, stores, deferred)


def _clear(fragments: list) -> None:
    for fragment in fragments:
        T.evaluate(T.clear(fragment))


def _fence(traits: _Traits, accumulators: list) -> None:
    for accumulator in accumulators:
        T.warpgroup_fence_operand(accumulator, num_regs=WGMMA_M * traits.mma_N // WARPGROUP)


def _multiply_k_blocks(traits: _Traits, block: _Block, consumer: _Consumer, wave, column, k, first, step) -> None:
    """Multiply the K blocks of iteration `first` + k, for the tile that begins at a column."""
    for n in range(traits.unroll):
        if not traits.promotes:
            _multiply(traits, block, consumer, k, step + n)
            consumer.deferred.store_due(k, wave > 0)
        elif traits.has_empty_steps and not traits.tail and n > 0:  # an iteration has one K block at least
            _multiply_if_any(traits, block, consumer, column, (first + k) * traits.unroll + n, step + n, n)
        else:
            _multiply_and_promote(traits, block, consumer, column, step + n, n)


def _multiply_tail(traits: _Traits, block: _Block, consumer: _Consumer, column, step) -> None:
    """Multiply the K blocks behind the main loop, and pass the other stages on."""
    for n in range(traits.unroll):
        if n < traits.tail:
            _multiply_and_promote(traits, block, consumer, column, step + n, n)
        else:
            _pass_on(traits, block, step + n)


def _pass_on(traits: _Traits, block: _Block, step) -> None:
    """Release a stage into which nothing was loaded.

    No MMA makes the lanes of a warp meet here: one that still waits would miss the phase once the others' release has let the
    producer fill the stage again.
    """
    pipeline = block.pipeline
    pipeline.wait(pipeline.stage(step), pipeline.full_phase(step))
    T.evaluate(T.sync_warp())
    pipeline.release(pipeline.stage(step), block.thread % WARP)


def _mma(traits: _Traits, block: _Block, accumulator, stage, row: int, clear, k: slice = slice(0, BLOCK_K)):
    """Issue the MMA of 64 rows of a stage, from `row` on, with all columns of the tile; the other way about if swapped."""
    rows_s, columns_s = (block.B_s, block.A_s) if traits.config.is_swapped else (block.A_s, block.B_s)
    rows, columns = rows_s[stage, row : row + WGMMA_M, k], columns_s[stage, :, k]
    return T.wgmma_gemm(rows, columns, accumulator, transpose_B=True, policy=T.GemmWarpPolicy.FullRow, clear_accum=clear)


def _multiply(traits: _Traits, block: _Block, consumer: _Consumer, k, step) -> None:
    """Issue the MMAs of a K block, which add to the accumulators; then wait for those before and release their stage."""
    pipeline, accumulators, lane = block.pipeline, consumer.accumulators.of_tiles, block.thread % WARP
    stage = pipeline.stage(step)

    @T.macro
    def release_previous():
        if k > 0:
            T.wait_wgmma(traits.mma_tiles)
            pipeline.release(pipeline.stage(step - 1), lane)

    pipeline.wait(stage, pipeline.full_phase(step))
    for m, accumulator in enumerate(accumulators):
        T.evaluate(_mma(traits, block, accumulator, stage, consumer.row + m * WGMMA_M, k == 0))
    release_previous()


def _multiply_if_any(traits: _Traits, block: _Block, consumer: _Consumer, column, k, step, n: int) -> None:
    """The same as `_multiply_and_promote` of K block k, or, past the last one, pass the stage on."""

    @T.macro
    def emit():
        if k < traits.k_blocks:
            _multiply_and_promote(traits, block, consumer, column, step, n)
        else:
            _pass_on(traits, block, step)

    emit()


def _multiply_and_promote(traits: _Traits, block: _Block, consumer: _Consumer, column, step, n: int) -> None:
    """Add the MMAs of a K block, the n-th of an iteration, to the accumulators in registers, one MMA tile after the other."""
    pipeline = block.pipeline
    stage = n if traits.unroll == traits.config.num_stages else pipeline.stage(step)
    pipeline.wait(stage, pipeline.full_phase(step))
    if traits.blockwise:
        _read_scales(traits, block, consumer, stage)
    for m in range(traits.mma_tiles):
        for k in range(0, BLOCK_K, traits.mma_K):
            _promote(traits, block, consumer, column, stage, m, k)


def _read_scales(traits: _Traits, block: _Block, consumer: _Consumer, stage) -> None:
    """Load the scales of a stage: of the MMAs' rows, or of swapped operands of their columns."""
    if traits.config.is_swapped:
        _read(block.scales_s, stage, consumer.row // FP8_BLOCK, 0, consumer.column_scales, traits.mma_N // 4)
        return
    for m, of_tile in enumerate(consumer.row_scales):
        for s, row_scales in enumerate(of_tile):
            _read(block.scales_s, stage, s, consumer.row + m * WGMMA_M, row_scales, 2)


def _read(scales_s, stage, scale_set: int, first: int, scales_f, num_regs: int) -> None:
    (count,) = map(int, scales_f.shape)

    @T.macro
    def emit():
        for i in T.Parallel(count):
            scales_f[i] = scales_s[stage, scale_set, first + i]
        # The compiler would otherwise load them between the MMAs, which stall then.
        T.warpgroup_fence_operand(scales_f, num_regs=num_regs)

    emit()


def _promote(traits: _Traits, block: _Block, consumer: _Consumer, column, stage, m: int, k: int) -> None:
    """Multiply `mma_K` of a K block for MMA tile m, and add the partial accumulator in float32."""
    row, lane = consumer.row + m * WGMMA_M, block.thread % WARP
    accumulator, partial = consumer.accumulators.of_tiles[m], consumer.accumulators.partial
    row_scales, column_scales = consumer.row_scales[m], consumer.column_scales
    boundary = FP8_BLOCK - column % FP8_BLOCK  # the first column of the tile's second block of scale_b
    granule = math.gcd(traits.config.block_N, FP8_BLOCK)  # of which the boundary is a multiple: one choice for so many columns

    def scaled(value, i, j):
        if not traits.blockwise:
            return value
        if traits.config.is_swapped:
            return value * column_scales[j]
        if traits.scale_sets == 1:
            return value * row_scales[0][i]
        return value * T.if_then_else(j // granule * granule < boundary, row_scales[0][i], row_scales[1][i])

    @T.macro
    def emit():
        _mma(traits, block, partial, stage, row, True, slice(k, k + traits.mma_K))
        T.wait_wgmma(0)
        if m == traits.mma_tiles - 1 and k + traits.mma_K == BLOCK_K:
            block.pipeline.release(stage, lane)
        for i, j in T.Parallel(WGMMA_M, traits.mma_N):
            accumulator[i, j] += scaled(partial[i, j], i, j)

    emit()


# --- epilogue of a consumer ------------------------------------------------------------------------------------------


def _finish(traits: _Traits, operands: Operands, block: _Block, consumer: _Consumer, walk, tile: _Coord) -> None:
    """Store the tile, of whose K blocks other blocks may have multiplied some; or give the accumulators to another block."""
    split, scheduler = operands.split, block.scheduler
    place = consumer.stores.warpgroup, consumer.row, consumer.accumulators.of_tiles, block.thread

    @T.macro
    def emit():
        if walk.is_given:
            split.give(scheduler.block, *place)
        else:
            if walk.first > 0:
                for giver in T.serial(walk.first_sharer, scheduler.block):
                    split.add(giver, *place)
            _store_tile(traits, operands, block, consumer, tile)

    emit() if traits.config.divides_k else _store_tile(traits, operands, block, consumer, tile)


def _store_tile(traits: _Traits, operands: Operands, block: _Block, consumer: _Consumer, tile: _Coord) -> None:
    """Finish the consumer's part of a tile; store the first subtiles, and defer the others to the next tile's main loop."""
    for m, accumulator in enumerate(consumer.accumulators.of_tiles):
        _scale(traits, operands, block, consumer, tile, m)
        first = consumer.row + m * WGMMA_M
        for n in range(traits.subtiles):
            number = m * traits.subtiles + n
            if traits.config.is_swapped:
                consumer.stores.round_and_store_transposed(number, accumulator, n, tile.row, tile.column + first)
            elif n < consumer.deferred.first:
                consumer.stores.round_and_store(number, accumulator, n, tile.row + first, tile.column)
            else:
                round_subtile(accumulator, n, consumer.deferred.values[n - consumer.deferred.first])
    consumer.deferred.defer(tile.row + consumer.row, tile.column)


def _scale(traits: _Traits, operands: Operands, block: _Block, consumer: _Consumer, tile: _Coord, m: int) -> None:
    """Multiply MMA tile m by the scales that cover all of K, and add the bias."""
    bias, is_swapped = operands.bias, traits.config.is_swapped
    accumulator, row_scales = consumer.accumulators.of_tiles[m], consumer.row_scales[m][0]
    first = consumer.row + m * WGMMA_M

    def finished(value, row_scale, i, j):
        if not traits.blockwise:
            value = value * (row_scale * _scale_of(traits, operands, block, tile, j, is_swapped))
        if bias is None:
            return value
        # Columns past the end are not stored: any bias will do for them.
        return value + T.cast(bias[T.min(tile.column + (first + i if is_swapped else j), traits.N - 1)], "float32")

    @T.macro
    def emit():
        if not traits.blockwise:
            for i in T.Parallel(WGMMA_M):
                row_scales[i] = _scale_of(traits, operands, block, tile, first + i, not is_swapped)
        # All elements before the first store: the compiler moves no load across a store.
        for i, j in T.Parallel(WGMMA_M, traits.mma_N):
            accumulator[i, j] = finished(accumulator[i, j], row_scales[i], i, j)

    emit()


def _scale_of(traits: _Traits, operands: Operands, block: _Block, tile: _Coord, place, is_row: bool):
    """Return the scale of a row or a column of the tile; past the end of out any scale will do."""
    problem = traits.problem
    if traits.producer_loads_scales:
        return block.scales_s[place if is_row else traits.config.block_M + place]
    if is_row:
        return operands.scale_a[scale_row(problem.layout_a, T.min(tile.row + place, traits.M - 1)), 0]
    return operands.scale_b[scale_row(problem.layout_b, T.min(tile.column + place, traits.N - 1)), 0]


# --- host ------------------------------------------------------------------------------------------------------------


def memory_of(config: Config) -> tuple[tuple[tuple[int, ...], str], ...]:
    """Return shapes and dtypes of the memory through which blocks give accumulators to others: `SplitTiles`."""
    if not config.divides_k:
        return ()
    elements = config.block_M * config.block_N
    return ((config.num_blocks, elements), "float32"), ((config.num_blocks, config.num_consumers), "int64")


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


def compile_kernel(problem: Problem, config: Config, compile: Callable) -> Callable:
    """Return the compiled kernel; N and K are its constants where it has few K blocks, or promotes at the speed of its MMAs.

    Its producer then needs fewer registers, and the consumers get them.
    """
    general = replace(problem, max_M=0)
    is_bound_by_loads = config.is_swapped and config.block_M <= WGMMA_M
    if config.num_stages < -(-problem.K // BLOCK_K) and (not _promotes(problem) or is_bound_by_loads):
        general = replace(general, N=0, K=0)
    return compile(scaled_matmul, general, config, pass_configs=PASS_CONFIGS)

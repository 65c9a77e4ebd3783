"""Scaled matmul on Hopper for more than 128 rows: a warp-specialized persistent kernel.

out[i, j] = sum over groups g of scale_a[i, g] * scale_b[j, g] * (a[i, g] . b[j, g]) + bias[j]

Warp roles, of a block of 384 threads, one block per SM:

| warpgroup | role | registers |
| --- | --- | --- |
| 0 | producer: TMA loads of A and B, and the scales | 40 |
| 1, 2 | consumers: each has one half of the tile's rows, its MMAs and its epilogue | 232 |

Pipelines, producer role -> consumer role:

| pipeline | carries | full | empty |
| --- | --- | --- | --- |
| producer -> both consumers | A and B of a K block of 128, and its row scales if blockwise | 128 threads, the bytes | 8 warps |
| consumer -> its TMA stores | subtiles of the result, two buffers per consumer | a named barrier of 128 threads | one thread |

Steady state:

    producer   acquire | TMA A, TMA B | scales to shared memory | commit | prefetch the next scales ; on to the next tile
    consumers  wait | issue the MMA of K block k | MMA k - 1 is complete: release | a deferred subtile of the tile before
               after the last K block: scale, add the bias, round | store most subtiles, defer the others

That is the timeline of `fast_accum`, where the accumulator stays in the tensor core. Otherwise every K block has an MMA of its
own, whose partial accumulator is promoted: the warpgroup adds it, times the row scales if they are blockwise, to a float32
accumulator in registers, while the other consumer's MMA runs. Errors of the tensor core's narrower sums then do not add up.

Takes scales that cover all of K, or 1x128 beside 128x128. Floor on an H200: 2 M N K / 1.98e15 s (docs/design/performance.md).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.formats import FP8_BLOCK, BlockScaledLayout
from tilelang_ext.kernels.scaled_mm.problem import Problem
from tilelang_ext.kernels.sm90.epilogue import DeferredSubtiles, SubtileStores, alloc_deferred, alloc_stores, round_subtile
from tilelang_ext.kernels.sm90.pipeline import Pipeline, alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, Roles, dispatch
from tilelang_ext.kernels.sm90.scheduler import GroupedTiles, PersistentScheduler

ARCH = "sm_90a"
BLOCK_K = FP8_BLOCK  # bytes of a swizzled row of shared memory, and a float32 block of scales
WGMMA_M = 64  # rows of one MMA of a warpgroup
BLOCKWISE = (BlockScaledLayout.block(1, FP8_BLOCK), BlockScaledLayout.block(FP8_BLOCK, FP8_BLOCK))
# TMA clips what lies past the end of a matrix, and all other indices are clamped here.
PASS_CONFIGS = {"tl.disable_warp_specialized": True, "tl.disable_safe_memory_legalize": True}

_ROLES = Roles(num_consumers=2)
_GROUP_ROWS = 8  # rows of tiles that are walked together
_K_BLOCKS_PER_STORE = 2  # of the next tile, from one deferred subtile to the next


@dataclass(frozen=True)
class Config:
    """Tile of a block, stages of the pipeline, columns of a subtile, blocks of the grid, and deferred subtiles of a tile."""

    block_M: int
    block_N: int
    num_stages: int
    subtile_N: int
    num_blocks: int
    deferred: int = 0


def pick_config(problem: Problem) -> Config:
    """Return the largest tile of which every SM has one."""
    table = [
        # (whether accumulators are promoted, block_M, block_N, num_stages, bytes of a subtile's row, deferred)
        (False, 128, 256, 4, 128, 3),  # 128 accumulator registers and 48 of deferred subtiles; reads the L2 cache least
        (False, 128, 128, 6, 128, 2),
        (True, 256, 128, 4, 64, 0),  # 192 registers: a partial accumulator beside two accumulators; room for the row scales
        (True, 128, 128, 5, 64, 0),
    ]
    rows = [row for row in table if row[0] is _promotes(problem)]
    for _, block_M, block_N, num_stages, subtile_bytes, deferred in rows:  # noqa: B007 -- the last one serves what fits none
        if -(-problem.max_M // block_M) * -(-problem.N // block_N) >= problem.num_sms:
            break
    k_blocks = -(-problem.K // BLOCK_K)
    num_stages = 4 if k_blocks % num_stages and k_blocks % 4 == 0 else min(num_stages, k_blocks)  # constant stages: 7% faster
    subtile_N = subtile_bytes * 8 // T.dtype(problem.out_dtype).bits
    deferred = min(deferred, k_blocks // _K_BLOCKS_PER_STORE)
    return Config(block_M, block_N, num_stages, subtile_N, problem.num_sms, deferred)


def _promotes(problem: Problem) -> bool:
    """Whether partial accumulators are added in float32 registers, K block by K block."""
    return not problem.fast_accum or _is_blockwise(problem)


def _is_blockwise(problem: Problem) -> bool:
    return problem.layout_a.k is not None


# --- what a kernel is made of ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Traits:
    """The host's constants of one kernel, and M."""

    problem: Problem
    config: Config
    M: Any

    @property
    def promotes(self) -> bool:
        return _promotes(self.problem)

    @property
    def blockwise(self) -> bool:
        return _is_blockwise(self.problem)

    @property
    def k_blocks(self) -> int:
        return -(-self.problem.K // BLOCK_K)

    @property
    def tile_columns(self) -> int:
        return -(-self.problem.N // self.config.block_N)

    @property
    def mma_tiles(self) -> int:
        """MMAs of a consumer for one K block, below each other."""
        return self.config.block_M // (WGMMA_M * _ROLES.num_consumers)

    @property
    def mma_K(self) -> int:
        """K of an MMA whose result is promoted. A single K block is split: the errors of one MMA do not average out."""
        return BLOCK_K if self.k_blocks > 1 else BLOCK_K // 2

    @property
    def unroll(self) -> int:
        """K blocks of one iteration of the main loop: the number of stages makes every stage a constant."""
        return self.config.num_stages if self.promotes and self.k_blocks % self.config.num_stages == 0 else 1

    @property
    def subtiles(self) -> int:
        """Subtiles of an MMA tile, beside each other."""
        return self.config.block_N // self.config.subtile_N

    @property
    def shared_scales(self) -> tuple:
        """Shape of `scales_s`."""
        config = self.config
        return (config.num_stages, config.block_M) if self.blockwise else (config.block_M + config.block_N,)

    @property
    def producer_rows(self) -> int:
        """Rows of A of which a producer thread loads the scales."""
        return self.config.block_M // WARPGROUP

    @property
    def producer_columns(self) -> int:
        """Columns of the tile, rows of B, of which a producer thread loads the scales."""
        return self.config.block_N // WARPGROUP

    @property
    def producer_loads_scales(self) -> bool:
        """Whether scales of all of K come through shared memory.

        There is one buffer for them. The producer writes it once it has acquired a stage for the second time in a tile: both
        consumers then work on this tile, and their epilogues of the one before, which read the buffer, are over.
        """
        return not self.blockwise and self.k_blocks > self.config.num_stages


@dataclass(frozen=True, eq=False)
class Operands:
    """Tensors in global memory."""

    a: Any  # (M, K)
    scale_a: Any  # (M or 1, 1), or (M, K/128)
    b: Any  # (N, K)
    scale_b: Any  # (N or 1, 1), or (N/128, K/128)
    bias: Any  # (N,) or None
    out: Any  # (M, N)


@dataclass(frozen=True, eq=False)
class _Block:
    """What the roles of a block share."""

    A_s: Any  # (num_stages, block_M, BLOCK_K)
    B_s: Any  # (num_stages, block_N, BLOCK_K)
    scales_s: Any  # blockwise: (num_stages, block_M), a's scale times b's; otherwise (block_M + block_N,)
    pipeline: Pipeline
    tiles: GroupedTiles
    scheduler: PersistentScheduler
    thread: Any


@dataclass(frozen=True, eq=False)
class _Accumulators:
    """The accumulators of one consumer, float32."""

    of_tiles: list  # of each MMA tile, (WGMMA_M, block_N)
    partial: Any  # (WGMMA_M, block_N), of an MMA that is promoted


@dataclass(frozen=True, eq=False)
class _Consumer:
    """What one consumer warpgroup has of its own."""

    row: int  # its first row of the tile
    accumulators: _Accumulators
    row_scales: list  # of each MMA tile, (WGMMA_M,)
    stores: SubtileStores
    deferred: DeferredSubtiles


@dataclass(frozen=True, eq=False)
class _Coord:
    """Row and column of the result at which a tile begins."""

    row: Any
    column: Any


def scaled_matmul(problem: Problem, config: Config):
    """The prim_func: (a, scale_a, b, scale_b, out), with bias before out where the problem has one."""
    M, N, K = T.dynamic("M"), problem.N, problem.K
    traits = _Traits(problem, config, M)
    a_type, b_type = T.Tensor((M, K), problem.a_dtype), T.Tensor((N, K), problem.b_dtype)
    scale_a_type = scale_type(problem, problem.layout_a, M, "scale_a")
    scale_b_type = scale_type(problem, problem.layout_b, N, "scale_b")
    out_type = T.Tensor((M, N), problem.out_dtype)

    if problem.bias_dtype is None:

        @T.prim_func
        def scaled_matmul(a: a_type, scale_a: scale_a_type, b: b_type, scale_b: scale_b_type, out: out_type):
            _matmul(traits, Operands(a, scale_a, b, scale_b, None, out))
    else:
        bias_type = T.Tensor((N,), problem.bias_dtype)

        @T.prim_func
        def scaled_matmul(a: a_type, scale_a: scale_a_type, b: b_type, scale_b: scale_b_type, bias: bias_type, out: out_type):
            _matmul(traits, Operands(a, scale_a, b, scale_b, bias, out))

    return scaled_matmul


# --- block: shared memory, barriers, scheduler, roles ----------------------------------------------------------------


@T.macro
def _matmul(traits, operands):
    with T.Kernel(traits.config.num_blocks, threads=_ROLES.threads) as block:
        A_s = T.alloc_shared((traits.config.num_stages, traits.config.block_M, BLOCK_K), traits.problem.a_dtype)
        B_s = T.alloc_shared((traits.config.num_stages, traits.config.block_N, BLOCK_K), traits.problem.b_dtype)
        scales_s = T.alloc_shared(traits.shared_scales, "float32")
        stores = alloc_stores(operands.out, _ROLES.num_consumers, WGMMA_M, traits.config.subtile_N)
        accumulators = _alloc_accumulators(traits)
        _swizzle(A_s, B_s, stores)
        pipeline = alloc_pipeline(traits.config.num_stages, WARPGROUP, _ROLES.consumer_warps)
        tile_rows = T.ceildiv(traits.M, traits.config.block_M)
        tiles = GroupedTiles(_GROUP_ROWS, traits.tile_columns, tile_rows)
        scheduler = PersistentScheduler(traits.config.num_blocks, block, tiles.num_tiles)
        thread = T.get_thread_binding()
        _dispatch_roles(traits, operands, _Block(A_s, B_s, scales_s, pipeline, tiles, scheduler, thread), accumulators, stores)


def _alloc_accumulators(traits: _Traits) -> list[_Accumulators]:
    def alloc():
        return T.alloc_fragment((WGMMA_M, traits.config.block_N), "float32")

    of_tiles = [[alloc() for _ in range(traits.mma_tiles)] for _ in range(_ROLES.num_consumers)]
    return [_Accumulators(tiles, alloc()) for tiles in of_tiles]


def _swizzle(A_s, B_s, stores: list[SubtileStores]) -> None:
    """Lay shared buffers out as TMA and WGMMA take them, without bank conflicts."""
    buffers = [buffer for of_consumer in stores for buffer in of_consumer.buffers]
    T.annotate_layout({buffer: make_swizzled_layout(buffer) for buffer in (A_s, B_s, *buffers)})


def _dispatch_roles(traits: _Traits, operands: Operands, block: _Block, accumulators: list, stores: list) -> None:
    consumers = [
        (WARPGROUP, functools.partial(_consume, traits, operands, block, *of_consumer))
        for of_consumer in zip(accumulators, stores, strict=True)
    ]
    dispatch(block.thread, (WARPGROUP, functools.partial(_produce, traits, operands, block)), *consumers)


# --- producer --------------------------------------------------------------------------------------------------------


@T.macro
def _produce(traits, operands, block):
    """Keep the pipeline filled, tile after tile."""
    _ROLES.begin_producer()
    step = T.alloc_var("int32", init=0)  # K blocks since the kernel began
    tile_row, tile_column = T.alloc_local((1,), "int32"), T.alloc_local((1,), "int32")
    scales = _alloc_producer_scales(traits)
    for wave in T.serial(block.scheduler.num_waves):
        block.tiles.tile_coord(block.scheduler.tile(wave), tile_row, tile_column)
        row, column = tile_row[0] * traits.config.block_M, tile_column[0] * traits.config.block_N
        _prefetch_first(traits, operands, block, scales, _Coord(row, column))
        for k in T.serial(traits.k_blocks // traits.unroll):
            _load_k_blocks(traits, operands, block, scales, _Coord(row, column), k * traits.unroll, step)
            step = step + traits.unroll


def _alloc_producer_scales(traits: _Traits) -> list:
    """Allocate what a thread has loaded of the scales, for each K block of an iteration: of rows of A, then of B."""
    of_b = 1 if traits.blockwise else traits.producer_columns
    return [T.alloc_local((traits.producer_rows + of_b,), "float32") for _ in range(traits.unroll)]


def _prefetch_first(traits: _Traits, operands: Operands, block: _Block, scales: list, tile: _Coord) -> None:
    """Load the row scales of a tile's first iteration."""
    for n in range(traits.unroll):
        _prefetch_scales(traits, operands, block, scales[n], tile, n)


def _load_k_blocks(traits: _Traits, operands: Operands, block: _Block, scales: list, tile: _Coord, k, step) -> None:
    """Load the K blocks of one iteration, from K block k on."""
    for n in range(traits.unroll):
        _load_k_block(traits, operands, block, scales, tile, k, step, n)


def _load_k_block(traits: _Traits, operands: Operands, block: _Block, scales: list, tile: _Coord, k, step, n: int) -> None:
    """Fill the stage of K block k + n."""
    pipeline, a, b, A_s, B_s = block.pipeline, operands.a, operands.b, block.A_s, block.B_s
    block_M, block_N = traits.config.block_M, traits.config.block_N
    k, step = k + n, step + n
    stage, rows, columns = pipeline.stage(step), slice(tile.row, tile.row + block_M), slice(tile.column, tile.column + block_N)

    @T.macro
    def emit():
        pipeline.acquire(stage, pipeline.empty_phase(step))
        T.tma_copy(a[rows, k * BLOCK_K : (k + 1) * BLOCK_K], A_s[stage, :, :], barrier=pipeline.full[stage])
        T.tma_copy(b[columns, k * BLOCK_K : (k + 1) * BLOCK_K], B_s[stage, :, :], barrier=pipeline.full[stage])
        if traits.blockwise:
            _store_row_scales(traits, block, scales[n], stage)
        if traits.producer_loads_scales and n == 0:
            _load_tile_scales(traits, operands, block, scales[0], tile, k)
        pipeline.commit(stage)
        _prefetch_scales(traits, operands, block, scales[n], tile, k + traits.unroll)

    emit()


def _prefetch_scales(traits: _Traits, operands: Operands, block: _Block, scales, tile: _Coord, k) -> None:
    """Load the blockwise scales of K block k, one iteration ahead: of the thread's rows of A, then of B's."""
    scale_a, scale_b, last_k, rows = operands.scale_a, operands.scale_b, traits.k_blocks - 1, traits.producer_rows
    row, column = tile.row + block.thread, tile.column

    @T.macro
    def emit():
        for r in T.unroll(rows):
            scales[r] = scale_a[T.min(row + r * WARPGROUP, traits.M - 1), T.min(k, last_k)]
        scales[rows] = scale_b[column // FP8_BLOCK, T.min(k, last_k)]

    if traits.blockwise:
        emit()


def _store_row_scales(traits: _Traits, block: _Block, scales, stage) -> None:
    """Write the row scales of a stage: a's scale times b's."""
    scales_s, thread, rows = block.scales_s, block.thread, traits.producer_rows

    @T.macro
    def emit():
        for r in T.unroll(rows):
            scales_s[stage, r * WARPGROUP + thread] = scales[r] * scales[rows]

    emit()


def _load_tile_scales(traits: _Traits, operands: Operands, block: _Block, scales, tile: _Coord, k) -> None:
    """Load the scales of all of K in a tile's first K block, and write them when `producer_loads_scales` says."""
    problem, rows, columns = traits.problem, traits.producer_rows, traits.producer_columns
    scale_a, scale_b, scales_s, thread = operands.scale_a, operands.scale_b, block.scales_s, block.thread
    row, column = tile.row + thread, tile.column + thread

    @T.macro
    def emit():
        if k == 0:
            for r in T.unroll(rows):
                scales[r] = scale_a[scale_row(problem.layout_a, T.min(row + r * WARPGROUP, traits.M - 1)), 0]
            for c in T.unroll(columns):
                scales[rows + c] = scale_b[scale_row(problem.layout_b, T.min(column + c * WARPGROUP, problem.N - 1)), 0]
        if k == traits.config.num_stages:
            for n in T.unroll(rows + columns):
                scales_s[n * WARPGROUP + thread] = scales[n]

    emit()


def scale_row(layout: BlockScaledLayout, row):
    """Return the row of `scale` that holds the scale of a row: the only one where a scale covers all rows."""
    return 0 if layout.rows is None else row


# --- consumers -------------------------------------------------------------------------------------------------------


@T.macro
def _consume(traits, operands, block, accumulators, stores):
    """Multiply and store the consumer's rows, tile after tile."""
    _ROLES.begin_consumer()
    step = T.alloc_var("int32", init=0)  # K blocks since the kernel began
    tile_row, tile_column = T.alloc_local((1,), "int32"), T.alloc_local((1,), "int32")
    consumer = _alloc_consumer(traits, accumulators, stores)
    for wave in T.serial(block.scheduler.num_waves):
        block.tiles.tile_coord(block.scheduler.tile(wave), tile_row, tile_column)
        if traits.promotes:
            _clear(accumulators.of_tiles)
        for k in T.serial(traits.k_blocks // traits.unroll):
            _multiply_k_blocks(traits, block, consumer, wave, k, step)
            step = step + traits.unroll
        if not traits.promotes:
            T.wait_wgmma(0)
            block.pipeline.release(block.pipeline.stage(step - 1), block.thread % WARP)
            T.warpgroup_fence_operand(accumulators.of_tiles[0], num_regs=WGMMA_M * traits.config.block_N // WARPGROUP)
        _store_tile(
            traits,
            operands,
            block,
            consumer,
            _Coord(tile_row[0] * traits.config.block_M, tile_column[0] * traits.config.block_N),
        )
    consumer.deferred.store_all(block.scheduler.has_tiles)
    stores.drain()


def _alloc_consumer(traits: _Traits, accumulators: _Accumulators, stores: SubtileStores) -> _Consumer:
    row_scales = [T.alloc_fragment((WGMMA_M,), "float32") for _ in range(traits.mma_tiles)]
    deferred = alloc_deferred(stores, traits.subtiles, traits.config.deferred, _K_BLOCKS_PER_STORE)
    return _Consumer(stores.warpgroup * traits.mma_tiles * WGMMA_M, accumulators, row_scales, stores, deferred)


def _clear(fragments: list) -> None:
    for fragment in fragments:
        T.evaluate(T.clear(fragment))


def _multiply_k_blocks(traits: _Traits, block: _Block, consumer: _Consumer, wave, k, step) -> None:
    """Multiply the K blocks of iteration k."""
    for n in range(traits.unroll):
        if traits.promotes:
            _multiply_and_promote(traits, block, consumer, step + n, n)
        else:
            _multiply(block, consumer, k, step + n)
            consumer.deferred.store_due(k, wave > 0)


def _mma(block: _Block, accumulator, stage, row: int, clear, k: slice = slice(0, BLOCK_K)):
    """Issue the MMA of 64 rows of a stage, from `row` on, with all columns of the tile."""
    A_k, B_k = block.A_s[stage, row : row + WGMMA_M, k], block.B_s[stage, :, k]
    return T.wgmma_gemm(A_k, B_k, accumulator, transpose_B=True, policy=T.GemmWarpPolicy.FullRow, clear_accum=clear)


def _multiply(block: _Block, consumer: _Consumer, k, step) -> None:
    """Issue the MMA of a K block, which adds to the accumulator; then wait for the one before and release its stage."""
    pipeline, accumulator, lane = block.pipeline, consumer.accumulators.of_tiles[0], block.thread % WARP
    stage = pipeline.stage(step)

    @T.macro
    def emit():
        pipeline.wait(stage, pipeline.full_phase(step))
        _mma(block, accumulator, stage, consumer.row, k == 0)
        if k > 0:
            T.wait_wgmma(1)
            pipeline.release(pipeline.stage(step - 1), lane)

    emit()


def _multiply_and_promote(traits: _Traits, block: _Block, consumer: _Consumer, step, n: int) -> None:
    """Add the MMAs of a K block, the n-th of an iteration, to the accumulators in registers, one MMA tile after the other."""
    pipeline = block.pipeline
    stage = n if traits.unroll > 1 else pipeline.stage(step)
    pipeline.wait(stage, pipeline.full_phase(step))
    if traits.blockwise:
        for m in range(traits.mma_tiles):
            _read_row_scales(block, consumer, stage, m)
    for m in range(traits.mma_tiles):
        for k in range(0, BLOCK_K, traits.mma_K):
            _promote(traits, block, consumer, stage, m, k)


def _read_row_scales(block: _Block, consumer: _Consumer, stage, m: int) -> None:
    """Load the row scales of MMA tile m."""
    scales_s, row_scales, row = block.scales_s, consumer.row_scales[m], consumer.row + m * WGMMA_M

    @T.macro
    def emit():
        for i in T.Parallel(WGMMA_M):
            row_scales[i] = scales_s[stage, row + i]
        # The compiler would otherwise load them between the MMAs, which stall then.
        T.warpgroup_fence_operand(row_scales, num_regs=2)

    emit()


def _promote(traits: _Traits, block: _Block, consumer: _Consumer, stage, m: int, k: int) -> None:
    """Multiply `mma_K` of a K block for MMA tile m, and add the partial accumulator in float32."""
    row, row_scales, lane = consumer.row + m * WGMMA_M, consumer.row_scales[m], block.thread % WARP
    accumulator, partial = consumer.accumulators.of_tiles[m], consumer.accumulators.partial

    @T.macro
    def emit():
        _mma(block, partial, stage, row, True, slice(k, k + traits.mma_K))
        T.wait_wgmma(0)
        if m == traits.mma_tiles - 1 and k + traits.mma_K == BLOCK_K:
            block.pipeline.release(stage, lane)
        for i, j in T.Parallel(WGMMA_M, traits.config.block_N):
            accumulator[i, j] += partial[i, j] * row_scales[i] if traits.blockwise else partial[i, j]

    emit()


# --- epilogue of a consumer ------------------------------------------------------------------------------------------


def _store_tile(traits: _Traits, operands: Operands, block: _Block, consumer: _Consumer, tile: _Coord) -> None:
    """Finish the consumer's rows of a tile; store the first subtiles, and defer the others to the next tile's main loop."""
    for m in range(traits.mma_tiles):
        _scale(traits, operands, block, consumer, tile, m)
        for n in range(traits.subtiles):
            accumulator, row = consumer.accumulators.of_tiles[m], tile.row + consumer.row + m * WGMMA_M
            if n < consumer.deferred.first:
                consumer.stores.round_and_store(m * traits.subtiles + n, accumulator, n, row, tile.column)
            else:
                round_subtile(accumulator, n, consumer.deferred.values[n - consumer.deferred.first])
    consumer.deferred.defer(tile.row + consumer.row, tile.column)


def _scale(traits: _Traits, operands: Operands, block: _Block, consumer: _Consumer, tile: _Coord, m: int) -> None:
    """Multiply MMA tile m by the scales that cover all of K, and add the bias."""
    problem, scale_a, scale_b, bias = traits.problem, operands.scale_a, operands.scale_b, operands.bias
    accumulator, row_scales, scales_s = consumer.accumulators.of_tiles[m], consumer.row_scales[m], block.scales_s
    first_row, block_M, block_N = consumer.row + m * WGMMA_M, traits.config.block_M, traits.config.block_N

    def row_scale_of(i):
        """Rows past the end are not stored: any scale will do for them."""
        if traits.producer_loads_scales:
            return scales_s[first_row + i]
        return scale_a[scale_row(problem.layout_a, T.min(tile.row + first_row + i, traits.M - 1)), 0]

    def finished(value, row_scale, j):
        """Columns past the end are not stored: any scale and bias will do for them."""
        column = T.min(tile.column + j, problem.N - 1) if problem.N % block_N else tile.column + j
        if traits.producer_loads_scales:
            value = value * (row_scale * scales_s[block_M + j])
        elif not traits.blockwise:
            value = value * (row_scale * scale_b[scale_row(problem.layout_b, column), 0])
        return value if bias is None else value + T.cast(bias[column], "float32")

    @T.macro
    def emit():
        if not traits.blockwise:
            for i in T.Parallel(WGMMA_M):
                row_scales[i] = row_scale_of(i)
        # All elements before the first store: the compiler moves no load across a store.
        for i, j in T.Parallel(WGMMA_M, block_N):
            accumulator[i, j] = finished(accumulator[i, j], row_scales[i], j)

    emit()


# --- host ------------------------------------------------------------------------------------------------------------


def scale_type(problem: Problem, layout: BlockScaledLayout, rows, name: str):
    """Return the type of a scale parameter; scales of all of K are contiguous, so that neighbours load as one."""
    if layout.k is not None:
        return problem.scale(layout, rows, name)
    return T.Tensor((1 if layout.rows is None else rows, 1), "float32")


def fits_hopper(problem: Problem) -> bool:
    """Whether TMA and the layouts of the scales allow one of the kernels for Hopper."""
    whole_k = problem.layout_a.k is None and problem.layout_b.k is None
    aligned = problem.K % 16 == 0 and problem.N * T.dtype(problem.out_dtype).bits % 128 == 0  # bytes of rows
    return problem.arch == ARCH and aligned and (whole_k or (problem.layout_a, problem.layout_b) == BLOCKWISE)


def takes(problem: Problem) -> bool:
    """Scales of all of K, or 1x128 beside 128x128, on Hopper; rows of a, b and out of a multiple of 16 bytes."""
    return fits_hopper(problem)


def compile_kernel(problem: Problem, compile: Callable) -> Callable:
    """Return the compiled kernel; sizes of M that share a tile share a kernel."""
    return compile(scaled_matmul, replace(problem, max_M=0), pick_config(problem), pass_configs=PASS_CONFIGS)

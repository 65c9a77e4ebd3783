"""A consumer of the persistent kernel for Hopper: MMAs of its part of a tile, K block by K block, and their promotion."""

import math

from tilelang_ext import language as T
from tilelang_ext.formats import FP8_BLOCK
from tilelang_ext.kernels.scaled_mm.sm90_block import (
    BLOCK_K,
    SCALES_OF_B,
    WGMMA_M,
    Accumulators,
    Block,
    Consumer,
    Coord,
    Traits,
    stage_scales,
    start_walk,
)
from tilelang_ext.kernels.scaled_mm.sm90_store import finish
from tilelang_ext.kernels.sm90.epilogue import SubtileStores, alloc_deferred
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP

_K_BLOCKS_PER_STORE = 2  # of the next tile, from one deferred subtile to the next


@T.macro
def consume(traits, operands, block, accumulators, stores):
    """Multiply and store the consumer's part, tile after tile."""
    traits.roles.begin_consumer()
    step = T.alloc_var("int32", init=0)  # K blocks since the kernel began
    tile_row, tile_column = T.alloc_local((1,), "int32"), T.alloc_local((1,), "int32")
    consumer = _alloc_consumer(traits, accumulators, stores)
    walk = start_walk(traits, block)
    for wave in T.serial(walk.num_segments):
        walk.take(wave)
        block.tiles.tile_coord(walk.tile, tile_row, tile_column)
        if traits.promotes:
            _clear(accumulators.of_tiles)
        whole, rest = _iterations_of(traits, walk)
        for k in T.serial(whole):
            _multiply_k_blocks(traits, block, consumer, wave, tile_column[0] * traits.config.block_N, k, step)
            step = step + traits.unroll
        if rest > 0:
            _multiply_rest(traits, block, consumer, tile_column[0] * traits.config.block_N, step, rest)
            step = step + traits.unroll
        if not traits.promotes:
            T.wait_wgmma(0)
            block.pipeline.release(block.pipeline.stage(step - 1), block.thread % WARP)
            _fence(traits, accumulators.of_tiles)
        coord = Coord(tile_row[0] * traits.config.block_M, tile_column[0] * traits.config.block_N)
        finish(traits, operands, block, consumer, walk, coord)
    consumer.deferred.store_all(block.scheduler.has_tiles)
    stores.drain()


def _alloc_consumer(traits: Traits, accumulators: Accumulators, stores: SubtileStores) -> Consumer:
    sets = traits.scale_sets if traits.blockwise and not traits.config.is_swapped else 1
    row_scales = [[T.alloc_fragment((WGMMA_M,), "float32") for _ in range(sets)] for _ in range(traits.mma_tiles)]
    column_scales = T.alloc_fragment((traits.mma_N,), "float32") if traits.blockwise and traits.config.is_swapped else None
    count = 0 if traits.config.is_swapped else traits.subtiles
    deferred = alloc_deferred(stores, count, traits.config.deferred, _K_BLOCKS_PER_STORE)
    row = stores.warpgroup * traits.mma_tiles * WGMMA_M
    return Consumer(row, accumulators, row_scales, column_scales, stores, deferred)


def _clear(fragments: list) -> None:
    for fragment in fragments:
        T.evaluate(T.clear(fragment))


def _fence(traits: Traits, accumulators: list) -> None:
    for accumulator in accumulators:
        T.warpgroup_fence_operand(accumulator, num_regs=WGMMA_M * traits.mma_N // WARPGROUP)


def _iterations_of(traits: Traits, walk) -> tuple:
    """Return the whole iterations of a tile, or of a part of one, and the K blocks behind them."""
    if traits.tail:
        return traits.iterations, traits.tail
    if not traits.has_empty_steps:
        return walk.last - walk.first, 0
    last = T.min(walk.last * traits.unroll, traits.k_blocks)
    whole = T.truncdiv(last, traits.unroll)
    return whole - walk.first, last - whole * traits.unroll


def _multiply_k_blocks(traits: Traits, block: Block, consumer: Consumer, wave, column, k, step) -> None:
    """Multiply the K blocks of iteration k, for the tile that begins at a column."""
    for n in range(traits.unroll):
        if not traits.promotes:
            _multiply(traits, block, consumer, k, step + n)
            consumer.deferred.store_due(k, wave > 0)
        else:
            _multiply_and_promote(traits, block, consumer, column, step + n, n)


def _multiply_rest(traits: Traits, block: Block, consumer: Consumer, column, step, rest) -> None:
    """Multiply the `rest` of the K blocks, behind the main loop, and pass on the stages that they leave of an iteration.

    One K block's code for all of them: with code for each, ptxas keeps too much of them at once and spills accumulators.
    """

    @T.macro
    def multiply():
        for n in T.serial(rest):
            _multiply_and_promote(traits, block, consumer, column, step + n, n)

    @T.macro
    def pass_on():
        for n in T.serial(traits.unroll - rest):
            _pass_on(traits, block, step + rest + n)

    multiply()
    if traits.tail:
        for n in range(traits.tail, traits.unroll):
            _pass_on(traits, block, step + n)
    else:
        pass_on()


def _pass_on(traits: Traits, block: Block, step) -> None:
    """Release a stage into which nothing was loaded.

    No MMA makes the lanes of a warp meet here: one that still waits would miss the phase once the others' release has let the
    producer fill the stage again.
    """
    pipeline = block.pipeline
    pipeline.wait(pipeline.stage(step), pipeline.full_phase(step))
    T.evaluate(T.sync_warp())
    pipeline.release(pipeline.stage(step), block.thread % WARP)


def _mma(traits: Traits, block: Block, accumulator, stage, row: int, clear, k: slice = slice(0, BLOCK_K)):
    """Issue the MMA of 64 rows of a stage, from `row` on, with all columns of the tile; the other way about if swapped."""
    rows_s, columns_s = (block.B_s, block.A_s) if traits.config.is_swapped else (block.A_s, block.B_s)
    rows, columns = rows_s[stage, row : row + WGMMA_M, k], columns_s[stage, :, k]
    return T.wgmma_gemm(rows, columns, accumulator, transpose_B=True, policy=T.GemmWarpPolicy.FullRow, clear_accum=clear)


def _multiply(traits: Traits, block: Block, consumer: Consumer, k, step) -> None:
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


def _multiply_and_promote(traits: Traits, block: Block, consumer: Consumer, column, step, n) -> None:
    """Add the MMAs of a K block, the n-th of an iteration, to the accumulators in registers, one MMA tile after the other."""
    pipeline = block.pipeline
    # An iteration of all stages begins with the first one, so that all its K blocks have one phase.
    has_all = traits.unroll == traits.config.num_stages
    stage = n if has_all else pipeline.stage(step)
    pipeline.wait(stage, pipeline.full_phase(step - n if has_all else step))
    if traits.blockwise:
        _read_scales(traits, block, consumer, stage)
    for m in range(traits.mma_tiles):
        for k in range(0, BLOCK_K, traits.mma_K):
            _promote(traits, block, consumer, column, stage, m, k)


def _read_scales(traits: Traits, block: Block, consumer: Consumer, stage) -> None:
    """Load the scales of a stage: of the MMAs' rows, or of swapped operands of their columns."""
    if traits.config.is_swapped:
        _read(traits, block, stage, consumer.row // FP8_BLOCK, 0, consumer.column_scales, traits.mma_N // 4)
        return
    for m, of_tile in enumerate(consumer.row_scales):
        for s, row_scales in enumerate(of_tile):
            _read(traits, block, stage, s, consumer.row + m * WGMMA_M, row_scales, 2)


def _read(traits: Traits, block: Block, stage, block_of_b: int, first: int, scales_f, num_regs: int) -> None:
    (count,), scales_s = map(int, scales_f.shape), block.scales_s
    of_b = stage_scales(traits.config.block_M) - SCALES_OF_B + block_of_b

    def scale(i):
        if traits.copies_scales:
            return scales_s[stage, first + i] * scales_s[stage, of_b]
        return scales_s[stage, block_of_b, first + i]

    @T.macro
    def emit():
        for i in T.Parallel(count):
            scales_f[i] = scale(i)
        # The compiler would otherwise load them between the MMAs, which stall then.
        T.warpgroup_fence_operand(scales_f, num_regs=num_regs)

    emit()


def _promote(traits: Traits, block: Block, consumer: Consumer, column, stage, m: int, k: int) -> None:
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

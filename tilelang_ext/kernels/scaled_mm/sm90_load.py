"""The producer of the persistent kernel for Hopper: TMA loads of A and B, and their scales."""

from tilelang_ext import language as T
from tilelang_ext.formats import FP8_BLOCK
from tilelang_ext.kernels.scaled_mm.sm90_block import (
    BLOCK_K,
    SCALES_OF_B,
    Block,
    Coord,
    Operands,
    Traits,
    scale_row,
    stage_scales,
    start_walk,
)
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, warpgroup_sync


@T.macro
def produce(traits, operands, block):
    """Keep the pipeline filled, tile after tile.

    Where loads are the limit and stages have blockwise scales, one warp loads A and B and another one copies the scales: a load
    by TMA after other loads of the warp has a fence before it, behind which the warp waits for those.
    """
    traits.roles.begin_producer()
    if not traits.copies_scales:
        _produce(traits, operands, block)
    elif block.thread < WARP:
        _fill_stages(traits, operands, block, _load)
    elif block.thread < 2 * WARP:
        _fill_stages(traits, operands, block, _copy_scales)


@T.macro
def _produce(traits, operands, block):
    step = T.alloc_var("int32", init=0)  # K blocks since the kernel began
    tile_row, tile_column = T.alloc_local((1,), "int32"), T.alloc_local((1,), "int32")
    scales = _alloc_producer_scales(traits)
    walk = start_walk(traits, block)
    for wave in T.serial(walk.num_segments):
        walk.take(wave)
        block.tiles.tile_coord(walk.tile, tile_row, tile_column)
        row, column = tile_row[0] * traits.config.block_M, tile_column[0] * traits.config.block_N
        _prefetch_first(traits, operands, block, scales, Coord(row, column), walk.first * traits.unroll)
        for k in T.serial(walk.last - walk.first):
            _load_k_blocks(traits, operands, block, scales, Coord(row, column), (walk.first + k) * traits.unroll, step)
            step = step + traits.unroll
        if traits.tail:
            last = traits.k_blocks - traits.tail
            _load_k_blocks(traits, operands, block, scales, Coord(row, column), last, step, traits.tail)
            step = step + traits.unroll


def _alloc_producer_scales(traits: Traits) -> list:
    """Allocate what a thread has loaded of the scales, for each K block of an iteration: of rows of A, then of B."""
    of_b = traits.scale_sets if traits.blockwise else traits.producer_columns
    return [T.alloc_local((traits.producer_rows + of_b,), "float32") for _ in range(traits.unroll)]


def _prefetch_first(traits: Traits, operands: Operands, block: Block, scales: list, tile: Coord, k) -> None:
    """Load the row scales of a tile's first iteration, from K block k on."""
    for n in range(traits.unroll):
        _prefetch_scales(traits, operands, block, scales[n], tile, k + n)


def _load_k_blocks(traits: Traits, operands: Operands, block: Block, scales: list, tile: Coord, k, step, tail=0) -> None:
    """Load the K blocks of one iteration, from K block k on: all of them, or of the last one `tail`."""
    for n in range(traits.unroll):
        _load_k_block(traits, operands, block, scales, tile, k, step, n, tail)


def _load_k_block(traits: Traits, operands: Operands, block: Block, scales: list, tile: Coord, k, step, n: int, tail: int):
    """Fill the stage of K block k + n."""
    pipeline, k, step = block.pipeline, k + n, step + n
    stage = pipeline.stage(step)

    def load() -> None:
        _load(traits, operands, block, tile, stage, k)

    @T.macro
    def load_if_any():
        if k < traits.k_blocks:
            load()

    pipeline.acquire(stage, pipeline.empty_phase(step))
    if n == 1 and traits.producer_loads_scales:
        warpgroup_sync(traits.config.num_consumers)
    if traits.has_empty_steps and not traits.tail:
        load_if_any()
    elif not tail or n < tail:
        load()
    if traits.blockwise:
        _store_row_scales(traits, block, scales[n], stage)
    if traits.producer_loads_scales and n == 0:
        _load_tile_scales(traits, operands, block, scales[0], tile, k)
    _commit(traits, block, stage)
    _prefetch_scales(traits, operands, block, scales[n], tile, k + traits.unroll)


def _commit(traits: Traits, block: Block, stage) -> None:
    """Commit a stage, which the scales that the threads of a warp have written belong to."""
    if traits.blockwise:
        block.pipeline.commit_warp(stage, block.thread % WARP)
    else:
        block.pipeline.commit(stage)


def _prefetch_scales(traits: Traits, operands: Operands, block: Block, scales, tile: Coord, k) -> None:
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


def _store_row_scales(traits: Traits, block: Block, scales, stage) -> None:
    """Write the row scales of a stage: a's scale times each of b's."""
    scales_s, thread, rows, block_M = block.scales_s, block.thread, traits.producer_rows, traits.config.block_M

    @T.macro
    def emit():
        for r in T.unroll(rows):
            if block_M % WARPGROUP == 0 or r * WARPGROUP + thread < block_M:
                for s in T.unroll(traits.scale_sets):
                    scales_s[stage, s, r * WARPGROUP + thread] = scales[r] * scales[rows + s]

    emit()


@T.macro
def _fill_stages(traits, operands, block, fill):
    """Have one warp fill its part of every stage, K block by K block."""
    step = T.alloc_var("int32", init=0)  # K blocks since the kernel began
    tile_row, tile_column = T.alloc_local((1,), "int32"), T.alloc_local((1,), "int32")
    walk = start_walk(traits, block)
    for wave in T.serial(walk.num_segments):
        walk.take(wave)
        block.tiles.tile_coord(walk.tile, tile_row, tile_column)
        tile = Coord(tile_row[0] * traits.config.block_M, tile_column[0] * traits.config.block_N)
        # One K block's code: of several beside each other, the compiler would keep the addresses of all scales.
        for k in T.unroll((walk.last - walk.first) * traits.unroll, unroll_factor=1):
            _fill_stage(traits, operands, block, tile, walk.first * traits.unroll + k, step, fill)
            step = step + 1


def _fill_stage(traits: Traits, operands: Operands, block: Block, tile: Coord, k, step, fill) -> None:
    """Fill the warp's part of the stage of K block k, and commit it; behind the last K block the stage stays empty."""
    pipeline = block.pipeline
    stage = pipeline.stage(step)

    @T.macro
    def fill_if_any():
        if k < traits.k_blocks:
            fill(traits, operands, block, tile, stage, k)

    pipeline.acquire(stage, pipeline.empty_phase(step))
    fill_if_any()
    pipeline.commit_copies(stage) if fill is _copy_scales else pipeline.commit_once(stage)


def _load(traits: Traits, operands: Operands, block: Block, tile: Coord, stage, k) -> None:
    """Issue the TMA loads of a stage."""
    a, b, A_s, B_s, full = operands.a, operands.b, block.A_s, block.B_s, block.pipeline.full
    rows, columns = slice(tile.row, tile.row + traits.config.block_M), slice(tile.column, tile.column + traits.config.block_N)

    @T.macro
    def emit():
        T.tma_copy(a[rows, k * BLOCK_K : (k + 1) * BLOCK_K], A_s[stage, :, :], barrier=full[stage])
        T.tma_copy(b[columns, k * BLOCK_K : (k + 1) * BLOCK_K], B_s[stage, :, :], barrier=full[stage])

    emit()


def _copy_scales(traits: Traits, operands: Operands, block: Block, tile: Coord, stage, k) -> None:
    """Issue the copies of a stage's blockwise scales: a lane those of some rows of A, and the first lanes B's."""
    scale_a, scale_b, scales_s, lane = operands.scale_a, operands.scale_b, block.scales_s, block.thread - WARP
    block_M, first_b, last = traits.config.block_M, tile.column // FP8_BLOCK, T.ceildiv(traits.N, FP8_BLOCK) - 1

    def copy(to: int, source):
        return T.ptx_cp_async(T.access_ptr(scales_s[stage, to + lane], "w", 1), T.access_ptr(source, "r", 1), 1)

    @T.macro
    def emit():
        for r in T.unroll(-(-block_M // WARP)):
            if block_M % WARP == 0 or r * WARP + lane < block_M:
                T.evaluate(copy(r * WARP, scale_a[T.min(tile.row + r * WARP + lane, traits.M - 1), k]))
        if lane < traits.scale_sets:
            T.evaluate(copy(stage_scales(block_M) - SCALES_OF_B, scale_b[T.min(first_b + lane, last), k]))

    emit()


def _load_tile_scales(traits: Traits, operands: Operands, block: Block, scales, tile: Coord, k) -> None:
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
        warpgroup_sync(traits.config.num_consumers)
        if k == traits.config.num_stages:
            for r in T.unroll(rows):
                if block_M % WARPGROUP == 0 or r * WARPGROUP + thread < block_M:
                    scales_s[r * WARPGROUP + thread] = scales[r]
            for c in T.unroll(columns):
                if block_N % WARPGROUP == 0 or c * WARPGROUP + thread < block_N:
                    scales_s[block_M + c * WARPGROUP + thread] = scales[rows + c]

    emit()

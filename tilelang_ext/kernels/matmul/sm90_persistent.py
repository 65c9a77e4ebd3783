"""Matmul on Hopper: a warp-specialized persistent kernel, with K split over its units of work where tiles are few.

out[i, j] = activation(row_scale[i] * column_scale[j] * (a[i] . b[:, j]) + bias[j]) + residual[i, j]

Warp roles, one block per SM:

| warpgroup | role | registers |
| --- | --- | --- |
| 0 | producer: TMA loads of A and B | 40 |
| 1, and 2 if there are two | consumers: each has a part of the tile's rows, its MMAs and its epilogue | 232 |

Pipelines, producer role -> consumer role:

| pipeline | carries | full | empty |
| --- | --- | --- | --- |
| producer -> all consumers | A and B of a K block of 64 | one thread, the bytes | 4 warps of each consumer |
| consumer -> its TMA stores | subtiles of the result, two buffers per consumer | a named barrier of 128 threads | one thread |

Steady state:

    producer   acquire | TMA A, TMA B | commit ; on to the next unit
    consumers  wait | issue the MMAs of K block k | those of k - 1 are complete: release | a deferred subtile of the unit before
               after the last K block: the epilogue, round | store most subtiles, defer the others

A unit is a tile and one of `splits` ranges of K. With one range a unit ends with the epilogue. With more, it writes its float32
accumulators to `partial` (splits, M, N), and `sum_splits` adds them and does the epilogue: that kernel starts while the
last units run (PDL). Or, where config.adds, the block that has a tile's last range waits for the accumulators of the others
(`SplitTiles`), adds them and finishes the tile. Either way the order of additions is always the same.

An MMA has 64 rows and any multiple of 8 columns. With `is_swapped`, columns of out are its rows and rows of out its columns, so
that few rows, or such as fill no multiple of 64, take no more time than they need: the kernel then multiplies b^T by a^T, and
subtiles are stored transposed.

Sizes are no constants of the kernel: a new M, N or K compiles nothing. Takes rows in memory of multiples of 16 bytes.
Floors on an H200: 2 M N K / 9.9e14 s, and the bytes of a, b and out at 4.25e12 bytes/s (docs/log/matmul.md).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tilelang.layout import make_full_bank_swizzled_layout, make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.epilogue import finish
from tilelang_ext.kernels.matmul.problem import TMA_ALIGNMENT, Epilogue, Operands, Problem
from tilelang_ext.kernels.matmul.sm90_config import BLOCK_K, Config, is_turned, pick_config, rows_of_choice
from tilelang_ext.kernels.matmul.sum_splits import before_sum
from tilelang_ext.kernels.matmul.turn import after_turn
from tilelang_ext.kernels.sm90 import pdl, split_tiles
from tilelang_ext.kernels.sm90.epilogue import (
    DeferredSubtiles,
    SubtileStores,
    accumulator_layout,
    alloc_deferred,
    alloc_stores,
    round_subtile,
)
from tilelang_ext.kernels.sm90.multicast import multicast
from tilelang_ext.kernels.sm90.pipeline import Pipeline, alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, Roles, dispatch
from tilelang_ext.kernels.sm90.scheduler import GroupedTiles, PersistentScheduler
from tilelang_ext.kernels.sm90.split_tiles import SplitTiles

ARCH = "sm_90a"
WGMMA_M = 64  # rows of one MMA of a warpgroup
# TMA clips what lies past the end of a matrix, and all other indices are clamped here. Every barrier is explicit: upstream's
# search for places that lack one is up to half of the time that a kernel takes to lower.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}

_K_BLOCKS_PER_STORE = 2  # of the next unit, from one deferred subtile to the next


# --- what a kernel is made of ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Traits:
    """The host's constants of one kernel, and the sizes; those of the transposed product where operands are swapped."""

    problem: Problem
    config: Config
    M: Any
    N: Any
    K: Any
    splits: Any  # 1, or the extent of `partial`

    @property
    def roles(self) -> Roles:
        return Roles(self.config.num_consumers)

    @property
    def is_split(self) -> bool:
        return self.config.is_split

    @property
    def leaves_sum(self) -> bool:
        """Whether accumulators go to `partial`, which another kernel sums."""
        return self.is_split and not self.config.adds

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
        return {"cluster_dims": (self.config.cluster, 1, 1)} if self.config.cluster > 1 else {}

    @property
    def shape_b(self) -> tuple:
        """Shape of `B_s`."""
        block_N = self.config.block_N
        return (self.config.num_stages, *((block_N, BLOCK_K) if self.problem.b_is_k_major else (BLOCK_K, block_N)))


@dataclass(frozen=True, eq=False)
class _Block:
    """What the roles of a block share."""

    A_s: Any  # _Traits.shape_a
    B_s: Any  # _Traits.shape_b
    pipeline: Pipeline
    tiles: GroupedTiles
    scheduler: PersistentScheduler
    rank: Any  # of the block in its cluster
    thread: Any


@dataclass(frozen=True, eq=False)
class _Consumer:
    """What one consumer warpgroup has of its own."""

    row: int  # its first row of the tile
    accumulators: list  # of each MMA tile, (WGMMA_M, block_N), float32
    stores: SubtileStores | None  # None where accumulators go to `partial`
    deferred: DeferredSubtiles | None


@dataclass(frozen=True, eq=False)
class _Unit:
    """Row and column of the result at which a tile begins, and the K blocks of a unit of it; int32 (1,) each."""

    tile_row: Any  # in tiles
    tile_column: Any
    split: Any
    first_k: Any
    num_k: Any
    tile: Any  # its number


def matmul(problem: Problem, config: Config):
    """The prim_func (a, b, row_scale, column_scale, bias, residual, out)."""
    M, N, K = _sizes(problem)
    traits = _traits(problem, config, M, N, K, 1)
    types = problem.types(M, N, K)
    a_type, b_type, row_scale_type, column_scale_type, bias_type, residual_type, out_type = types

    @T.prim_func
    def matmul(
        a: a_type,
        b: b_type,
        row_scale: row_scale_type,
        column_scale: column_scale_type,
        bias: bias_type,
        residual: residual_type,
        out: out_type,
    ):
        _matmul(traits, _in_order(config, Operands(a, b, row_scale, column_scale, bias, residual, out)))

    return matmul


def partial_matmul(problem: Problem, config: Config):
    """The prim_func (a, b, partial): accumulators of each range of K, float32 (splits, M, N)."""
    M, N, K = _sizes(problem)
    splits = T.dynamic("splits")
    traits = _traits(problem, config, M, N, K, splits)
    a_type, b_type, *_ = problem.types(M, N, K)

    @T.prim_func
    def partial_matmul(a: a_type, b: b_type, partial: T.Tensor((splits, M, N), "float32")):
        _matmul(traits, _in_order(config, Operands(a, b, None, None, None, None, partial)))

    return partial_matmul


def added_matmul(problem: Problem, config: Config):
    """The prim_func (a, b, row_scale, column_scale, bias, residual, partial, given, out): one block adds those of each tile.

    partial (splits, tiles, elements of a tile), float32, and given (splits, tiles, consumers), int64: see `SplitTiles`.
    """
    M, N, K = _sizes(problem)
    splits, tiles = T.dynamic("splits"), T.dynamic("tiles")
    traits = _traits(problem, config, M, N, K, splits)
    types = problem.types(M, N, K)
    a_type, b_type, row_scale_type, column_scale_type, bias_type, residual_type, out_type = types

    @T.prim_func
    def added_matmul(
        a: a_type,
        b: b_type,
        row_scale: row_scale_type,
        column_scale: column_scale_type,
        bias: bias_type,
        residual: residual_type,
        partial: T.Tensor((splits, tiles, config.block_M * config.block_N), "float32"),
        given: T.Tensor((splits, tiles, config.num_consumers), "int64"),
        out: out_type,
    ):
        operands = Operands(a, b, row_scale, column_scale, bias, residual, out, SplitTiles(partial, given))
        _matmul(traits, _in_order(config, operands))

    return added_matmul


def _sizes(problem: Problem) -> tuple:
    """Return symbols of M, N and K: what is contiguous in memory is known to be a multiple of 16 bytes."""
    M = T.dynamic("M") if problem.a_is_k_major else T.dynamic("M_in_8") * TMA_ALIGNMENT
    has_k_rows = problem.a_is_k_major or problem.b_is_k_major
    return M, T.dynamic("N_in_8") * TMA_ALIGNMENT, T.dynamic("K_in_8") * TMA_ALIGNMENT if has_k_rows else T.dynamic("K")


def _traits(problem: Problem, config: Config, M, N, K, splits) -> _Traits:
    if config.is_swapped:
        return _Traits(problem.swapped(), config, N, M, K, splits)
    return _Traits(problem, config, M, N, K, splits)


def _in_order(config: Config, operands: Operands) -> Operands:
    """Return the operands with that first whose rows are rows of the MMAs."""
    return replace(operands, a=operands.b, b=operands.a) if config.is_swapped else operands


# --- block: shared memory, barriers, scheduler, roles ----------------------------------------------------------------


@T.macro
def _matmul(traits, operands):
    cluster = traits.config.cluster
    with T.Kernel(traits.config.num_blocks, threads=traits.roles.threads, **traits.cluster_dims) as block:
        if traits.config.adds:
            split_tiles.declare()
        A_s = T.alloc_shared(traits.shape_a, traits.problem.dtype)
        B_s = T.alloc_shared(traits.shape_b, traits.problem.dtype)
        stores = _alloc_stores(traits, operands)
        accumulators = _alloc_accumulators(traits)
        _swizzle(A_s, B_s, stores)
        pipeline = alloc_pipeline(traits.config.num_stages, 1, traits.roles.consumer_warps, cluster)
        # The blocks of a cluster have tiles below each other.
        tile_rows = T.ceildiv(traits.M, traits.config.block_M * cluster)
        tile_columns = T.ceildiv(traits.N, traits.config.block_N)
        tiles = GroupedTiles(traits.config.group_rows // cluster, tile_columns, tile_rows)
        clusters = traits.config.num_blocks // cluster
        scheduler = PersistentScheduler(clusters, block // cluster, tiles.num_tiles * traits.splits)
        thread = T.get_thread_binding()
        pdl.trigger()
        pdl.wait()
        _dispatch_roles(
            traits, operands, _Block(A_s, B_s, pipeline, tiles, scheduler, block % cluster, thread), accumulators, stores
        )
        if cluster > 1:
            T.cluster_sync()  # no block may end while the other one still arrives at its barriers


def _alloc_stores(traits: _Traits, operands: Operands) -> list:
    if traits.leaves_sum:
        return [None] * traits.config.num_consumers
    rows, columns = WGMMA_M, traits.config.subtile_N
    if traits.config.is_swapped:
        rows, columns = columns, rows
    return alloc_stores(operands.out, traits.config.num_consumers, rows, columns)


def _alloc_accumulators(traits: _Traits) -> list[list]:
    def alloc():
        return T.alloc_fragment((WGMMA_M, traits.config.block_N), "float32")

    return [[alloc() for _ in range(traits.mma_tiles)] for _ in range(traits.config.num_consumers)]


def _swizzle(A_s, B_s, stores: list) -> None:
    """Lay shared buffers out as TMA and WGMMA take them, without bank conflicts."""
    buffers = [buffer for of_consumer in stores if of_consumer for buffer in of_consumer.buffers]
    operands = {buffer: make_full_bank_swizzled_layout(buffer) for buffer in (A_s, B_s)}
    T.annotate_layout({**operands, **{buffer: make_swizzled_layout(buffer) for buffer in buffers}})


def _dispatch_roles(traits: _Traits, operands: Operands, block: _Block, accumulators: list, stores: list) -> None:
    consumers = [
        (WARPGROUP, functools.partial(_consume, traits, operands, block, number, *of_consumer))
        for number, of_consumer in enumerate(zip(accumulators, stores, strict=True))
    ]
    dispatch(block.thread, (WARPGROUP, functools.partial(_produce, traits, operands, block)), *consumers)


def _alloc_unit() -> _Unit:
    return _Unit(*(T.alloc_local((1,), "int32") for _ in range(6)))


@T.macro
def _find_unit(traits, block, wave, unit):
    """Write where the unit of a wave lies."""
    number = block.scheduler.tile(wave)
    all_k_blocks = T.ceildiv(traits.K, BLOCK_K)
    if traits.is_split:
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


def _row_of(traits: _Traits, block: _Block, unit: _Unit):
    """Return the first row of this block's tile."""
    cluster, block_M = traits.config.cluster, traits.config.block_M
    return unit.tile_row[0] * block_M if cluster == 1 else (unit.tile_row[0] * cluster + block.rank) * block_M


# --- producer --------------------------------------------------------------------------------------------------------


@T.macro
def _produce(traits, operands, block):
    """Keep the pipeline filled, unit after unit."""
    traits.roles.begin_producer()
    step = T.alloc_var("int32", init=0)  # K blocks since the kernel began
    unit = _alloc_unit()
    # One warp: nobody waits for the others, and a thread that is late by all stages would miss a phase and wait for ever.
    if block.thread < WARP:
        for wave in T.serial(block.scheduler.num_waves):
            _find_unit(traits, block, wave, unit)
            row, column = _row_of(traits, block, unit), unit.tile_column[0] * traits.config.block_N
            for k in T.serial(unit.num_k[0]):
                _load_k_block(traits, operands, block, row, column, (unit.first_k[0] + k) * BLOCK_K, step)
                step = step + 1


def _load_k_block(traits: _Traits, operands: Operands, block: _Block, row, column, k, step) -> None:
    """Fill the stage of a step with the K block that begins at k."""
    pipeline, a, b, A_s, B_s = block.pipeline, operands.a, operands.b, block.A_s, block.B_s
    stage, a_rows = pipeline.stage(step), traits.config.a_rows
    ks, columns = slice(k, k + BLOCK_K), slice(column, column + traits.config.block_N)

    @T.macro
    def load_rows(rows, to):
        # The last block of a cluster may have no row, and TMA takes long to fill rows past the end with zeros.
        if traits.config.cluster == 1 or row < traits.M:
            T.tma_copy(rows, to, barrier=pipeline.full[stage])

    def load_a():
        if traits.problem.a_is_k_major:
            to = A_s[stage * a_rows : (stage + 1) * a_rows, :] if traits.is_thin else A_s[stage, :, :]
            load_rows(a[row : row + a_rows, ks], to)
            return
        for m in range(a_rows // WGMMA_M):
            rows = slice(row + m * WGMMA_M, row + (m + 1) * WGMMA_M)
            T.evaluate(T.tma_copy(a[ks, rows], A_s[stage, m, :, :], barrier=pipeline.full[stage]))

    def load_b():
        if traits.config.cluster > 1:
            multicast(b, B_s, stage, pipeline.full[stage], (k, column), traits.problem.b_is_k_major, block.rank)
            return
        from_b = b[columns, ks] if traits.problem.b_is_k_major else b[ks, columns]
        T.evaluate(T.tma_copy(from_b, B_s[stage, :, :], barrier=pipeline.full[stage]))

    pipeline.acquire(stage, pipeline.empty_phase(step))
    T.evaluate(T.sync_warp())
    load_a()
    load_b()
    pipeline.commit_once(stage)


# --- consumers -------------------------------------------------------------------------------------------------------


@T.macro
def _consume(traits, operands, block, number, accumulators, stores):
    """Multiply and store the consumer's rows, unit after unit."""
    traits.roles.begin_consumer()
    step = T.alloc_var("int32", init=0)  # K blocks since the kernel began
    unit = _alloc_unit()
    consumer = _alloc_consumer(traits, number, accumulators, stores)
    for wave in T.serial(block.scheduler.num_waves):
        _find_unit(traits, block, wave, unit)
        for k in T.serial(unit.num_k[0]):
            _multiply(traits, block, consumer, k, step)
            step = step + 1
            _store_due(consumer, k, wave > 0)
        T.wait_wgmma(0)
        block.pipeline.release(block.pipeline.stage(step - 1), block.thread % WARP)
        _fence(traits, accumulators)
        _finish_unit(traits, operands, block, consumer, unit)
    _store_rest(consumer, block)


def _alloc_consumer(traits: _Traits, number, accumulators: list, stores: SubtileStores | None) -> _Consumer:
    deferred = None
    if stores is not None:
        deferred = alloc_deferred(stores, traits.subtiles, traits.config.deferred, _K_BLOCKS_PER_STORE)
    return _Consumer(number * traits.mma_tiles * WGMMA_M, accumulators, stores, deferred)


def _multiply(traits: _Traits, block: _Block, consumer: _Consumer, k, step) -> None:
    """Issue the MMAs of a K block, which add to the accumulators; then wait for those before and release their stage."""
    pipeline, problem, lane = block.pipeline, traits.problem, block.thread % WARP
    stage, mma_tiles = pipeline.stage(step), traits.mma_tiles

    def mma(m: int):
        row = consumer.row + m * WGMMA_M
        return T.wgmma_gemm(
            _rows_of_stage(traits, block.A_s, stage, row),
            block.B_s[stage, :, :],
            consumer.accumulators[m],
            transpose_A=not problem.a_is_k_major,
            transpose_B=problem.b_is_k_major,
            policy=T.GemmWarpPolicy.FullRow,
            clear_accum=k == 0,
        )

    @T.macro
    def release_previous():
        if k > 0:
            T.wait_wgmma(mma_tiles)
            pipeline.release(pipeline.stage(step - 1), lane)

    pipeline.wait(stage, pipeline.full_phase(step))
    for m in range(mma_tiles):
        T.evaluate(mma(m))
    release_previous()


def _rows_of_stage(traits: _Traits, A_s, stage, row: int):
    """Return the operand of an MMA: 64 rows of the tile. Below the last one of a thin stage lies what the MMA discards."""
    if not traits.problem.a_is_k_major:
        return A_s[stage, row // WGMMA_M, :, :]
    if traits.is_thin:
        return A_s[stage * traits.config.a_rows : stage * traits.config.a_rows + WGMMA_M, :]
    return A_s[stage, row : row + WGMMA_M, :]


def _fence(traits: _Traits, accumulators: list) -> None:
    for accumulator in accumulators:
        T.warpgroup_fence_operand(accumulator, num_regs=WGMMA_M * traits.config.block_N // WARPGROUP)


# --- epilogue of a consumer ------------------------------------------------------------------------------------------


def _store_due(consumer: _Consumer, k, any_deferred) -> None:
    if consumer.deferred is not None:
        consumer.deferred.store_due(k, any_deferred)


def _store_rest(consumer: _Consumer, block: _Block) -> None:
    """After the last unit, store what is deferred, and wait until shared memory has been read."""
    if consumer.stores is not None:
        consumer.deferred.store_all(block.scheduler.has_tiles)
        consumer.stores.drain()


def _finish_unit(traits: _Traits, operands: Operands, block: _Block, consumer: _Consumer, unit: _Unit) -> None:
    """Store a unit; where one block adds those of a tile, give the accumulators to it, or add those of the others first."""
    row, column = _row_of(traits, block, unit), unit.tile_column[0] * traits.config.block_N
    # The blocks of a cluster have a tile each of the number.
    tile = unit.tile[0] * traits.config.cluster + block.rank
    place = consumer.row // (traits.mma_tiles * WGMMA_M), consumer.row, consumer.accumulators, block.thread

    @T.macro
    def emit():
        # The last range of K is that of the blocks of highest index, and no block has more units than one.
        if unit.split[0] < traits.splits - 1:
            operands.split.give((unit.split[0], tile), *place)
        else:
            for split in T.serial(traits.splits - 1):
                operands.split.add((split, tile), *place)
            _store_unit(traits, operands, consumer, 0, row, column)

    emit() if traits.config.adds else _store_unit(traits, operands, consumer, unit.split[0], row, column)


def _store_unit(traits: _Traits, operands: Operands, consumer: _Consumer, split, row, column) -> None:
    """Finish the consumer's rows of a unit that begins at (row, column)."""
    for m in range(traits.mma_tiles):
        first_row = row + consumer.row + m * WGMMA_M
        if traits.leaves_sum:
            _store_partial(traits, operands.out, consumer.accumulators[m], split, first_row, column)
            continue
        epilogue, is_swapped = traits.problem.epilogue, traits.config.is_swapped
        if epilogue != Epilogue():
            finish(epilogue, operands, (traits.M, traits.N), consumer.accumulators[m], first_row, column, is_swapped)
        for n in range(traits.subtiles):
            number = m * traits.subtiles + n
            if is_swapped:
                consumer.stores.round_and_store_transposed(number, consumer.accumulators[m], n, column, first_row)
            elif m < traits.mma_tiles - 1 or n < consumer.deferred.first:
                consumer.stores.round_and_store(number, consumer.accumulators[m], n, first_row, column)
            else:
                round_subtile(consumer.accumulators[m], n, consumer.deferred.values[n - consumer.deferred.first])
    if not traits.leaves_sum:
        consumer.deferred.defer(row + consumer.row + (traits.mma_tiles - 1) * WGMMA_M, column)


def _store_partial(traits: _Traits, partial, accumulator, split, row, column) -> None:
    """Write the accumulator of an MMA tile, two neighbours of a thread at once, or of swapped operands columns of eight."""
    M, N, block_N, is_swapped = traits.M, traits.N, traits.config.block_N, traits.config.is_swapped

    @T.macro
    def emit():
        for i, j in T.Parallel(WGMMA_M, block_N, loop_layout=accumulator_layout(WGMMA_M, block_N)):
            if row + i < M and column + j < N:
                if is_swapped:
                    partial[split, column + j, row + i] = accumulator[i, j]
                else:
                    partial[split, row + i, column + j] = accumulator[i, j]

    emit()


# --- host ------------------------------------------------------------------------------------------------------------


def takes(problem: Problem) -> bool:
    """Hopper, where rows in memory of a, b and out are multiples of 16 bytes."""
    return problem.arch == ARCH and problem.is_aligned


def sizes_served(problem: Problem) -> tuple[int, int]:
    """Return the fewest and the most rows that have the kernels of the problem."""
    return rows_of_choice(problem)


def compile_kernel(problem: Problem, device) -> Callable:
    """Return a function of tensors that launches the kernel, a transpose ahead of it, and the sum over splits behind it."""
    if is_turned(problem):
        multiply = _compile_product(replace(problem, a_is_k_major=True), device)
        return after_turn(problem, device, multiply, PASS_CONFIGS)
    return _compile_product(problem, device)


def _compile_product(problem: Problem, device) -> Callable:
    config, splits = pick_config(problem)
    general = problem.without_sizes("M", "N", "K")
    if splits == 1:
        return device.compile(matmul, general, config, pass_configs=PASS_CONFIGS)
    if config.adds:
        multiply = device.compile(added_matmul, general, config, pass_configs=PASS_CONFIGS)
        return _with_memory(problem, config, splits, device, multiply)
    of_operands = replace(general, out_dtype="float32", epilogue=Epilogue())  # all that this kernel depends on
    multiply = device.compile(partial_matmul, of_operands, config, pass_configs=PASS_CONFIGS)
    return before_sum(general, splits, device, multiply, PASS_CONFIGS)


def _with_memory(problem: Problem, config: Config, splits: int, device, multiply: Callable) -> Callable:
    """Return a function of the problem's tensors that launches `multiply` with the memory of `SplitTiles`."""
    elements = config.block_M * config.block_N

    def run(*tensors):
        *inputs, out = tensors
        M, N = out.shape if not config.is_swapped else reversed(out.shape)
        tiles = _ceildiv(M, config.block_M * config.cluster) * config.cluster * _ceildiv(N, config.block_N)
        partial = device.empty(splits, tiles, elements, dtype="float32")
        multiply(*inputs, partial, device.empty(splits, tiles, config.num_consumers, dtype="int64"), out)

    return run


def _ceildiv(value, divisor: int):
    return -(-value // divisor)

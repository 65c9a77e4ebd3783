"""The epilogue of the persistent kernel for Hopper: results by TMA, accumulators to another block or to `partial`."""

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.epilogue import finish, finished
from tilelang_ext.kernels.matmul.problem import Epilogue, Operands
from tilelang_ext.kernels.matmul.sm90_block import WGMMA_M, Block, Consumer, Traits, Unit, origin_of
from tilelang_ext.kernels.sm90.cluster_sum import GROUP
from tilelang_ext.kernels.sm90.epilogue import (
    accumulator_layout,
    round_subtile,
)
from tilelang_ext.kernels.sm90.roles import WARPGROUP


def store_due(consumer: Consumer, k, any_deferred) -> None:
    if consumer.deferred is not None:
        consumer.deferred.store_due(k, any_deferred)


def store_rest(consumer: Consumer, block: Block) -> None:
    """After the last unit, store what is deferred, and wait until shared memory has been read."""
    if consumer.stores is not None:
        if consumer.deferred.values:
            consumer.deferred.store_all(block.scheduler.has_tiles)
        consumer.stores.drain()


def finish_unit(traits: Traits, operands: Operands, block: Block, consumer: Consumer, unit: Unit) -> None:
    """Store a unit; where one block adds those of a tile, give the accumulators to it, or add those of the others first."""
    row, column = origin_of(traits, block, unit)
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

    @T.macro
    def emit_part():
        if unit.first_k[0] + unit.num_k[0] < block.scheduler.iterations:
            operands.split.give(block.scheduler.number * traits.config.cluster + block.rank, *place)
        else:
            for i in T.serial(block.scheduler.givers(unit.tile[0])):
                operands.split.add((block.scheduler.number - 1 - i) * traits.config.cluster + block.rank, *place)
            _store_unit(traits, operands, consumer, 0, row, column)

    if traits.config.joined > 1:
        _join(traits, operands, block, consumer, row, column)
        return
    if traits.config.streams:
        emit_part()
        return
    emit() if traits.config.adds else _store_unit(traits, operands, consumer, unit.split[0], row, column)


def _join(traits: Traits, operands: Operands, block: Block, consumer: Consumer, row, column) -> None:
    """Sum a part of the tile over the blocks of the cluster, and store it; all consumers of the block call it."""
    config, epilogue, out = traits.config, traits.problem.epilogue, operands.out
    rows, columns = (config.block_N, config.block_M) if config.is_swapped else (config.block_M, config.block_N)
    first_row, first_column = (column, row) if config.is_swapped else (row, column)
    M, N = (traits.N, traits.M) if config.is_swapped else (traits.M, traits.N)
    threads, groups_of_row = traits.roles.consumer_threads, columns // GROUP

    def write():
        for m, accumulator in enumerate(consumer.accumulators):
            block.sums.write(accumulator, consumer.row + m * WGMMA_M, config.is_swapped)

    def value_of(sums, v: int, at_row, at_column):
        inside = T.min(at_row, M - 1), (T.min(at_column + v, N - 1),)
        return T.cast(finished(epilogue, operands, sums[v], *inside), out.dtype)

    @T.macro
    def sum_and_store(number):
        sums = T.alloc_local((GROUP,), "float32")
        values = T.alloc_local((GROUP,), out.dtype)
        at_row = T.alloc_var("int32", T.truncdiv(number, groups_of_row))
        group = T.alloc_var("int32", number - at_row * groups_of_row)
        for v in T.unroll(GROUP):
            sums[v] = 0
        block.sums.add(at_row, group * GROUP, sums)
        column_group = T.alloc_var("int32", T.truncdiv(first_column, GROUP) + group)
        at_row = at_row + first_row
        for v in T.unroll(GROUP):
            values[v] = value_of(sums, v, at_row, column_group * GROUP)
        if traits.stores_by_tma:
            if at_row < M and column_group * GROUP < N:
                for v in T.vectorized(GROUP):
                    out[at_row, column_group * GROUP + v] = values[v]
        else:
            for v in T.unroll(GROUP):
                if at_row < M and column_group * GROUP + v < N:
                    out[at_row, column_group * GROUP + v] = values[v]

    @T.macro
    def emit():
        T.sync_threads(barrier_id=1 + config.num_consumers, arrive_count=threads)  # all consumers have multiplied
        write()
        T.cluster_sync()
        for n in T.serial(-(-rows * groups_of_row // (threads * config.joined))):
            number = (n * config.joined + block.rank) * threads + block.thread - WARPGROUP
            if number < rows * groups_of_row:
                sum_and_store(number)
        T.cluster_sync()

    emit()


def _store_unit(traits: Traits, operands: Operands, consumer: Consumer, split, row, column) -> None:
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


def _store_partial(traits: Traits, partial, accumulator, split, row, column) -> None:
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

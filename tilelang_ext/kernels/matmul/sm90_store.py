"""The epilogue of the persistent kernel for Hopper: results by TMA, accumulators to another block or to `partial`."""

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.epilogue import finish
from tilelang_ext.kernels.matmul.problem import Epilogue, Operands
from tilelang_ext.kernels.matmul.sm90_block import WGMMA_M, Block, Consumer, Traits, Unit, origin_of
from tilelang_ext.kernels.sm90.epilogue import (
    accumulator_layout,
    round_subtile,
)


def store_due(consumer: Consumer, k, any_deferred) -> None:
    if consumer.deferred is not None:
        consumer.deferred.store_due(k, any_deferred)


def store_rest(consumer: Consumer, block: Block) -> None:
    """After the last unit, store what is deferred, and wait until shared memory has been read."""
    if consumer.stores is not None:
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

    emit() if traits.config.adds else _store_unit(traits, operands, consumer, unit.split[0], row, column)


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

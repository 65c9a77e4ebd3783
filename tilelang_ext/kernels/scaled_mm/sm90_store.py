"""The epilogue of the persistent kernel for Hopper: scales of all of K, the bias, and subtiles by TMA."""

from tilelang_ext import language as T
from tilelang_ext.kernels.scaled_mm.sm90_block import WGMMA_M, Block, Consumer, Coord, Operands, Traits, scale_row
from tilelang_ext.kernels.sm90.epilogue import round_subtile


def finish(traits: Traits, operands: Operands, block: Block, consumer: Consumer, walk, tile: Coord) -> None:
    """Store the tile, of whose K blocks other blocks may have multiplied some; or give the accumulators to another block."""
    split, scheduler = operands.split, block.scheduler
    place = consumer.stores.warpgroup, consumer.row, consumer.accumulators.of_tiles, block.thread

    @T.macro
    def emit():
        if walk.is_given:
            split.give(scheduler.block, *place)
        else:
            if walk.first > 0:
                for i in T.serial(walk.givers):
                    split.add(walk.giver(i), *place)
            _store_tile(traits, operands, block, consumer, tile)

    emit() if traits.config.divides_k else _store_tile(traits, operands, block, consumer, tile)


def _store_tile(traits: Traits, operands: Operands, block: Block, consumer: Consumer, tile: Coord) -> None:
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


def _scale(traits: Traits, operands: Operands, block: Block, consumer: Consumer, tile: Coord, m: int) -> None:
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


def _scale_of(traits: Traits, operands: Operands, block: Block, tile: Coord, place, is_row: bool):
    """Return the scale of a row or a column of the tile; past the end of out any scale will do."""
    problem = traits.problem
    if traits.producer_loads_scales:
        return block.scales_s[place if is_row else traits.config.block_M + place]
    if is_row:
        return operands.scale_a[scale_row(problem.layout_a, T.min(tile.row + place, traits.M - 1)), 0]
    return operands.scale_b[scale_row(problem.layout_b, T.min(tile.column + place, traits.N - 1)), 0]

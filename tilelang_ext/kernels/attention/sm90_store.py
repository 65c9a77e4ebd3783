"""The end of a tile in `sm90_forward`: O times its scale, by TMA or by threads, and log-sum-exp; or a part of a tile."""

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import Operands
from tilelang_ext.kernels.attention.sm90_block import Block, Consumer, Traits
from tilelang_ext.kernels.attention.sm90_config import WGMMA_M
from tilelang_ext.kernels.attention.sm90_softmax import store_part, store_rows
from tilelang_ext.kernels.attention.tiles import PANEL, Tile, of_head
from tilelang_ext.kernels.sm90.roles import warpgroup_sync


def finish(traits: Traits, operands: Operands, block: Block, consumer: Consumer, tile: Tile, tiles) -> None:
    """Store the rows of a tile, or of a part of one; `tiles` are those with key blocks up to this one."""
    softmax, groups = consumer.softmax, traits.channels // 8
    stage = block.q_pipeline.stage(tiles - 1)

    @T.macro
    def scale_values():
        for r in T.unroll(2):
            softmax.factor[r] = softmax.factor[r] * of_head(operands.v_scale, tile.kv_head)

    def store():
        store_rows(operands, consumer.O, softmax.factor, tile, softmax.row, 0, softmax.column, groups)

    @T.macro
    def store_either():
        if tile.num_blocks > 0:
            _store_by_tma(traits, operands, block, consumer, tile, stage)
        else:
            store()

    def finish():
        softmax.finish(operands, tile)
        if traits.problem.is_fp8:
            scale_values()
        if traits.stores_by_tma:
            store_either()
        else:
            store()

    @T.macro
    def release_q():
        if tile.num_blocks > 0:
            block.q_pipeline.release(stage, consumer.lane)

    @T.macro
    def finish_either():
        if tile.part >= 0:
            softmax.finish_part(operands, tile)
            if traits.problem.is_fp8:
                scale_values()
            store_part(operands, consumer.O, softmax, tile, groups)
            if traits.keeps_q:
                release_q()
        else:
            finish()

    if traits.divides:
        finish_either()
    else:
        finish()


@T.macro
def _store_by_tma(traits, operands, block, consumer, tile, stage):
    """Round O into shared memory, and issue its TMA store, whose end `end_stores` waits for."""
    place = T.alloc_var("int32", stage if traits.keeps_q else 0)
    row = T.alloc_var("int32", consumer.softmax.row)
    for r in T.unroll(2):
        for j in T.unroll(traits.channels // 8):
            for i in T.vectorized(2):
                block.out_s[place, j // 8, row + 8 * r, j % 8 * 8 + consumer.softmax.column + i] = T.cast(
                    consumer.O[4 * j + 2 * r + i] * consumer.softmax.factor[r], traits.problem.result
                )
    T.fence_proxy_async()
    warpgroup_sync(consumer.number)
    _issue_store(traits, operands, block, consumer, tile, place)
    consumer.stored[0] = stage
    if traits.config.q_stages == 1:
        end_stores(traits, block, consumer)


def _issue_store(traits: Traits, operands: Operands, block: Block, consumer: Consumer, tile: Tile, place) -> None:
    first, query = consumer.number * WGMMA_M, tile.query + consumer.number * WGMMA_M
    for panel in range(traits.channels // PANEL):
        to = operands.out[tile.batch, query : query + WGMMA_M, tile.head, panel * PANEL : (panel + 1) * PANEL]
        T.evaluate(T.tma_copy(block.out_s[place, panel, first : first + WGMMA_M, :], to))


def end_stores(traits: Traits, block: Block, consumer: Consumer) -> None:
    """Wait until the store of the last tile has read shared memory, and release its stage of q.

    Where q has two stages, the next tile's first MMAs run meanwhile.
    """

    @T.macro
    def emit():
        if consumer.stored[0] >= 0:
            T.tma_store_wait(0)
            if traits.keeps_q:
                T.sync_warp()
                block.q_pipeline.release(consumer.stored[0], consumer.lane)
            else:
                warpgroup_sync(consumer.number)
            consumer.stored[0] = -1

    if traits.stores_by_tma:
        emit()

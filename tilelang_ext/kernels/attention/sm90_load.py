"""The producer of `sm90_forward`: TMA loads of q, k and v."""

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import Operands
from tilelang_ext.kernels.attention.sm90_block import ROW_BYTES, Block, Traits
from tilelang_ext.kernels.attention.tiles import PANEL, Tile, alloc_tile
from tilelang_ext.kernels.sm90 import multicast
from tilelang_ext.kernels.sm90.pipeline import Pipeline
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP


@T.macro
def produce(traits, operands, block):
    """One warp fills the pipelines: others, whom nothing keeps up with it, could miss a phase."""
    traits.roles.begin_producer()
    if block.thread < WARP:
        _fill(traits, operands, block)


@T.macro
def _fill(traits, operands, block):
    """Keep the pipelines filled, tile after tile."""
    step = T.alloc_var("int32", init=0)  # key blocks since the kernel began
    tiles = T.alloc_var("int32", init=0)  # tiles that have key blocks
    tile = alloc_tile(traits.problem, traits.config.block_N)
    for wave in T.serial(block.order.num_waves):
        block.order.find(wave, tile)
        if tile.num_blocks > 0:
            _load_q(traits, operands, block, tile, tiles)
            for i in T.serial(tile.num_blocks + 1):
                if i < tile.num_blocks:
                    _load(traits, operands.k, block.k_s, block.k_pipeline, tile, i, step + i)
                if i > 0:
                    _load_v(traits, operands, block, tile, i - 1, step + i - 1)
                T.sync_warp()
            step = step + tile.num_blocks
            tiles = tiles + 1


def _load_q(traits: Traits, operands: Operands, block: Block, tile: Tile, tiles) -> None:
    """Fill the stage of the tile number `tiles` with its queries."""
    pipeline, rows = block.q_pipeline, slice(tile.query, tile.query + traits.config.block_M)
    stage = pipeline.stage(tiles)
    pipeline.acquire(stage, pipeline.empty_phase(tiles))
    if traits.problem.pack > 1:
        _load_packed_q(traits, operands, block, tile, stage)
        pipeline.commit_once(stage)
        return
    for panel in range(traits.panels):
        source = operands.q[tile.batch, rows, tile.head, panel * traits.panel : (panel + 1) * traits.panel]
        T.evaluate(T.tma_copy(source, block.q_s[stage, panel, :, :], barrier=pipeline.full[stage]))
    pipeline.commit_once(stage)


def _load_packed_q(traits: Traits, operands: Operands, block: Block, tile: Tile, stage) -> None:
    """Load boxes of some queries by `pack` heads by 64 channels, whose rows lie as those of the tile."""
    pack, rows, barrier = traits.problem.pack, traits.config.block_M, block.q_pipeline.full[stage]
    descriptor = multicast.descriptor(operands.q, (1, rows // pack, pack, PANEL))
    size = rows * PANEL

    def issue():
        for panel in range(traits.panels):
            to = block.q_s.access_ptr(2, "handle", 1, (stage * traits.panels + panel) * size, size)
            T.evaluate(T.tma_load(descriptor, barrier, to, panel * PANEL, tile.head, tile.query, tile.batch, 0))

    @T.macro
    def emit():
        if T.shuffle_elect(WARPGROUP):
            T.mbarrier_expect_tx(barrier, traits.panels * size * 2)
            issue()

    emit()


def _load(traits: Traits, source, shared, pipeline: Pipeline, tile: Tile, i, step) -> None:
    """Fill the stage of a step with the tile's i-th block of keys or values, counted from the last one."""
    stage, rows = pipeline.stage(step), slice(tile.key(i), tile.key(i) + traits.config.block_N)
    pipeline.acquire(stage, pipeline.empty_phase(step))
    for panel in range(traits.panels):
        part = source[tile.batch, rows, tile.kv_head, panel * traits.panel : (panel + 1) * traits.panel]
        T.evaluate(T.tma_copy(part, shared[stage, panel, :, :], barrier=pipeline.full[stage]))
    pipeline.commit_once(stage)


def _load_v(traits: Traits, operands: Operands, block: Block, tile: Tile, i, step) -> None:
    """Fill the stage of a step with the tile's i-th block of values."""
    if not traits.problem.is_fp8:
        _load(traits, operands.v, block.v_s, block.v_pipeline, tile, i, step)
        return
    pipeline, stage, key = block.v_pipeline, block.v_pipeline.stage(step), tile.key(i)
    pipeline.acquire(stage, pipeline.empty_phase(step))
    for panel in range(traits.v_shape[0]):
        keys = slice(key + panel * ROW_BYTES, key + (panel + 1) * ROW_BYTES)
        part = operands.v[tile.batch, tile.kv_head, 0 : traits.channels, keys]
        T.evaluate(T.tma_copy(part, block.v_s[stage, panel, :, :], barrier=pipeline.full[stage]))
    pipeline.commit_once(stage)

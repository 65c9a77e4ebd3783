"""Producers of attention above head_dim 256 on Hopper: a warp each for q and k, and for v of either half of its columns."""

import math

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import Operands
from tilelang_ext.kernels.attention.sm90_wide_block import (
    BLOCK_N,
    CLUSTER,
    PRODUCER_REGISTERS,
    ROWS,
    STAGES,
    V_ROWS,
    V_STEPS,
    Block,
    Traits,
)
from tilelang_ext.kernels.attention.tiles import PANEL, Tile, alloc_tile
from tilelang_ext.kernels.sm90 import multicast
from tilelang_ext.kernels.sm90.roles import WARP

_AXES = (3, 1, 2, 0)  # of the coordinates of q, k and v: as upstream orders them


@T.macro
def produce(traits, operands, block):
    """Each pipeline has a warp of its own: values wait for P, which must not keep keys from being loaded."""
    T.dec_max_nreg(PRODUCER_REGISTERS)
    warp = block.thread // WARP
    if warp == 0:
        _produce_keys(traits, operands, block)
    elif warp == 1:
        _produce_values(traits, operands, block, 0)
    elif warp == 2:
        _produce_values(traits, operands, block, 1)


@T.macro
def _produce_keys(traits, operands, block):
    """Keep the pipelines of q and k filled, tile after tile."""
    step = T.alloc_var("int32", init=0)
    tiles = T.alloc_var("int32", init=0)  # tiles that have key blocks
    tile = alloc_tile(traits.problem, BLOCK_N)
    for wave in T.serial(block.order.num_waves):
        block.order.find(wave, tile)
        if tile.num_blocks > 0:
            _load_q(traits, operands, block, tile, tiles)
            for i in T.serial(tile.num_blocks):
                for panel in T.serial(traits.panels):
                    _load_k(traits, operands, block, tile, i, panel, step)
                    T.sync_warp()
                    step = step + 1
            tiles = tiles + 1


@T.macro
def _produce_values(traits, operands, block, half):
    """Keep the pipeline of one half of the columns of v filled, tile after tile."""
    step = T.alloc_var("int32", init=0)
    tile = alloc_tile(traits.problem, BLOCK_N)
    for wave in T.serial(block.order.num_waves):
        block.order.find(wave, tile)
        for i in T.serial(tile.num_blocks):
            for part in T.serial(V_STEPS):
                _load_v(traits, operands, block, tile, i, part, step, half)
                T.sync_warp()
                step = step + 1


def _load_q(traits: Traits, operands: Operands, block: Block, tile: Tile, tiles) -> None:
    """Load the queries of this block of the tile number `tiles`."""
    pipeline, row = block.q_pipeline, tile.query + block.rank * ROWS
    pipeline.acquire(0, pipeline.empty_phase(tiles))
    for panel in range(traits.panels):
        source = operands.q[tile.batch, row : row + ROWS, tile.head, panel * PANEL : (panel + 1) * PANEL]
        T.evaluate(T.tma_copy(source, block.q_s[panel, :, :], barrier=pipeline.full[0]))
    pipeline.commit_once(0)


def _load_k(traits: Traits, operands: Operands, block: Block, tile: Tile, i, panel, step) -> None:
    """Load this block's half of the rows of one panel of the tile's i-th block of keys to both blocks."""
    pipeline, rows = block.k_pipeline, BLOCK_N // CLUSTER
    stage = pipeline.stage(step)
    pipeline.acquire(stage, pipeline.empty_phase(step))
    first = block.rank * rows
    loads = [(first * PANEL, (panel * PANEL, tile.key(i) + first, tile.kv_head, tile.batch))]
    _multicast(block.thread, operands.k, block.k_s, stage, pipeline.full[stage], rows, loads)


def _load_v(traits: Traits, operands: Operands, block: Block, tile: Tile, i, part, step, half: int) -> None:
    """Load this block's half of the panels of 32 rows of values, of one half of the columns, to both blocks."""
    pipeline = block.v_pipelines[half]
    stage = pipeline.stage(step)
    pipeline.acquire(stage, pipeline.empty_phase(step))
    rows = V_ROWS // CLUSTER
    first = block.rank * rows
    loads = [
        (
            (panel * V_ROWS + first) * PANEL,
            ((half * traits.half + panel) * PANEL, tile.key(i) + part * V_ROWS + first, tile.kv_head, tile.batch),
        )
        for panel in range(traits.half)
    ]
    _multicast(block.thread, operands.v, block.v_s, half * (STAGES // 2) + stage, pipeline.full[stage], rows, loads)


def _multicast(thread, matrix, shared, stage, barrier, rows: int, loads: list) -> None:
    """Load boxes of `rows` rows of 64 channels to both blocks: pairs (first element in the stage, coordinates).

    One thread of the warp does it all, and arrives at the barrier of the stage, which then expects the bytes of the whole
    stage: arrivals of 128 threads take turns, and 14 stages of a block of keys would wait for them.
    """
    size = math.prod(map(int, shared.shape[1:]))
    descriptor = multicast.descriptor(matrix, (1, rows, 1, PANEL), _AXES)

    def issue():
        for first, coordinates in loads:
            to = shared.access_ptr(2, "handle", 1, stage * size + first, rows * PANEL)
            T.evaluate(multicast.load(descriptor, barrier, to, coordinates))

    @T.macro
    def emit():
        if thread % WARP == 0:
            T.mbarrier_expect_tx(barrier, size * 2)
            issue()
            T.mbarrier_arrive(barrier)

    emit()

"""Values of attention above head_dim 256 on Hopper: O += P v, one half of the columns of O in each of two warpgroups."""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import Operands
from tilelang_ext.kernels.attention.sm90_block import PTX_TYPES, SWIZZLE_128B, SWIZZLE_ATOM, uniform
from tilelang_ext.kernels.attention.sm90_config import WGMMA_K
from tilelang_ext.kernels.attention.sm90_softmax import store_rows
from tilelang_ext.kernels.attention.sm90_wide_block import (
    BLOCK_N,
    P_PANELS,
    ROW_BYTES,
    ROWS,
    STAGES,
    UNIT,
    V_ROWS,
    V_STEPS,
    VALUES_REGISTERS,
    Block,
    Traits,
)
from tilelang_ext.kernels.attention.tiles import PANEL, Tile, alloc_tile
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, warpgroup_sync


@dataclass(frozen=True, eq=False)
class _Values:
    """The registers of a thread of a values' warpgroup."""

    half: int  # which half of the columns
    O: list  # of the MMAs side by side
    factor: Any  # (2,)
    p_descriptor: Any
    v_descriptor: Any
    thread: Any  # of the warpgroup

    @property
    def row(self):
        return self.thread // WARP * 16 + self.thread % WARP // 4


@T.macro
def compute_values(traits, operands, block, half):
    """Compute one half of the columns of O, tile after tile."""
    T.inc_max_nreg(VALUES_REGISTERS)
    O = _alloc_outputs(traits)
    factor = T.alloc_local((2,), "float32")
    p_descriptor = T.alloc_wgmma_desc()
    v_descriptor = T.alloc_wgmma_desc()
    T.initialize_wgmma_descriptor(p_descriptor, block.p_s.access_ptr("r"), SWIZZLE_128B, 1, SWIZZLE_ATOM)
    T.initialize_wgmma_descriptor(
        v_descriptor, block.v_s.access_ptr("r"), SWIZZLE_128B, V_ROWS * ROW_BYTES // UNIT, SWIZZLE_ATOM
    )
    values = _Values(half, O, factor, p_descriptor, v_descriptor, block.thread % WARPGROUP)
    step = T.alloc_var("int32", init=0)  # stages of v since the kernel began
    p_step = T.alloc_var("int32", init=0)  # blocks of keys since the kernel began
    results = T.alloc_var("int32", init=0)
    tile = alloc_tile(traits.problem, BLOCK_N)
    for wave in T.serial(block.order.num_waves):
        block.order.find(wave, tile)
        _clear(O)
        for i in T.serial(tile.num_blocks):
            _add_block(traits, block, values, tile, i, step, p_step)
            step = step + V_STEPS
            p_step = p_step + 1
        block.result.wait(0, block.result.full_phase(results))
        for r in T.unroll(2):
            factor[r] = block.inverse_s[values.row + 8 * r]
        warpgroup_sync(half)  # one lane releases what all have read
        block.result.release(0, values.thread % WARP)
        results = results + 1
        _store(traits, operands, block, values, tile)


def _alloc_outputs(traits: Traits) -> list:
    return [T.alloc_local((panels * PANEL // 2,), "float32") for _, panels in traits.parts]


def _clear(O: list) -> None:
    @T.macro
    def clear(part, registers):
        for e in T.unroll(registers):
            part[e] = T.float32(0)

    for part in O:
        clear(part, int(part.shape[0]))


def _scale(O: list, factor) -> None:
    @T.macro
    def scale(part, registers):
        for e in T.unroll(registers):
            part[e] = part[e] * factor[e // 2 % 2]

    for part in O:
        scale(part, int(part.shape[0]))


def _fence(O: list) -> None:
    for part in O:
        T.warpgroup_fence_operand(part, num_regs=int(part.shape[0]))


def _store(traits: Traits, operands: Operands, block: Block, values: _Values, tile: Tile) -> None:
    row, first, column = block.rank * ROWS + values.row, values.half * traits.half, values.thread % 4 * 2
    for O, (panel, panels) in zip(values.O, traits.parts, strict=True):
        store_rows(operands, O, values.factor, tile, row, (first + panel) * PANEL, column, panels * PANEL // 8)


def _add_block(traits: Traits, block: Block, values: _Values, tile: Tile, i, step, p_step) -> None:
    """Scale O, and add P v of the tile's i-th block."""
    _take_probabilities(block, values, p_step)
    for part in range(V_STEPS):
        _add_part(traits, block, values, tile, i, part, step + part, p_step)
    _end_block(traits, block, values, step + V_STEPS - 1, p_step)


@T.macro
def _take_probabilities(block, values, p_step):
    """Wait for P of a block, and multiply O by the factors of its rows."""
    stage = block.p_pipeline.stage(p_step)
    block.p_pipeline.wait(stage, block.p_pipeline.full_phase(p_step))
    for r in T.unroll(2):
        values.factor[r] = block.factor_s[stage, values.row + 8 * r]
    _scale(values.O, values.factor)
    _fence(values.O)


def _add_part(traits: Traits, block: Block, values: _Values, tile: Tile, i, part: int, step, p_step) -> None:
    """Issue O += P v for 32 rows of values, and release the stage before once its MMAs are complete."""
    pipeline, lane = block.v_pipelines[values.half], values.thread % WARP
    ptx, stage_bytes = PTX_TYPES[traits.problem.dtype], traits.half * V_ROWS * ROW_BYTES

    def issue(stage, p_stage):
        for k in range(V_ROWS // WGMMA_K):
            at = part * (V_ROWS // WGMMA_K) + k  # in steps of 16 keys
            p_at = (p_stage * (P_PANELS) + at // 4) * ROWS * ROW_BYTES + at % 4 * 32
            for O, (panel, panels) in zip(values.O, traits.parts, strict=True):
                v_at = (values.half * (STAGES // 2) + stage) * stage_bytes
                v_at = v_at + panel * V_ROWS * ROW_BYTES + k * WGMMA_K * ROW_BYTES
                T.evaluate(
                    T.ptx_wgmma_ss(
                        "float32", f"m64n{panels * PANEL}k16", True, False, ptx, ptx, "fp32",
                        values.p_descriptor.data, p_at // UNIT, values.v_descriptor.data, v_at // UNIT,
                        O.data, 0, T.bool(True), 1, 1,
                    )
                )  # fmt: skip

    @T.macro
    def emit():
        pipeline.wait(pipeline.stage(step), pipeline.full_phase(step))
        if i == (0 if traits.problem.has_lengths else -1):
            _clear_values(traits, block, values, tile, part, pipeline.stage(step))
        stage = T.alloc_var("int32", uniform(pipeline.stage(step)))
        p_stage = T.alloc_var("int32", uniform(block.p_pipeline.stage(p_step)))
        T.warpgroup_arrive()
        issue(stage, p_stage)
        T.warpgroup_commit_batch()
        if part > 0:
            T.wait_wgmma(1)
            pipeline.release(pipeline.stage(step - 1), lane)

    emit()


@T.macro
def _end_block(traits, block, values, step, p_step):
    """Wait for the MMAs of a block, and release its last stage of v and its P."""
    T.wait_wgmma(0)
    _fence(values.O)
    block.v_pipelines[values.half].release(block.v_pipelines[values.half].stage(step), values.thread % WARP)
    block.p_pipeline.release(block.p_pipeline.stage(p_step), values.thread % WARP)


def _clear_values(traits: Traits, block: Block, values: _Values, tile: Tile, part: int, stage) -> None:
    """Clear rows of values past the end of a sequence: 0 times an infinity of another sequence would be NaN."""
    pieces = traits.half * V_ROWS * 8  # of 16 bytes
    first = values.half * (STAGES // 2)

    @T.macro
    def emit():
        rows = T.alloc_var("int32", tile.last - tile.key(0) - part * V_ROWS)
        if rows < V_ROWS:
            for turn in T.serial(pieces // WARPGROUP):
                piece = turn * WARPGROUP + values.thread
                if piece // 8 % V_ROWS >= rows:
                    for e in T.vectorized(8):
                        block.v_s[first + stage, piece // (8 * V_ROWS), piece // 8 % V_ROWS, piece % 8 * 8 + e] = T.cast(
                            0, traits.problem.dtype
                        )
            T.fence_proxy_async()
            warpgroup_sync(values.half)

    emit()

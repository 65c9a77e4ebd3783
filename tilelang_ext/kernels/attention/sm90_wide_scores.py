"""Scores of attention above head_dim 256 on Hopper: S = q k^T of one warpgroup, its softmax, and P to shared memory."""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.sm90_block import PTX_TYPES, SWIZZLE_128B, SWIZZLE_ATOM, uniform
from tilelang_ext.kernels.attention.sm90_config import WGMMA_K
from tilelang_ext.kernels.attention.sm90_softmax import Softmax, alloc_softmax
from tilelang_ext.kernels.attention.sm90_wide_block import (
    BLOCK_N,
    ROW_BYTES,
    ROWS,
    SCORES_REGISTERS,
    SCORES_ROLE,
    UNIT,
    Block,
    Traits,
)
from tilelang_ext.kernels.attention.tiles import PANEL, Tile, alloc_tile
from tilelang_ext.kernels.sm90.pipeline import arrive_once
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP

_QUARTERS = 4  # of the softmax of a block


@dataclass(frozen=True, eq=False)
class _Scores:
    """The registers of a thread of the scores' warpgroup, laid out as `sm90_softmax` describes."""

    S: list  # two: one is computed while the other becomes P
    softmax: Softmax
    q_descriptor: Any
    k_descriptor: Any
    row: Any  # the first of the thread's two rows, in the block
    thread: Any  # of the warpgroup

    @property
    def lane(self):
        return self.thread % WARP


@T.macro
def compute_scores(traits, operands, block):
    """Compute P of this block's queries, tile after tile."""
    T.inc_max_nreg(SCORES_REGISTERS)
    scores = _alloc_scores(traits, block)
    step = T.alloc_var("int32", init=0)  # stages of k since the kernel began
    p_step = T.alloc_var("int32", init=0)  # blocks of keys since the kernel began
    tiles = T.alloc_var("int32", init=0)  # tiles that have key blocks
    results = T.alloc_var("int32", init=0)
    tile = alloc_tile(traits.problem, BLOCK_N)
    for wave in T.serial(block.order.num_waves):
        block.order.find(wave, tile)
        scores.softmax.start()
        if tile.num_blocks > 0:
            block.q_pipeline.wait(0, block.q_pipeline.full_phase(tiles))
            _first_scores(traits, block, scores, step)
            step = step + traits.panels
            # Two blocks per iteration, since the registers of S must be constants.
            for pair in T.serial(T.truncdiv(tile.num_blocks, 2)):
                _next_block(traits, block, scores, tile, 2 * pair, 0, step, p_step)
                step = step + traits.panels
                p_step = p_step + 1
                if 2 * pair + 2 < tile.num_blocks:
                    _next_block(traits, block, scores, tile, 2 * pair + 1, 1, step, p_step)
                    step = step + traits.panels
                    p_step = p_step + 1
            block.q_pipeline.release(0, scores.lane)
            if tile.num_blocks % 2 == 1:
                _last_block(traits, block, scores, tile, 0, p_step)
            else:
                _last_block(traits, block, scores, tile, 1, p_step)
            p_step = p_step + 1
            tiles = tiles + 1
        scores.softmax.finish(operands, tile)
        _publish_result(block, scores, results)
        results = results + 1


def _alloc_scores(traits: Traits, block: Block) -> _Scores:
    @T.macro
    def alloc():
        S_0 = T.alloc_local((BLOCK_N // 2,), "float32")
        S_1 = T.alloc_local((BLOCK_N // 2,), "float32")
        q_descriptor, k_descriptor = T.alloc_wgmma_desc(), T.alloc_wgmma_desc()
        T.initialize_wgmma_descriptor(q_descriptor, block.q_s.access_ptr("r"), SWIZZLE_128B, 1, SWIZZLE_ATOM)
        T.initialize_wgmma_descriptor(k_descriptor, block.k_s.access_ptr("r"), SWIZZLE_128B, 1, SWIZZLE_ATOM)
        return S_0, S_1, q_descriptor, k_descriptor

    thread = block.thread % WARPGROUP
    lane = thread % WARP
    row = thread // WARP * 16 + lane // 4
    softmax = alloc_softmax(traits.problem, block.rank * ROWS + row, lane % 4 * 2)
    S_0, S_1, *descriptors = alloc()
    return _Scores([S_0, S_1], softmax, *descriptors, row, thread)


def _issue_panel(traits: Traits, block: Block, scores: _Scores, S, panel: int, step) -> None:
    """Issue S += q k^T for one panel of channels, and release the stage of the panel before."""
    pipeline, ptx = block.k_pipeline, PTX_TYPES[traits.problem.dtype]

    @T.macro
    def emit():
        pipeline.wait(pipeline.stage(step), pipeline.full_phase(step))
        stage = T.alloc_var("int32", uniform(pipeline.stage(step)))
        # 0, which the compiler does not know: or it would keep all descriptors of q in registers.
        nothing = T.alloc_var("int32", uniform(block.thread // WARPGROUP) - SCORES_ROLE)
        T.warpgroup_arrive()
        for k in T.unroll(PANEL // WGMMA_K):
            T.ptx_wgmma_ss(
                "float32", f"m64n{BLOCK_N}k16", True, True, ptx, ptx, "fp32",
                scores.q_descriptor.data, nothing * ROWS + (panel * ROWS * ROW_BYTES + k * 32) // UNIT,
                scores.k_descriptor.data, (stage * BLOCK_N * ROW_BYTES + k * 32) // UNIT,
                S.data, 0, (panel * (PANEL // WGMMA_K) + k) > 0, 1, 1,
            )  # fmt: skip
        T.warpgroup_commit_batch()
        if panel > 0:
            T.wait_wgmma(1)
            pipeline.release(pipeline.stage(step - 1), scores.lane)

    emit()


def _complete(traits: Traits, block: Block, scores: _Scores, S, step) -> None:
    """Wait for S, whose panels end before `step`, and release its last stage."""
    T.evaluate(T.wait_wgmma(0))
    T.warpgroup_fence_operand(S, num_regs=BLOCK_N // 2)
    block.k_pipeline.release(block.k_pipeline.stage(step - 1), scores.lane)


def _first_scores(traits: Traits, block: Block, scores: _Scores, step) -> None:
    T.warpgroup_fence_operand(scores.S[0], num_regs=BLOCK_N // 2)
    for panel in range(traits.panels):
        _issue_panel(traits, block, scores, scores.S[0], panel, step + panel)
    _complete(traits, block, scores, scores.S[0], step + traits.panels)


def _next_block(traits: Traits, block: Block, scores: _Scores, tile: Tile, i, current: int, step, p_step) -> None:
    """Compute P of the tile's i-th block while the MMAs of the next one's S run."""
    S, following = scores.S[current], scores.S[1 - current]
    T.warpgroup_fence_operand(following, num_regs=BLOCK_N // 2)
    for panel in range(traits.panels):
        _issue_panel(traits, block, scores, following, panel, step + panel)
        if panel < _QUARTERS:
            _quarter(traits, block, scores, tile, tile.key(i), S, panel, p_step)
    _complete(traits, block, scores, following, step + traits.panels)


def _last_block(traits: Traits, block: Block, scores: _Scores, tile: Tile, current: int, p_step) -> None:
    for quarter in range(_QUARTERS):
        _quarter(traits, block, scores, tile, tile.key(tile.num_blocks - 1), scores.S[current], quarter, p_step)


def _quarter(traits: Traits, block: Block, scores: _Scores, tile: Tile, key, S, quarter: int, p_step) -> None:
    """Do a quarter of the softmax of a block; the first also finds the maxima, the last gives P to the values' warpgroups."""
    pipeline, softmax, groups = block.p_pipeline, scores.softmax, BLOCK_N // 8 // _QUARTERS
    stage = pipeline.stage(p_step)

    @T.macro
    def store_factors():
        if softmax.column == 0:
            for r in T.unroll(2):
                block.factor_s[stage, scores.row + 8 * r] = softmax.factor[r]

    if quarter == 0:
        rows = block.rank * ROWS
        softmax.hide(S, tile, key, (rows, rows + ROWS - 1), BLOCK_N)
        softmax.update(S, BLOCK_N)
        pipeline.acquire(stage, pipeline.empty_phase(p_step))
        store_factors()
    softmax.exponentiate(S, quarter * groups, groups)
    store_probabilities(S, quarter * groups, groups, block.p_s, stage, scores.row, softmax.column)
    if quarter == _QUARTERS - 1:
        T.evaluate(T.fence_proxy_async())
        T.evaluate(T.sync_warp())
        arrive_once(pipeline.full, stage, scores.lane)


def store_probabilities(S, first: int, groups: int, p_s, stage, row, column) -> None:
    """Round groups of eight columns of an accumulator, and store them where an MMA reads its left operand: p_s[stage].

    The swizzle of p_s puts the eight rows of a warp's store into different banks. T.fence_proxy_async must follow.
    """
    dtype = str(p_s.dtype)

    @T.macro
    def emit():
        for r in T.unroll(2):
            for j in T.unroll(groups):
                for i in T.vectorized(2):
                    p_s[stage, (first + j) // 8, row + 8 * r, (first + j) % 8 * 8 + column + i] = T.cast(
                        S[4 * (first + j) + 2 * r + i], dtype
                    )

    emit()


@T.macro
def _publish_result(block, scores, results):
    """Give the values' warpgroups what the rows of O are to be multiplied by."""
    block.result.acquire(0, block.result.empty_phase(results))
    if scores.softmax.column == 0:
        for r in T.unroll(2):
            block.inverse_s[scores.row + 8 * r] = scores.softmax.factor[r]
    block.result.commit(0)

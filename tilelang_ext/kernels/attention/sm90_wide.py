"""Attention on Hopper for head_dim above 256: scores and values by different warpgroups, P between them in shared memory.

    S = q k^T;  m' = max(m, rows of S);  P = 2^(scale (S - m'));  l = a l + rows of P;  O = a O + P v,  a = 2^(scale (m - m'))

O of 64 queries fills the registers of two warpgroups, so a third one computes S and its softmax. The two blocks of a cluster
have neighbouring tiles of 64 queries and share the loads of k and v: each loads one half, and both receive both.

Warp roles, one block per SM:

| warpgroup | role | registers |
| --- | --- | --- |
| 0 | producers, a warp each: TMA loads of q and k; of one half of the columns of v; of the other | 24 |
| 1 | scores: S, its softmax, P to shared memory | 184 |
| 2, 3 | values: one half of the columns of O each | 152 |

Pipelines, producer role -> consumer role:

| pipeline | carries | full | empty |
| --- | --- | --- | --- |
| q | the queries of a tile, one stage | one thread, the bytes | 4 warps |
| k | 64 channels of a block of 96 keys | one thread, the bytes of both blocks | 4 warps of each block |
| v | 32 rows of one half of the columns of a block | the same | the same |
| scores -> values | P of a block, and the factor of each row | 4 warps | 8 warps |
| scores -> values | by what the rows of O are divided | 128 threads | 8 warps |

Steady state, for key blocks from the last to the first:

    producers  64 channels of k of block n - 1 | the next channels | ...;  32 rows of v of block n | ...
    scores     issue S = q k[n - 1]^T, 64 channels at a time; between them the softmax of block n, by quarters, and P to p_s
    values     P of block n is there: scale O | issue O += P v[n], 32 rows at a time

So there are always MMAs of S or of O to run. A block reads each key and value once for 64 queries, 256 KB of shared memory
written and 350 KB read for 128 keys, which bounds it at 84% of the tensor cores' rate (docs/log/attention.md).
"""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import Operands, Problem
from tilelang_ext.kernels.attention.sm90_block import ARCH, PASS_CONFIGS, PTX_TYPES, SWIZZLE_128B, SWIZZLE_ATOM, uniform
from tilelang_ext.kernels.attention.sm90_config import WGMMA_K
from tilelang_ext.kernels.attention.sm90_softmax import SOURCE, Softmax, alloc_softmax, store_rows
from tilelang_ext.kernels.attention.tiles import PANEL, Tile, TileOrder, alloc_tile, prim_func
from tilelang_ext.kernels.sm90 import multicast, pdl
from tilelang_ext.kernels.sm90.pipeline import Pipeline, alloc_pipeline, arrive_once
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, dispatch, warpgroup_sync

CLUSTERS = "cluster_dims" in inspect.signature(T.Kernel).parameters  # not in tilelang 0.1.14
_CLUSTER = multicast.BLOCKS
_ROWS = 64  # queries of a block
_BLOCK_N = 96  # keys: two S of them fit in the registers of one warpgroup
_V_ROWS = 32  # of a stage of v
_V_STEPS = _BLOCK_N // _V_ROWS
_P_PANELS = -(-_BLOCK_N // PANEL)
_QUARTERS = 4  # of the softmax of a block
_STAGES = 4  # of k, and of v: two for each half of the columns
_P_STAGES = 2
_MMA_PANELS = 2  # of values, side by side in an MMA
_SCORES_ROLE = 1  # number of its warpgroup
_PRODUCER_REGISTERS, _SCORES_REGISTERS, _VALUES_REGISTERS = 24, 168, 160
_WARPS = WARPGROUP // WARP
_AXES = (3, 1, 2, 0)  # of the coordinates of q, k and v: as upstream orders them
_ROW_BYTES, _UNIT = 128, 16  # of a row of shared memory; of a descriptor


@dataclass(frozen=True, eq=False)
class _Traits:
    """The host's constants of one kernel."""

    problem: Problem

    @property
    def panels(self) -> int:
        """Panels of 64 channels."""
        return -(-self.problem.head_dim // PANEL)

    @property
    def half(self) -> int:
        """Panels of one half of the columns of O; the last one of the second half may lie outside."""
        return -(-self.panels // 2)

    @property
    def parts(self) -> tuple:
        """First panel and panels of the MMAs that make one half: wider ones need more registers than a thread starts with."""
        return ((0, _MMA_PANELS), (_MMA_PANELS, self.half - _MMA_PANELS))


@dataclass(frozen=True, eq=False)
class _Block:
    """What the roles of a block share."""

    q_s: Any  # (panels, 64, 64)
    k_s: Any  # (stages, 128, 64)
    v_s: Any  # (stages, panels of a half, 32, 64)
    p_s: Any  # (2, 2 panels of 64 keys, 64, 64)
    factor_s: Any  # (2, 64)
    inverse_s: Any  # (64,)
    q_pipeline: Pipeline
    k_pipeline: Pipeline
    v_pipelines: list  # of each half
    p_pipeline: Pipeline
    result: Pipeline
    order: TileOrder
    rank: Any  # of the block in its cluster
    thread: Any


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


def attention(problem: Problem):
    """The prim_func of `tiles.prim_func`."""
    traits = _Traits(problem)
    return prim_func(problem, lambda operands: _attention(traits, operands))


# --- block: shared memory, barriers, roles ---------------------------------------------------------------------------


@T.macro
def _attention(traits, operands):
    with T.Kernel(traits.problem.num_sms // _CLUSTER * _CLUSTER, threads=4 * WARPGROUP, cluster_dims=(_CLUSTER, 1, 1)) as block:
        T.import_source(SOURCE)
        q_s = T.alloc_shared((traits.panels, _ROWS, PANEL), traits.problem.dtype)
        k_s = T.alloc_shared((_STAGES, _BLOCK_N, PANEL), traits.problem.dtype)
        v_s = T.alloc_shared((_STAGES, traits.half, _V_ROWS, PANEL), traits.problem.dtype)
        p_s = T.alloc_shared((_P_STAGES, _P_PANELS, _ROWS, PANEL), traits.problem.dtype)
        factor_s = T.alloc_shared((_P_STAGES, _ROWS), "float32")
        inverse_s = T.alloc_shared((_ROWS,), "float32")
        T.annotate_layout({buffer: make_swizzled_layout(buffer) for buffer in (q_s, k_s, v_s, p_s)})
        q_pipeline = alloc_pipeline(1, 1, _WARPS)
        k_pipeline = alloc_pipeline(_STAGES, 1, _WARPS, _CLUSTER)
        v_pipelines = _alloc_v_pipelines()
        p_pipeline = alloc_pipeline(_P_STAGES, _WARPS, 2 * _WARPS)
        result = alloc_pipeline(1, WARPGROUP, 2 * _WARPS)
        clusters = traits.problem.num_sms // _CLUSTER
        order = TileOrder(traits.problem, operands, _ROWS * _CLUSTER, clusters, block // _CLUSTER)
        thread = T.get_thread_binding()
        pdl.trigger()
        pdl.wait()
        _dispatch_roles(
            traits,
            operands,
            _Block(
                q_s, k_s, v_s, p_s, factor_s, inverse_s, q_pipeline, k_pipeline, v_pipelines, p_pipeline, result, order,
                block % _CLUSTER, thread,
            ),
        )  # fmt: skip
        T.cluster_sync()  # no block may end while the other one still writes to it


def _alloc_v_pipelines() -> list:
    return [alloc_pipeline(_STAGES // 2, 1, _WARPS, _CLUSTER) for _ in range(2)]


def _dispatch_roles(traits: _Traits, operands: Operands, block: _Block) -> None:
    roles = (
        functools.partial(_produce, traits, operands, block),
        functools.partial(_compute_scores, traits, operands, block),
        functools.partial(_compute_values, traits, operands, block, 0),
        functools.partial(_compute_values, traits, operands, block, 1),
    )
    dispatch(block.thread, *((WARPGROUP, role) for role in roles))


# --- producer --------------------------------------------------------------------------------------------------------


@T.macro
def _produce(traits, operands, block):
    """Each pipeline has a warp of its own: values wait for P, which must not keep keys from being loaded."""
    T.dec_max_nreg(_PRODUCER_REGISTERS)
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
    tile = alloc_tile(traits.problem, _BLOCK_N)
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
    tile = alloc_tile(traits.problem, _BLOCK_N)
    for wave in T.serial(block.order.num_waves):
        block.order.find(wave, tile)
        for i in T.serial(tile.num_blocks):
            for part in T.serial(_V_STEPS):
                _load_v(traits, operands, block, tile, i, part, step, half)
                T.sync_warp()
                step = step + 1


def _load_q(traits: _Traits, operands: Operands, block: _Block, tile: Tile, tiles) -> None:
    """Load the queries of this block of the tile number `tiles`."""
    pipeline, row = block.q_pipeline, tile.query + block.rank * _ROWS
    pipeline.acquire(0, pipeline.empty_phase(tiles))
    for panel in range(traits.panels):
        source = operands.q[tile.batch, row : row + _ROWS, tile.head, panel * PANEL : (panel + 1) * PANEL]
        T.evaluate(T.tma_copy(source, block.q_s[panel, :, :], barrier=pipeline.full[0]))
    pipeline.commit_once(0)


def _load_k(traits: _Traits, operands: Operands, block: _Block, tile: Tile, i, panel, step) -> None:
    """Load this block's half of the rows of one panel of the tile's i-th block of keys to both blocks."""
    pipeline, rows = block.k_pipeline, _BLOCK_N // _CLUSTER
    stage = pipeline.stage(step)
    pipeline.acquire(stage, pipeline.empty_phase(step))
    first = block.rank * rows
    loads = [(first * PANEL, (panel * PANEL, tile.key(i) + first, tile.kv_head, tile.batch))]
    _multicast(block.thread, operands.k, block.k_s, stage, pipeline.full[stage], rows, loads)


def _load_v(traits: _Traits, operands: Operands, block: _Block, tile: Tile, i, part, step, half: int) -> None:
    """Load this block's half of the panels of 32 rows of values, of one half of the columns, to both blocks."""
    pipeline = block.v_pipelines[half]
    stage = pipeline.stage(step)
    pipeline.acquire(stage, pipeline.empty_phase(step))
    rows = _V_ROWS // _CLUSTER
    first = block.rank * rows
    loads = [
        (
            (panel * _V_ROWS + first) * PANEL,
            ((half * traits.half + panel) * PANEL, tile.key(i) + part * _V_ROWS + first, tile.kv_head, tile.batch),
        )
        for panel in range(traits.half)
    ]
    _multicast(block.thread, operands.v, block.v_s, half * (_STAGES // 2) + stage, pipeline.full[stage], rows, loads)


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


# --- scores ----------------------------------------------------------------------------------------------------------


@T.macro
def _compute_scores(traits, operands, block):
    """Compute P of this block's queries, tile after tile."""
    T.inc_max_nreg(_SCORES_REGISTERS)
    scores = _alloc_scores(traits, block)
    step = T.alloc_var("int32", init=0)  # stages of k since the kernel began
    p_step = T.alloc_var("int32", init=0)  # blocks of keys since the kernel began
    tiles = T.alloc_var("int32", init=0)  # tiles that have key blocks
    results = T.alloc_var("int32", init=0)
    tile = alloc_tile(traits.problem, _BLOCK_N)
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


def _alloc_scores(traits: _Traits, block: _Block) -> _Scores:
    @T.macro
    def alloc():
        S_0 = T.alloc_local((_BLOCK_N // 2,), "float32")
        S_1 = T.alloc_local((_BLOCK_N // 2,), "float32")
        q_descriptor, k_descriptor = T.alloc_wgmma_desc(), T.alloc_wgmma_desc()
        T.initialize_wgmma_descriptor(q_descriptor, block.q_s.access_ptr("r"), SWIZZLE_128B, 1, SWIZZLE_ATOM)
        T.initialize_wgmma_descriptor(k_descriptor, block.k_s.access_ptr("r"), SWIZZLE_128B, 1, SWIZZLE_ATOM)
        return S_0, S_1, q_descriptor, k_descriptor

    thread = block.thread % WARPGROUP
    lane = thread % WARP
    row = thread // WARP * 16 + lane // 4
    softmax = alloc_softmax(traits.problem, block.rank * _ROWS + row, lane % 4 * 2)
    S_0, S_1, *descriptors = alloc()
    return _Scores([S_0, S_1], softmax, *descriptors, row, thread)


def _issue_panel(traits: _Traits, block: _Block, scores: _Scores, S, panel: int, step) -> None:
    """Issue S += q k^T for one panel of channels, and release the stage of the panel before."""
    pipeline, ptx = block.k_pipeline, PTX_TYPES[traits.problem.dtype]

    @T.macro
    def emit():
        pipeline.wait(pipeline.stage(step), pipeline.full_phase(step))
        stage = T.alloc_var("int32", uniform(pipeline.stage(step)))
        # 0, which the compiler does not know: or it would keep all descriptors of q in registers.
        nothing = T.alloc_var("int32", uniform(block.thread // WARPGROUP) - _SCORES_ROLE)
        T.warpgroup_arrive()
        for k in T.unroll(PANEL // WGMMA_K):
            T.ptx_wgmma_ss(
                "float32", f"m64n{_BLOCK_N}k16", True, True, ptx, ptx, "fp32",
                scores.q_descriptor.data, nothing * _ROWS + (panel * _ROWS * _ROW_BYTES + k * 32) // _UNIT,
                scores.k_descriptor.data, (stage * _BLOCK_N * _ROW_BYTES + k * 32) // _UNIT,
                S.data, 0, (panel * (PANEL // WGMMA_K) + k) > 0, 1, 1,
            )  # fmt: skip
        T.warpgroup_commit_batch()
        if panel > 0:
            T.wait_wgmma(1)
            pipeline.release(pipeline.stage(step - 1), scores.lane)

    emit()


def _complete(traits: _Traits, block: _Block, scores: _Scores, S, step) -> None:
    """Wait for S, whose panels end before `step`, and release its last stage."""
    T.evaluate(T.wait_wgmma(0))
    T.warpgroup_fence_operand(S, num_regs=_BLOCK_N // 2)
    block.k_pipeline.release(block.k_pipeline.stage(step - 1), scores.lane)


def _first_scores(traits: _Traits, block: _Block, scores: _Scores, step) -> None:
    T.warpgroup_fence_operand(scores.S[0], num_regs=_BLOCK_N // 2)
    for panel in range(traits.panels):
        _issue_panel(traits, block, scores, scores.S[0], panel, step + panel)
    _complete(traits, block, scores, scores.S[0], step + traits.panels)


def _next_block(traits: _Traits, block: _Block, scores: _Scores, tile: Tile, i, current: int, step, p_step) -> None:
    """Compute P of the tile's i-th block while the MMAs of the next one's S run."""
    S, following = scores.S[current], scores.S[1 - current]
    T.warpgroup_fence_operand(following, num_regs=_BLOCK_N // 2)
    for panel in range(traits.panels):
        _issue_panel(traits, block, scores, following, panel, step + panel)
        if panel < _QUARTERS:
            _quarter(traits, block, scores, tile, tile.key(i), S, panel, p_step)
    _complete(traits, block, scores, following, step + traits.panels)


def _last_block(traits: _Traits, block: _Block, scores: _Scores, tile: Tile, current: int, p_step) -> None:
    for quarter in range(_QUARTERS):
        _quarter(traits, block, scores, tile, tile.key(tile.num_blocks - 1), scores.S[current], quarter, p_step)


def _quarter(traits: _Traits, block: _Block, scores: _Scores, tile: Tile, key, S, quarter: int, p_step) -> None:
    """Do a quarter of the softmax of a block; the first also finds the maxima, the last gives P to the values' warpgroups."""
    pipeline, softmax, groups = block.p_pipeline, scores.softmax, _BLOCK_N // 8 // _QUARTERS
    stage = pipeline.stage(p_step)

    @T.macro
    def store_factors():
        if softmax.column == 0:
            for r in T.unroll(2):
                block.factor_s[stage, scores.row + 8 * r] = softmax.factor[r]

    if quarter == 0:
        rows = block.rank * _ROWS
        softmax.hide(S, tile, key, (rows, rows + _ROWS - 1), _BLOCK_N)
        softmax.update(S, _BLOCK_N)
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


# --- values ----------------------------------------------------------------------------------------------------------


@T.macro
def _compute_values(traits, operands, block, half):
    """Compute one half of the columns of O, tile after tile."""
    T.inc_max_nreg(_VALUES_REGISTERS)
    O = _alloc_outputs(traits)
    factor = T.alloc_local((2,), "float32")
    p_descriptor = T.alloc_wgmma_desc()
    v_descriptor = T.alloc_wgmma_desc()
    T.initialize_wgmma_descriptor(p_descriptor, block.p_s.access_ptr("r"), SWIZZLE_128B, 1, SWIZZLE_ATOM)
    T.initialize_wgmma_descriptor(
        v_descriptor, block.v_s.access_ptr("r"), SWIZZLE_128B, _V_ROWS * _ROW_BYTES // _UNIT, SWIZZLE_ATOM
    )
    values = _Values(half, O, factor, p_descriptor, v_descriptor, block.thread % WARPGROUP)
    step = T.alloc_var("int32", init=0)  # stages of v since the kernel began
    p_step = T.alloc_var("int32", init=0)  # blocks of keys since the kernel began
    results = T.alloc_var("int32", init=0)
    tile = alloc_tile(traits.problem, _BLOCK_N)
    for wave in T.serial(block.order.num_waves):
        block.order.find(wave, tile)
        _clear(O)
        for i in T.serial(tile.num_blocks):
            _add_block(traits, block, values, tile, i, step, p_step)
            step = step + _V_STEPS
            p_step = p_step + 1
        block.result.wait(0, block.result.full_phase(results))
        for r in T.unroll(2):
            factor[r] = block.inverse_s[values.row + 8 * r]
        warpgroup_sync(half)  # one lane releases what all have read
        block.result.release(0, values.thread % WARP)
        results = results + 1
        _store(traits, operands, block, values, tile)


def _alloc_outputs(traits: _Traits) -> list:
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


def _store(traits: _Traits, operands: Operands, block: _Block, values: _Values, tile: Tile) -> None:
    row, first, column = block.rank * _ROWS + values.row, values.half * traits.half, values.thread % 4 * 2
    for O, (panel, panels) in zip(values.O, traits.parts, strict=True):
        store_rows(operands, O, values.factor, tile, row, (first + panel) * PANEL, column, panels * PANEL // 8)


def _add_block(traits: _Traits, block: _Block, values: _Values, tile: Tile, i, step, p_step) -> None:
    """Scale O, and add P v of the tile's i-th block."""
    _take_probabilities(block, values, p_step)
    for part in range(_V_STEPS):
        _add_part(traits, block, values, tile, i, part, step + part, p_step)
    _end_block(traits, block, values, step + _V_STEPS - 1, p_step)


@T.macro
def _take_probabilities(block, values, p_step):
    """Wait for P of a block, and multiply O by the factors of its rows."""
    stage = block.p_pipeline.stage(p_step)
    block.p_pipeline.wait(stage, block.p_pipeline.full_phase(p_step))
    for r in T.unroll(2):
        values.factor[r] = block.factor_s[stage, values.row + 8 * r]
    _scale(values.O, values.factor)
    _fence(values.O)


def _add_part(traits: _Traits, block: _Block, values: _Values, tile: Tile, i, part: int, step, p_step) -> None:
    """Issue O += P v for 32 rows of values, and release the stage before once its MMAs are complete."""
    pipeline, lane = block.v_pipelines[values.half], values.thread % WARP
    ptx, stage_bytes = PTX_TYPES[traits.problem.dtype], traits.half * _V_ROWS * _ROW_BYTES

    def issue(stage, p_stage):
        for k in range(_V_ROWS // WGMMA_K):
            at = part * (_V_ROWS // WGMMA_K) + k  # in steps of 16 keys
            p_at = (p_stage * (_P_PANELS) + at // 4) * _ROWS * _ROW_BYTES + at % 4 * 32
            for O, (panel, panels) in zip(values.O, traits.parts, strict=True):
                v_at = (values.half * (_STAGES // 2) + stage) * stage_bytes
                v_at = v_at + panel * _V_ROWS * _ROW_BYTES + k * WGMMA_K * _ROW_BYTES
                T.evaluate(
                    T.ptx_wgmma_ss(
                        "float32", f"m64n{panels * PANEL}k16", True, False, ptx, ptx, "fp32",
                        values.p_descriptor.data, p_at // _UNIT, values.v_descriptor.data, v_at // _UNIT,
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


def _clear_values(traits: _Traits, block: _Block, values: _Values, tile: Tile, part: int, stage) -> None:
    """Clear rows of values past the end of a sequence: 0 times an infinity of another sequence would be NaN."""
    pieces = traits.half * _V_ROWS * 8  # of 16 bytes
    first = values.half * (_STAGES // 2)

    @T.macro
    def emit():
        rows = T.alloc_var("int32", tile.last - tile.key(0) - part * _V_ROWS)
        if rows < _V_ROWS:
            for turn in T.serial(pieces // WARPGROUP):
                piece = turn * WARPGROUP + values.thread
                if piece // 8 % _V_ROWS >= rows:
                    for e in T.vectorized(8):
                        block.v_s[first + stage, piece // (8 * _V_ROWS), piece // 8 % _V_ROWS, piece % 8 * 8 + e] = T.cast(
                            0, traits.problem.dtype
                        )
            T.fence_proxy_async()
            warpgroup_sync(values.half)

    emit()


# --- host ------------------------------------------------------------------------------------------------------------


def takes(problem: Problem) -> bool:
    """Hopper, head_dim above 256, 16 bits."""
    return CLUSTERS and problem.arch == ARCH and problem.head_dim > 256 and not problem.is_fp8


def compile_kernel(problem: Problem, device) -> Callable:
    """Return the compiled kernel."""
    return device.compile(attention, problem, pass_configs=PASS_CONFIGS)

"""Attention on Hopper for head_dim up to 256: a warp-specialized persistent kernel, with its softmax between WGMMAs.

    S = q k^T;  m' = max(m, rows of S);  P = 2^(scale (S - m'));  l = a l + rows of P;  O = a O + P v,  a = 2^(scale (m - m'))

Warp roles, one block per SM, which takes a tile of 64 queries per consumer and one head after the other:

| warpgroup | role | registers with 2 and with 3 consumers |
| --- | --- | --- |
| 0 | producer: TMA loads of q, k and v | 24, 32 |
| 1, 2, and 3 if there are three | consumers: 64 queries each, their MMAs, softmax and epilogue | 240, 160 |

Pipelines, producer role -> consumer role:

| pipeline | carries | full | empty |
| --- | --- | --- | --- |
| q | the queries of a tile | 128 threads, the bytes | 4 warps of each consumer |
| k, and v | a block of keys, of values | the same | the same |
| consumer -> next consumer | the turn to issue MMAs | a named barrier of 256 threads | |

Steady state, for key blocks from the last to the first:

    producer   q of the tile | k of block n | v of block n + 1 | k of block n - 1 | ...
    consumers  issue S = q k[n]^T | issue O += P v[n + 1] | S is complete: release k, mask, P' = softmax of S | O is complete:
               release v, scale O, P = P'

So the tensor cores multiply P of one block while the softmax of the next is computed, and the other consumers' MMAs run
meanwhile. P never leaves the registers: what a thread has of an accumulator (PTX ISA 9.7.15, D of wgmma) are the elements
that it holds of a left operand of 16 bits, two neighbours in one register. Rows past the end of q, k and v are zeros, by TMA.

Floor on an H200: 4 S_q S_k head_dim heads batch / 9.9e14 s, half of it if causal (docs/log/attention.md).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import Operands, Problem
from tilelang_ext.kernels.attention.sm90_softmax import SOURCE, Softmax, alloc_softmax, store_rows
from tilelang_ext.kernels.attention.tiles import PANEL, Tile, TileOrder, alloc_tile
from tilelang_ext.kernels.sm90 import pdl
from tilelang_ext.kernels.sm90.pipeline import Pipeline, alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, Roles, dispatch, warpgroup_sync

ARCH = "sm_90a"
WGMMA_M, WGMMA_K = 64, 16
# The kernel's own barriers order everything here; TMA clips what lies past the end, and stores are guarded.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}
PTX_TYPES = {"bfloat16": "bf16", "float16": "fp16"}
_ROLES = {2: Roles(2, 24, 240), 3: Roles(3, 32, 160)}
_FIRST_TURN = 8  # number of the named barrier of consumer 0's turn
SWIZZLE_128B, SWIZZLE_ATOM = 1, 1024 // 16  # of a descriptor: its mode, and the stride between eight rows of 128 bytes
_ROW_BYTES, _UNIT = 128, 16  # of a row of shared memory; of a descriptor


@dataclass(frozen=True)
class Config:
    """Consumers, keys of a block, stages of the pipelines of k and of v, and of q, and whether consumers take turns."""

    num_consumers: int
    block_N: int
    num_stages: int
    q_stages: int
    takes_turns: bool = True

    @property
    def block_M(self) -> int:
        return self.num_consumers * WGMMA_M


def pick_config(problem: Problem) -> Config:
    """Return the tile by head_dim, as large as registers and shared memory allow."""
    table = [
        # (head_dim up to, config if causal, config otherwise)
        (64, Config(3, 128, 4, 2), Config(3, 128, 4, 2)),
        (128, Config(2, 128, 2, 2), Config(2, 128, 2, 2)),
        (192, Config(2, 112, 2, 1), Config(2, 112, 2, 1)),
        (256, Config(2, 80, 2, 1), Config(2, 80, 2, 1)),
    ]
    return next(causal if problem.is_causal else full for most, causal, full in table if problem.head_dim <= most)


def uniform(stage):
    """Return a value that all threads have: from a shuffle the compiler sees it, and keeps descriptors in uniform registers."""
    return T.call_pure_extern("int32", "__shfl_sync", T.uint32(0xFFFFFFFF), stage, 0)


# --- what a kernel is made of ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Traits:
    """The host's constants of one kernel."""

    problem: Problem
    config: Config

    @property
    def roles(self) -> Roles:
        return _ROLES[self.config.num_consumers]

    @property
    def panels(self) -> int:
        """Panels of 64 channels, which is a swizzled row of 128 bytes."""
        return -(-self.problem.head_dim // PANEL)

    @property
    def channels(self) -> int:
        """Channels of the tile: what lies past head_dim is zero."""
        return self.panels * PANEL

    @property
    def scores(self) -> int:
        """Registers of S of a thread."""
        return self.config.block_N // 2

    @property
    def outputs(self) -> int:
        """Registers of O of a thread."""
        return self.channels // 2

    @property
    def kv_panel_bytes(self) -> int:
        return self.config.block_N * _ROW_BYTES

    @property
    def kv_stage_bytes(self) -> int:
        return self.panels * self.kv_panel_bytes


@dataclass(frozen=True, eq=False)
class _Block:
    """What the roles of a block share."""

    q_s: Any  # (q_stages, panels, block_M, 64)
    k_s: Any  # (num_stages, panels, block_N, 64)
    v_s: Any  # the same
    q_pipeline: Pipeline
    k_pipeline: Pipeline
    v_pipeline: Pipeline
    order: TileOrder
    thread: Any


@dataclass(frozen=True, eq=False)
class _Consumer:
    """The registers of a thread of a consumer, laid out as `sm90_softmax` describes."""

    number: int
    S: Any
    P: Any  # of 16 bits, in the order of S
    O: Any
    softmax: Softmax
    q_descriptor: Any
    k_descriptor: Any
    v_descriptor: Any
    thread: Any  # of the warpgroup

    @property
    def lane(self):
        return self.thread % WARP


def attention(problem: Problem, config: Config):
    """The prim_func (q, k, v, sinks, cu_q, cu_k, out, lse)."""
    traits, types = _Traits(problem, config), problem.types()

    @T.prim_func
    def attention(
        q: types.q,
        k: types.k,
        v: types.v,
        sinks: types.sinks,
        cu_q: types.cu_q,
        cu_k: types.cu_k,
        out: types.out,
        lse: types.lse,
    ):
        _attention(traits, Operands(q, k, v, sinks, cu_q, cu_k, out, lse))

    return attention


# --- block: shared memory, barriers, roles ---------------------------------------------------------------------------


@T.macro
def _attention(traits, operands):
    with T.Kernel(traits.problem.num_sms, threads=traits.roles.threads) as block:
        T.import_source(SOURCE)
        q_s = T.alloc_shared((traits.config.q_stages, traits.panels, traits.config.block_M, PANEL), traits.problem.dtype)
        k_s = T.alloc_shared((traits.config.num_stages, traits.panels, traits.config.block_N, PANEL), traits.problem.dtype)
        v_s = T.alloc_shared((traits.config.num_stages, traits.panels, traits.config.block_N, PANEL), traits.problem.dtype)
        T.annotate_layout({buffer: make_swizzled_layout(buffer) for buffer in (q_s, k_s, v_s)})
        q_pipeline = alloc_pipeline(traits.config.q_stages, WARPGROUP, traits.roles.consumer_warps)
        k_pipeline = alloc_pipeline(traits.config.num_stages, WARPGROUP, traits.roles.consumer_warps)
        v_pipeline = alloc_pipeline(traits.config.num_stages, WARPGROUP, traits.roles.consumer_warps)
        order = TileOrder(traits.problem, operands, traits.config.block_M, traits.problem.num_sms, block)
        thread = T.get_thread_binding()
        pdl.trigger()
        pdl.wait()
        _dispatch_roles(traits, operands, _Block(q_s, k_s, v_s, q_pipeline, k_pipeline, v_pipeline, order, thread))


def _dispatch_roles(traits: _Traits, operands: Operands, block: _Block) -> None:
    consumers = [
        (WARPGROUP, functools.partial(_consume, traits, operands, block, number))
        for number in range(traits.config.num_consumers)
    ]
    dispatch(block.thread, (WARPGROUP, functools.partial(_produce, traits, operands, block)), *consumers)


# --- producer --------------------------------------------------------------------------------------------------------


@T.macro
def _produce(traits, operands, block):
    """Keep the pipelines filled, tile after tile."""
    traits.roles.begin_producer()
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
                    _load(traits, operands.v, block.v_s, block.v_pipeline, tile, i - 1, step + i - 1)
            step = step + tile.num_blocks
            tiles = tiles + 1


def _load_q(traits: _Traits, operands: Operands, block: _Block, tile: Tile, tiles) -> None:
    """Fill the stage of the tile number `tiles` with its queries."""
    pipeline, rows = block.q_pipeline, slice(tile.query, tile.query + traits.config.block_M)
    stage = pipeline.stage(tiles)
    pipeline.acquire(stage, pipeline.empty_phase(tiles))
    for panel in range(traits.panels):
        source = operands.q[tile.batch, rows, tile.head, panel * PANEL : (panel + 1) * PANEL]
        T.evaluate(T.tma_copy(source, block.q_s[stage, panel, :, :], barrier=pipeline.full[stage]))
    pipeline.commit(stage)


def _load(traits: _Traits, source, shared, pipeline: Pipeline, tile: Tile, i, step) -> None:
    """Fill the stage of a step with the tile's i-th block of keys or values, counted from the last one."""
    stage, rows = pipeline.stage(step), slice(tile.key(i), tile.key(i) + traits.config.block_N)
    pipeline.acquire(stage, pipeline.empty_phase(step))
    for panel in range(traits.panels):
        part = source[tile.batch, rows, tile.kv_head, panel * PANEL : (panel + 1) * PANEL]
        T.evaluate(T.tma_copy(part, shared[stage, panel, :, :], barrier=pipeline.full[stage]))
    pipeline.commit(stage)


# --- consumers -------------------------------------------------------------------------------------------------------


@T.macro
def _consume(traits, operands, block, number):
    """Compute the consumer's queries, tile after tile."""
    traits.roles.begin_consumer()
    consumer = _alloc_consumer(traits, block, number)
    step = T.alloc_var("int32", init=0)  # key blocks since the kernel began
    tiles = T.alloc_var("int32", init=0)  # tiles that have key blocks
    tile = alloc_tile(traits.problem, traits.config.block_N)
    _give_first_turn(traits, number)
    for wave in T.serial(block.order.num_waves):
        block.order.find(wave, tile)
        for i in T.unroll(traits.outputs):
            consumer.O[i] = T.float32(0)
        consumer.softmax.start()
        if tile.num_blocks > 0:
            block.q_pipeline.wait(block.q_pipeline.stage(tiles), block.q_pipeline.full_phase(tiles))
            _attend(traits, block, consumer, tile, tiles, step)
            step = step + tile.num_blocks
            tiles = tiles + 1
        consumer.softmax.finish(operands, tile)
        _store(traits, operands, consumer, tile)


def _alloc_consumer(traits: _Traits, block: _Block, number: int) -> _Consumer:
    v_leading = traits.kv_panel_bytes // _UNIT

    @T.macro
    def alloc():
        S = T.alloc_local((traits.scores,), "float32")
        P = T.alloc_local((traits.scores,), traits.problem.dtype)
        O = T.alloc_local((traits.outputs,), "float32")
        q_descriptor, k_descriptor, v_descriptor = T.alloc_wgmma_desc(), T.alloc_wgmma_desc(), T.alloc_wgmma_desc()
        T.initialize_wgmma_descriptor(q_descriptor, block.q_s.access_ptr("r"), SWIZZLE_128B, 1, SWIZZLE_ATOM)
        T.initialize_wgmma_descriptor(k_descriptor, block.k_s.access_ptr("r"), SWIZZLE_128B, 1, SWIZZLE_ATOM)
        T.initialize_wgmma_descriptor(v_descriptor, block.v_s.access_ptr("r"), SWIZZLE_128B, v_leading, SWIZZLE_ATOM)
        return S, P, O, q_descriptor, k_descriptor, v_descriptor

    thread = block.thread % WARPGROUP
    lane = thread % WARP
    softmax = alloc_softmax(traits.problem, number * WGMMA_M + thread // WARP * 16 + lane // 4, lane % 4 * 2)
    S, P, O, *descriptors = alloc()
    return _Consumer(number, S, P, O, softmax, *descriptors, thread)


def _attend(traits: _Traits, block: _Block, consumer: _Consumer, tile: Tile, tiles, step) -> None:
    """Add the key blocks of a tile, of which there is at least one, from the last to the first."""
    q_pipeline, k_pipeline, v_pipeline, lane = block.q_pipeline, block.k_pipeline, block.v_pipeline, consumer.lane
    S, O = consumer.S, consumer.O

    @T.macro
    def first_block():
        k_pipeline.wait(k_pipeline.stage(step), k_pipeline.full_phase(step))
        _wait_turn(traits, consumer.number)
        _issue_scores(traits, block, consumer, tiles, step)
        _give_turn(traits, consumer.number)
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(S, num_regs=traits.scores)
        k_pipeline.release(k_pipeline.stage(step), lane)
        if tile.num_blocks == 1:
            q_pipeline.release(q_pipeline.stage(tiles), lane)
        _hide(traits, consumer, tile, tile.key(0))
        _softmax(traits, consumer)
        _round_probabilities(traits, consumer)
        if traits.problem.has_lengths:
            _clear_values(traits, block, consumer, tile, step)

    @T.macro
    def next_block(i):
        k_pipeline.wait(k_pipeline.stage(step + i), k_pipeline.full_phase(step + i))
        _wait_turn(traits, consumer.number)
        _issue_scores(traits, block, consumer, tiles, step + i)
        v_pipeline.wait(v_pipeline.stage(step + i - 1), v_pipeline.full_phase(step + i - 1))
        _issue_values(traits, block, consumer, step + i - 1)
        _give_turn(traits, consumer.number)
        T.wait_wgmma(1)
        T.warpgroup_fence_operand(S, num_regs=traits.scores)
        k_pipeline.release(k_pipeline.stage(step + i), lane)
        if i == tile.num_blocks - 1:
            q_pipeline.release(q_pipeline.stage(tiles), lane)
        _hide(traits, consumer, tile, tile.key(i))
        _softmax(traits, consumer)
        # Or the compiler would move the softmax behind the wait for O: nvcc stops at the fence, ptxas at the loop of a wait.
        T.warpgroup_fence_operand(S, num_regs=traits.scores)
        v_pipeline.wait(v_pipeline.stage(step + i - 1), v_pipeline.full_phase(step + i - 1))
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(O, num_regs=traits.outputs)
        v_pipeline.release(v_pipeline.stage(step + i - 1), lane)
        for e in T.unroll(traits.outputs):
            O[e] = O[e] * consumer.softmax.factor[e // 2 % 2]
        _round_probabilities(traits, consumer)

    @T.macro
    def last_values(i):
        v_pipeline.wait(v_pipeline.stage(step + i), v_pipeline.full_phase(step + i))
        _issue_values(traits, block, consumer, step + i)
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(O, num_regs=traits.outputs)
        v_pipeline.release(v_pipeline.stage(step + i), lane)

    @T.macro
    def emit():
        first_block()
        for i in T.serial(tile.num_blocks - 1):
            next_block(i + 1)
        last_values(tile.num_blocks - 1)

    emit()


@T.macro
def _issue_scores(traits, block, consumer, tiles, step):
    """Issue S = q k^T for the keys of a step."""
    stage = T.alloc_var("int32", uniform(block.k_pipeline.stage(step)))
    q_stage = T.alloc_var("int32", uniform(block.q_pipeline.stage(tiles)))
    ptx = PTX_TYPES[traits.problem.dtype]
    T.warpgroup_fence_operand(consumer.S, num_regs=traits.scores)
    T.warpgroup_arrive()
    for k in T.unroll(traits.channels // WGMMA_K):
        T.ptx_wgmma_ss(
            "float32", f"m64n{traits.config.block_N}k16", True, True, ptx, ptx, "fp32",
            consumer.q_descriptor.data,
            (((q_stage * traits.panels + k // 4) * traits.config.block_M + consumer.number * WGMMA_M) * _ROW_BYTES + k % 4 * 32)
            // _UNIT,
            consumer.k_descriptor.data,
            (stage * traits.kv_stage_bytes + k // 4 * traits.kv_panel_bytes + k % 4 * 32) // _UNIT,
            consumer.S.data, 0, k > 0, 1, 1,
        )  # fmt: skip
    T.warpgroup_commit_batch()


@T.macro
def _issue_values(traits, block, consumer, step):
    """Issue O += P v for the values of a step."""
    stage = T.alloc_var("int32", uniform(block.v_pipeline.stage(step)))
    ptx = PTX_TYPES[traits.problem.dtype]
    T.warpgroup_fence_operand(consumer.O, num_regs=traits.outputs)
    T.warpgroup_fence_operand(consumer.P, num_regs=traits.scores // 2)
    T.warpgroup_arrive()
    for k in T.unroll(traits.config.block_N // WGMMA_K):
        T.ptx_wgmma_rs(
            "float32", f"m64n{traits.channels}k16", False, ptx, ptx, "fp32",
            consumer.P.data, 8 * k,
            consumer.v_descriptor.data, (stage * traits.kv_stage_bytes + k * WGMMA_K * _ROW_BYTES) // _UNIT,
            consumer.O.data, 0, T.bool(True), 1, 1,
        )  # fmt: skip
    T.warpgroup_commit_batch()


@T.macro
def _clear_values(traits, block, consumer, tile, step):
    """Clear values past the end of a sequence in its last block: 0 times an infinity of another sequence would be NaN."""
    pieces = traits.panels * traits.config.block_N * 8  # of 16 bytes
    stage = block.v_pipeline.stage(step)
    rows = T.alloc_var("int32", tile.last - tile.key(0))
    if rows < traits.config.block_N:
        block.v_pipeline.wait(stage, block.v_pipeline.full_phase(step))
        for turn in T.serial(pieces // WARPGROUP):
            piece = turn * WARPGROUP + consumer.thread
            if piece // 8 % traits.config.block_N >= rows:
                for e in T.vectorized(8):
                    block.v_s[
                        stage, piece // (8 * traits.config.block_N), piece // 8 % traits.config.block_N, piece % 8 * 8 + e
                    ] = T.cast(0, traits.problem.dtype)
        T.fence_proxy_async()
        warpgroup_sync(consumer.number)


# --- turns: while one consumer computes its softmax, the MMAs of the others run ----------------------------------------


def _give_first_turn(traits: _Traits, number: int) -> None:
    if traits.config.takes_turns and number == traits.config.num_consumers - 1:
        _give_turn(traits, number)


def _wait_turn(traits: _Traits, number: int) -> None:
    if traits.config.takes_turns:
        T.evaluate(T.sync_threads(barrier_id=_FIRST_TURN + number, arrive_count=2 * WARPGROUP))


def _give_turn(traits: _Traits, number: int) -> None:
    """Give the turn to the next consumer: its threads and these meet at its barrier, and only its own wait there."""
    if traits.config.takes_turns:
        following = (number + 1) % traits.config.num_consumers
        T.evaluate(T.named_barrier_arrive(_FIRST_TURN + following, 2 * WARPGROUP))


def _hide(traits: _Traits, consumer: _Consumer, tile: Tile, key) -> None:
    consumer.softmax.hide(consumer.S, tile, key, (0, traits.config.block_M - 1), traits.config.block_N)


def _softmax(traits: _Traits, consumer: _Consumer) -> None:
    """Replace S by its powers under the new maximum of each row."""
    consumer.softmax.update(consumer.S, traits.config.block_N)
    consumer.softmax.exponentiate(consumer.S, 0, traits.config.block_N // 8)


def _store(traits: _Traits, operands: Operands, consumer: _Consumer, tile: Tile) -> None:
    softmax = consumer.softmax
    store_rows(operands, consumer.O, softmax.factor, tile, softmax.row, 0, softmax.column, traits.channels // 8)


@T.macro
def _round_probabilities(traits, consumer):
    """P = S in 16 bits: registers of the accumulator, two by two, are the registers of the left operand."""
    for e in T.unroll(traits.scores // 2):
        for i in T.vectorized(2):
            consumer.P[2 * e + i] = T.cast(consumer.S[2 * e + i], traits.problem.dtype)


# --- host ------------------------------------------------------------------------------------------------------------


def takes(problem: Problem) -> bool:
    """Hopper, head_dim up to 256."""
    return problem.arch == ARCH and problem.head_dim <= 256


def compile_kernel(problem: Problem, device) -> Callable:
    """Return the compiled kernel."""
    return device.compile(attention, problem, pick_config(problem), pass_configs=PASS_CONFIGS)

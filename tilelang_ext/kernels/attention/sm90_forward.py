"""Attention on Hopper for head_dim up to 256: a warp-specialized persistent kernel, with its softmax between WGMMAs.

    S = q k^T;  m' = max(m, rows of S);  P = 2^(scale (S - m'));  l = a l + rows of P;  O = a O + P v,  a = 2^(scale (m - m'))

Warp roles, one block per SM, which takes a tile of 64 rows per consumer after the other:

| warpgroup | role | registers with 2 and with 3 consumers |
| --- | --- | --- |
| 0 | producer: TMA loads of q, k and v | 24, 32 |
| 1, 2, and 3 if there are three | consumers: 64 rows each, their MMAs, softmax and epilogue | 240, 160 |

Pipelines, producer role -> consumer role:

| pipeline | carries | full | empty |
| --- | --- | --- | --- |
| q | the queries of a tile | one thread, the bytes | 4 warps of each consumer |
| k, and v | a block of keys, of values | the same | the same |
| consumer -> next consumer | the turn to issue MMAs | a named barrier of 256 threads | |

Steady state, for key blocks from the last to the first:

    producer   q of the tile | k of block n | v of block n + 1 | k of block n - 1 | ...
    consumers  issue S = q k[n]^T | issue O += P v[n + 1] | S is complete: release k, mask, P' = softmax of S | O is complete:
               release v, scale O, P = P'

So the tensor cores multiply P of one block while the softmax of the next is computed, and the other consumers' MMAs run
meanwhile. Full tiles that do not fill a wave of SMs are divided: each SM gets a range of their key blocks, and `sm90_parts`
sums what comes of them. P never leaves the registers (`probabilities`). Rows past the end of q, k and v are zeros, by TMA.

Floor on an H200: 4 S_q S_k head_dim heads batch / 9.9e14 s, half of it if causal (docs/log/attention.md).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.kernels.attention import sm90_parts, sm90_transpose
from tilelang_ext.kernels.attention.probabilities import KEY_UNIT
from tilelang_ext.kernels.attention.problem import FP8, Operands, Problem
from tilelang_ext.kernels.attention.sm90_softmax import SOURCE, Softmax, alloc_softmax, store_part, store_rows
from tilelang_ext.kernels.attention.tiles import PANEL, PARTS, SHORT_WINDOW, Tile, TileOrder, alloc_tile, of_head, prim_func
from tilelang_ext.kernels.sm90 import multicast, pdl
from tilelang_ext.kernels.sm90.pipeline import Pipeline, alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, Roles, dispatch, warpgroup_sync

ARCH = "sm_90a"
WGMMA_M, WGMMA_K = 64, 16  # of 16 bits
# The kernel's own barriers order everything here; TMA clips what lies past the end, and stores are guarded.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}
SIMPLE_CONFIGS = {  # of what goes before and after
    "tl.disable_warp_specialized": True,
    "tl.disable_tma_lower": True,
    "tl.disable_safe_memory_legalize": True,
}
PTX_TYPES = {"bfloat16": "bf16", "float16": "fp16", FP8: "e4m3"}
_ROLES = {2: Roles(2, 24, 240), 3: Roles(3, 32, 160)}
_FIRST_TURN = 8  # number of the named barrier of consumer 0's turn
SWIZZLE_128B, SWIZZLE_ATOM = 1, 1024 // 16  # of a descriptor: its mode, and the stride between eight rows of 128 bytes
_ROW_BYTES, _UNIT = 128, 16  # of a row of shared memory; of a descriptor
_STEP_BYTES = 32  # of an MMA's K
_FP8_BITS = 8  # P is up to 2^8 where it is rounded to e4m3, whose largest number is 448, and whose least 2^-9
PACK_SOURCE = r"""
__device__ __forceinline__ unsigned tilelang_ext_e4m3x4(float x, float y, float z, float w) {
  unsigned codes;
  asm("{.reg .b16 lo, hi;\n"
      "cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n"
      "mov.b32 %0, {lo, hi};}" : "=r"(codes) : "f"(x), "f"(y), "f"(z), "f"(w));
  return codes;
}
"""  # of a kernel that rounds P to 8 bits


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
    if 0 < problem.window <= SHORT_WINDOW and problem.head_dim <= 128 and not problem.is_fp8:
        # One tile's windows in as few blocks of keys as registers and shared memory allow, and these no longer than needed.
        most, consumers = (176, 2) if problem.head_dim <= 64 else (144, 2)
        span = problem.window + consumers * WGMMA_M // problem.pack - 1
        blocks = -(-span // most)
        block_N = -(-span // blocks // WGMMA_K) * WGMMA_K
        return Config(consumers, block_N, 3 if problem.head_dim <= 64 else 2, 2)
    of_codes = [(64, Config(3, 128, 4, 2)), (128, Config(2, 128, 4, 2)), (256, Config(2, 128, 2, 1))]
    if problem.is_fp8:
        return next(config for most, config in of_codes if problem.head_dim <= most)
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
    def divides(self) -> bool:
        """Whether the tiles that do not fill a wave are divided: all tiles have equally many key blocks."""
        return not (self.problem.is_causal or self.problem.has_lengths)

    @property
    def stores_by_tma(self) -> bool:
        """Whether O goes through shared memory to TMA stores, which clip rows at the end of out, not of a sequence."""
        return not self.problem.has_lengths and self.problem.pack == 1

    @property
    def keeps_q(self) -> bool:
        """Whether O goes through the stage of q, which is as large: it is then released late."""
        return self.stores_by_tma and not self.problem.is_fp8

    @property
    def part(self) -> tuple[int, int]:
        """Rows and channels of a part of a divided tile."""
        return self.config.block_M, self.channels

    @property
    def element_bytes(self) -> int:
        return 1 if self.problem.is_fp8 else 2

    @property
    def panel(self) -> int:
        """Channels of a panel of q and k: a swizzled row of 128 bytes."""
        return _ROW_BYTES // self.element_bytes

    @property
    def panels(self) -> int:
        """Panels of q and k."""
        return -(-self.problem.head_dim // self.panel)

    @property
    def channels(self) -> int:
        """Channels of O: what lies past head_dim is zero."""
        return -(-self.problem.head_dim // PANEL) * PANEL

    @property
    def v_shape(self) -> tuple:
        """Panels, rows and columns of a block of values: of 16 bits as of keys, of codes channels by keys."""
        if self.problem.is_fp8:
            return self.config.block_N // _ROW_BYTES, self.channels, _ROW_BYTES
        return self.panels, self.config.block_N, PANEL

    @property
    def v_panel_bytes(self) -> int:
        return self.v_shape[1] * _ROW_BYTES

    @property
    def v_stage_bytes(self) -> int:
        return self.v_shape[0] * self.v_panel_bytes

    @property
    def probabilities(self) -> int:
        """Registers of P of a thread."""
        return self.scores * self.element_bytes // 4

    @property
    def scores(self) -> int:
        """Registers of S of a thread."""
        return self.config.block_N // 2

    @property
    def outputs(self) -> int:
        """Registers of O of a thread."""
        return self.channels // 2

    @property
    def k_panel_bytes(self) -> int:
        return self.config.block_N * _ROW_BYTES

    @property
    def k_stage_bytes(self) -> int:
        return self.panels * self.k_panel_bytes


@dataclass(frozen=True, eq=False)
class _Block:
    """What the roles of a block share."""

    q_s: Any  # (q_stages, panels, block_M, 64), of codes 128
    k_s: Any  # (num_stages, panels, block_N, 64), of codes 128
    v_s: Any  # the same; of codes (num_stages, block_N / 128, channels, 128)
    out_s: Any  # (stages, panels, block_M, 64) of results: q_s, or of one stage beside codes
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
    P: Any  # of 16 bits, in the order of S; of codes four in a word
    O: Any
    softmax: Softmax
    q_descriptor: Any
    k_descriptor: Any
    v_descriptor: Any
    scale: Any  # of codes: float32 (1,), that of q . k of the tile
    stored: Any  # int32 (1,): the stage whose store may still read it, or -1
    thread: Any  # of the warpgroup

    @property
    def lane(self):
        return self.thread % WARP


def attention(problem: Problem, config: Config):
    """The prim_func of `tiles.prim_func`: with partial and partial_lse where tiles are divided, and transposed codes of v."""
    traits = _Traits(problem, config)
    part = traits.part if traits.divides else None
    return prim_func(problem, lambda operands: _attention(traits, operands), part, problem.is_fp8)


# --- block: shared memory, barriers, roles ---------------------------------------------------------------------------


@T.macro
def _attention(traits, operands):
    with T.Kernel(traits.problem.num_sms, threads=traits.roles.threads) as block:
        T.import_source(SOURCE + (PACK_SOURCE if traits.problem.is_fp8 else ""))
        q_s = T.alloc_shared((traits.config.q_stages, traits.panels, traits.config.block_M, traits.panel), traits.problem.dtype)
        k_s = T.alloc_shared(
            (traits.config.num_stages, traits.panels, traits.config.block_N, traits.panel), traits.problem.dtype
        )
        v_s = T.alloc_shared((traits.config.num_stages, *traits.v_shape), traits.problem.dtype)
        out_s = _alloc_results(traits, q_s)
        T.annotate_layout({buffer: make_swizzled_layout(buffer) for buffer in dict.fromkeys((q_s, k_s, v_s, out_s))})
        q_pipeline = alloc_pipeline(traits.config.q_stages, 1, traits.roles.consumer_warps)
        k_pipeline = alloc_pipeline(traits.config.num_stages, 1, traits.roles.consumer_warps)
        v_pipeline = alloc_pipeline(traits.config.num_stages, 1, traits.roles.consumer_warps)
        order = _order(traits, operands, block)
        thread = T.get_thread_binding()
        pdl.trigger()
        pdl.wait()
        _dispatch_roles(traits, operands, _Block(q_s, k_s, v_s, out_s, q_pipeline, k_pipeline, v_pipeline, order, thread))


def _alloc_results(traits: _Traits, q_s):
    if traits.keeps_q or not traits.stores_by_tma:
        return q_s
    return T.alloc_shared((1, traits.channels // PANEL, traits.config.block_M, PANEL), traits.problem.result)


def _order(traits: _Traits, operands: Operands, block) -> TileOrder:
    order = TileOrder(traits.problem, operands, traits.config.block_M, traits.problem.num_sms, block)
    return order.with_parts(traits.config.block_N) if traits.divides else order


def _dispatch_roles(traits: _Traits, operands: Operands, block: _Block) -> None:
    consumers = [
        (WARPGROUP, functools.partial(_consume, traits, operands, block, number))
        for number in range(traits.config.num_consumers)
    ]
    dispatch(block.thread, (WARPGROUP, functools.partial(_produce, traits, operands, block)), *consumers)


# --- producer --------------------------------------------------------------------------------------------------------


@T.macro
def _produce(traits, operands, block):
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


def _load_q(traits: _Traits, operands: Operands, block: _Block, tile: Tile, tiles) -> None:
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


def _load_packed_q(traits: _Traits, operands: Operands, block: _Block, tile: Tile, stage) -> None:
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


def _load(traits: _Traits, source, shared, pipeline: Pipeline, tile: Tile, i, step) -> None:
    """Fill the stage of a step with the tile's i-th block of keys or values, counted from the last one."""
    stage, rows = pipeline.stage(step), slice(tile.key(i), tile.key(i) + traits.config.block_N)
    pipeline.acquire(stage, pipeline.empty_phase(step))
    for panel in range(traits.panels):
        part = source[tile.batch, rows, tile.kv_head, panel * traits.panel : (panel + 1) * traits.panel]
        T.evaluate(T.tma_copy(part, shared[stage, panel, :, :], barrier=pipeline.full[stage]))
    pipeline.commit_once(stage)


def _load_v(traits: _Traits, operands: Operands, block: _Block, tile: Tile, i, step) -> None:
    """Fill the stage of a step with the tile's i-th block of values."""
    if not traits.problem.is_fp8:
        _load(traits, operands.v, block.v_s, block.v_pipeline, tile, i, step)
        return
    pipeline, stage, key = block.v_pipeline, block.v_pipeline.stage(step), tile.key(i)
    pipeline.acquire(stage, pipeline.empty_phase(step))
    for panel in range(traits.v_shape[0]):
        keys = slice(key + panel * _ROW_BYTES, key + (panel + 1) * _ROW_BYTES)
        part = operands.v[tile.batch, tile.kv_head, 0 : traits.channels, keys]
        T.evaluate(T.tma_copy(part, block.v_s[stage, panel, :, :], barrier=pipeline.full[stage]))
    pipeline.commit_once(stage)


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
        _start_scale(traits, operands, consumer, tile)
        if tile.num_blocks > 0:
            block.q_pipeline.wait(block.q_pipeline.stage(tiles), block.q_pipeline.full_phase(tiles))
            _attend(traits, block, consumer, tile, tiles, step)
            step = step + tile.num_blocks
            tiles = tiles + 1
        _finish(traits, operands, block, consumer, tile, tiles)
    _end_stores(traits, block, consumer)


def _alloc_consumer(traits: _Traits, block: _Block, number: int) -> _Consumer:
    is_fp8 = traits.problem.is_fp8
    v_leading = 1 if is_fp8 else traits.v_panel_bytes // _UNIT

    @T.macro
    def alloc():
        S = T.alloc_local((traits.scores,), "float32")
        P = T.alloc_local((traits.scores // 4 if is_fp8 else traits.scores,), "uint32" if is_fp8 else traits.problem.dtype)
        O = T.alloc_local((traits.outputs,), "float32")
        q_descriptor, k_descriptor, v_descriptor = T.alloc_wgmma_desc(), T.alloc_wgmma_desc(), T.alloc_wgmma_desc()
        T.initialize_wgmma_descriptor(q_descriptor, block.q_s.access_ptr("r"), SWIZZLE_128B, 1, SWIZZLE_ATOM)
        T.initialize_wgmma_descriptor(k_descriptor, block.k_s.access_ptr("r"), SWIZZLE_128B, 1, SWIZZLE_ATOM)
        T.initialize_wgmma_descriptor(v_descriptor, block.v_s.access_ptr("r"), SWIZZLE_128B, v_leading, SWIZZLE_ATOM)
        stored = T.alloc_local((1,), "int32")
        stored[0] = -1
        return stored, S, P, O, q_descriptor, k_descriptor, v_descriptor

    @T.macro
    def alloc_scale():
        return T.alloc_local((1,), "float32")

    thread = block.thread % WARPGROUP
    lane = thread % WARP
    scale = alloc_scale() if is_fp8 else None
    softmax = alloc_softmax(
        traits.problem, number * WGMMA_M + thread // WARP * 16 + lane // 4, lane % 4 * 2, scale[0] if is_fp8 else None,
        _FP8_BITS if is_fp8 else 0,
    )  # fmt: skip
    stored, S, P, O, *descriptors = alloc()
    return _Consumer(number, S, P, O, softmax, *descriptors, scale, stored, thread)


def _start_scale(traits: _Traits, operands: Operands, consumer: _Consumer, tile: Tile) -> None:
    """Take the scales of a tile's codes."""
    q_scale, k_scale, scale = operands.q_scale, operands.k_scale, consumer.scale

    @T.macro
    def emit():
        of_q, of_k = of_head(q_scale, tile.head), of_head(k_scale, tile.kv_head)
        scale[0] = of_q * of_k * T.float32(traits.problem.scale_log2)

    if traits.problem.is_fp8:
        emit()


def _attend(traits: _Traits, block: _Block, consumer: _Consumer, tile: Tile, tiles, step) -> None:
    """Add the key blocks of a tile, of which there is at least one, from the last to the first."""
    k_pipeline, v_pipeline, lane = block.k_pipeline, block.v_pipeline, consumer.lane
    S, O = consumer.S, consumer.O

    @T.macro
    def first_block():
        k_pipeline.wait(k_pipeline.stage(step), k_pipeline.full_phase(step))
        _wait_turn(traits, consumer.number)
        _issue_scores(traits, block, consumer, tiles, step)
        _give_turn(traits, consumer.number)
        _end_stores(traits, block, consumer)
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(S, num_regs=traits.scores)
        k_pipeline.release(k_pipeline.stage(step), lane)
        _release_q(traits, block, consumer, tiles, tile.num_blocks == 1)
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
        _release_q(traits, block, consumer, tiles, i == tile.num_blocks - 1)
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


def _release_q(traits: _Traits, block: _Block, consumer: _Consumer, tiles, is_last) -> None:
    """Release the queries after the last S, unless O goes through their stage."""
    pipeline = block.q_pipeline

    @T.macro
    def emit():
        if is_last:
            pipeline.release(pipeline.stage(tiles), consumer.lane)

    if not traits.keeps_q:
        emit()


@T.macro
def _issue_scores(traits, block, consumer, tiles, step):
    """Issue S = q k^T for the keys of a step."""
    stage = T.alloc_var("int32", uniform(block.k_pipeline.stage(step)))
    q_stage = T.alloc_var("int32", uniform(block.q_pipeline.stage(tiles)))
    ptx = PTX_TYPES[traits.problem.dtype]
    T.warpgroup_fence_operand(consumer.S, num_regs=traits.scores)
    T.warpgroup_arrive()
    for k in T.unroll(-(-traits.problem.head_dim * traits.element_bytes // _STEP_BYTES)):
        T.ptx_wgmma_ss(
            "float32", f"m64n{traits.config.block_N}k{_STEP_BYTES // traits.element_bytes}", True, True, ptx, ptx, "fp32",
            consumer.q_descriptor.data,
            (((q_stage * traits.panels + k // 4) * traits.config.block_M + consumer.number * WGMMA_M) * _ROW_BYTES + k % 4 * 32)
            // _UNIT,
            consumer.k_descriptor.data,
            (stage * traits.k_stage_bytes + k // 4 * traits.k_panel_bytes + k % 4 * 32) // _UNIT,
            consumer.S.data, 0, k > 0, 1, 1,
        )  # fmt: skip
    T.warpgroup_commit_batch()


@T.macro
def _issue_values(traits, block, consumer, step):
    """Issue O += P v for the values of a step."""
    stage = T.alloc_var("int32", uniform(block.v_pipeline.stage(step)))
    ptx = PTX_TYPES[traits.problem.dtype]
    T.warpgroup_fence_operand(consumer.O, num_regs=traits.outputs)
    T.warpgroup_fence_operand(consumer.P, num_regs=traits.probabilities)
    T.warpgroup_arrive()
    if traits.problem.is_fp8:
        for k in T.unroll(traits.config.block_N // 32):
            T.ptx_wgmma_rs(
                "float32", f"m64n{traits.channels}k32", True, ptx, ptx, "fp32",
                consumer.P.data, 4 * k,
                consumer.v_descriptor.data,
                (stage * traits.v_stage_bytes + k // 4 * traits.v_panel_bytes + k % 4 * 32) // _UNIT,
                consumer.O.data, 0, T.bool(True), 1, 1,
            )  # fmt: skip
    else:
        for k in T.unroll(traits.config.block_N // WGMMA_K):
            T.ptx_wgmma_rs(
                "float32", f"m64n{traits.channels}k16", False, ptx, ptx, "fp32",
                consumer.P.data, 8 * k,
                consumer.v_descriptor.data, (stage * traits.v_stage_bytes + k * WGMMA_K * _ROW_BYTES) // _UNIT,
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


def _finish(traits: _Traits, operands: Operands, block: _Block, consumer: _Consumer, tile: Tile, tiles) -> None:
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
    """Round O into shared memory, and issue its TMA store, whose end `_end_stores` waits for."""
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
        _end_stores(traits, block, consumer)


def _issue_store(traits: _Traits, operands: Operands, block: _Block, consumer: _Consumer, tile: Tile, place) -> None:
    first, query = consumer.number * WGMMA_M, tile.query + consumer.number * WGMMA_M
    for panel in range(traits.channels // PANEL):
        to = operands.out[tile.batch, query : query + WGMMA_M, tile.head, panel * PANEL : (panel + 1) * PANEL]
        T.evaluate(T.tma_copy(block.out_s[place, panel, first : first + WGMMA_M, :], to))


def _end_stores(traits: _Traits, block: _Block, consumer: _Consumer) -> None:
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


def _round_probabilities(traits: _Traits, consumer: _Consumer) -> None:
    """P = S, rounded. Of 16 bits, registers of the accumulator, two by two, are the registers of the left operand.

    Of 8 bits a register has four neighbours of a row, and a thread has two of each eight: these become neighbours in the order
    of `probabilities.key_of`, in which `sm90_transpose` leaves the keys of v.
    """
    S, P = consumer.S, consumer.P

    @T.macro
    def round_pairs():
        for e in T.unroll(traits.scores // 2):
            for i in T.vectorized(2):
                P[2 * e + i] = T.cast(S[2 * e + i], traits.problem.dtype)

    @T.macro
    def round_codes():
        for k in T.unroll(traits.config.block_N // 16):
            for r in T.unroll(2):
                P[2 * k + r] = T.call_pure_extern(
                    "uint32", "tilelang_ext_e4m3x4",
                    S[8 * k + 2 * r], S[8 * k + 2 * r + 1], S[8 * k + 4 + 2 * r], S[8 * k + 4 + 2 * r + 1],
                )  # fmt: skip

    if traits.problem.is_fp8:
        round_codes()
    else:
        round_pairs()


# --- host ------------------------------------------------------------------------------------------------------------


def takes(problem: Problem) -> bool:
    """Hopper, head_dim up to 256; of 8 bits rows of 16 bytes, and sequences of one length."""
    if problem.arch != ARCH or problem.head_dim > 256:
        return False
    return not problem.is_fp8 or (problem.head_dim % 16 == 0 and not problem.has_lengths)


def compile_kernel(problem: Problem, device) -> Callable:
    """Return the compiled kernel, and what comes before and after it, as one function."""
    config, configs = pick_config(problem), PASS_CONFIGS
    traits = _Traits(problem, config)
    attend = device.compile(attention, problem, config, pass_configs=configs)
    transpose = device.compile(sm90_transpose.transpose, problem, pass_configs=SIMPLE_CONFIGS) if problem.is_fp8 else None
    total = None
    if traits.divides:
        total = device.compile(sm90_parts.sum_parts, problem, traits.part, config.block_N, pass_configs=SIMPLE_CONFIGS)

    def run(q, k, v, sinks, cu_q, cu_k, q_scale, k_scale, v_scale, out, lse) -> None:
        if transpose is not None:
            batch, keys, kv_heads, head_dim = v.shape
            units = (keys + (KEY_UNIT - 1)) // KEY_UNIT
            transposed = device.empty(batch, kv_heads, head_dim, units, KEY_UNIT, dtype=problem.dtype)
            transpose(v, transposed)
            v = transposed.flatten(3)
        parameters = (q, k, v, sinks, cu_q, cu_k, q_scale, k_scale, v_scale, out, lse)
        if total is None:
            attend(*parameters)
            return
        parts = PARTS * problem.num_sms
        partial = device.empty(parts, *traits.part, dtype="float32")
        partial_lse = device.empty(parts, config.block_M, dtype="float32")
        attend(*parameters, partial, partial_lse)
        total(partial, partial_lse, k, sinks, out, lse)

    return run

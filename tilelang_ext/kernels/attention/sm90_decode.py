"""Attention of a few tokens over a long cache on Hopper: TMA keeps 100 to 200 KB of the cache on their way to every SM.

    S = q k^T;  m' = max(m, rows of S);  P = 2^(scale (S - m'));  l = a l + rows of P;  O = a O + P v      of each range

Takes what `split_kv` takes, but for pages that blocks of keys neither divide nor hold whole. At most eight rows are added by
`sm90_sum`, in this kernel; the sum over ranges of more is that of `split_kv`. The rows of a block are the tokens and query
heads that share a head of k and v, at most 64. Codes of 8 bits are converted by the consumers, each of which has a place for
the keys and one for the values that its MMAs read: values while S is computed.

Warp roles, of a block of 384 threads, one block per SM, or of 256, two blocks:

| warpgroup | role | registers |
| --- | --- | --- |
| 0 | producer: TMA loads of k and v | 24 |
| 1, 2 | consumers: all rows, of every other block of keys; from a head_dim of 264 on, of one half of the value columns | 240 |
| 1 | the consumer of a block of 256 threads | 232 |

Pipeline, producer role -> consumer role:

| pipeline | carries | full | empty |
| --- | --- | --- | --- |
| producer -> consumer | k and v of a block of keys | one thread, the bytes | 4 warps of each consumer that reads it |

Steady state:

    producer   acquire | TMA k, TMA v, in boxes that lie in one page | commit
    consumers  wait | S = q k^T | mask, softmax | O = a O + P v | release
    of codes   wait | convert k | issue S = q k^T | convert v, release | S is complete: mask, softmax | O = a O + P v

Consumers of different blocks of keys have different ranges. Of at most eight rows the first adds what the second has, up to 192
channels; otherwise each writes a result of its own. Where a sequence is one range, its block stores the result itself.

From `MANY` sequences and heads of k and v on, two blocks of one consumer share an SM: one begins, or ends, while the keys and
values of the other come.
"""

import functools
from dataclasses import dataclass
from typing import Any

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import DecodeOperands, DecodeProblem, DecodeResults
from tilelang_ext.kernels.attention.sm90_block import ARCH, PASS_CONFIGS, PTX_TYPES, SWIZZLE_128B, SWIZZLE_ATOM, uniform
from tilelang_ext.kernels.attention.sm90_config import WGMMA_K, WGMMA_M
from tilelang_ext.kernels.attention.sm90_decode_codes import CONVERT_SOURCE, convert
from tilelang_ext.kernels.attention.sm90_decode_load import MAX_COLUMNS, Range, produce, takes_pages
from tilelang_ext.kernels.attention.sm90_decode_rows import CONSUMERS_MEET, clear_q, load_q, merge, store
from tilelang_ext.kernels.attention.sm90_softmax import SOURCE, Softmax, alloc_softmax
from tilelang_ext.kernels.attention.sm90_sum import range_sum
from tilelang_ext.kernels.attention.tiles import PANEL, decode_and_sum_prim_func, decode_prim_func
from tilelang_ext.kernels.sm90 import pdl, split_tiles
from tilelang_ext.kernels.sm90.pipeline import Pipeline, alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, Roles, dispatch, warpgroup_sync

_ROLES = {1: Roles(1, 24, 232), 2: Roles(2, 24, 240)}
_ROW_BYTES, _UNIT = 128, 16  # of a row of shared memory; of a descriptor


@dataclass(frozen=True)
class Config:
    """Keys of a block, stages of the pipeline, consumers of one block's value columns; rows are WGMMA_M.

    The stages are a multiple of the consumers that take turns, so that one consumer has all blocks of a stage. Of another's
    block in its stage, which is loaded late, a consumer would not know: two phases look alike.
    """

    block_N: int
    num_stages: int
    halves: int
    columns: int  # value columns of a thread block, for the number of ranges
    consumers: int = 2  # of one, two blocks lie on an SM
    merges: bool = False  # whether the consumers of a block add what they have, at most eight rows
    block_M: int = WGMMA_M

    def __post_init__(self):
        assert self.num_stages % self.turns == 0

    @property
    def turns(self) -> int:
        """Consumers that take turns at the blocks of keys."""
        return self.consumers // self.halves

    @property
    def ranges(self) -> int:
        """Results of a block."""
        return 1 if self.merges else self.turns

    @property
    def parts(self) -> int:
        """Consumers of a block that store results by themselves."""
        return 1 if self.merges else self.consumers

    @property
    def blocks_per_sm(self) -> int:
        return 2 // self.consumers

    @property
    def min_blocks(self) -> int:
        """Blocks of keys of a range, with fewer of which a thread block's start costs more than it saves: 128 KB."""
        return 4 // self.halves


def pick_config(problem: DecodeProblem) -> Config:
    """Return the block of keys by head_dim: stages of 32 KB or more, as many as 227 KB of shared memory hold."""
    of_codes = [  # stages of 16 to 32 KB, beside what the consumers convert to
        (64, Config(128, 6, 1, MAX_COLUMNS)),
        (128, Config(64, 6, 1, MAX_COLUMNS)),
        (192, Config(64, 4, 1, MAX_COLUMNS)),
        (256, Config(32, 6, 1, MAX_COLUMNS)),
        (384, Config(32, 4, 2, MAX_COLUMNS)),
        (512, Config(32, 2, 2, MAX_COLUMNS)),
    ]
    many = [(64, Config(128, 3, 1, MAX_COLUMNS, 1)), (128, Config(64, 3, 1, MAX_COLUMNS, 1))] if problem.has_many else []
    merges = problem.has_few_rows
    table = [
        # (head_dim up to, config)
        *many,
        (64, Config(128, 6, 1, MAX_COLUMNS, merges=merges)),
        (128, Config(64, 6, 1, MAX_COLUMNS, merges=merges)),
        (192, Config(64, 4, 1, MAX_COLUMNS, merges=merges)),
        (256, Config(32, 6, 1, MAX_COLUMNS)),
        (384, Config(32, 3, 2, MAX_COLUMNS)),
        (512, Config(32, 2, 2, MAX_COLUMNS)),
    ]
    return next(config for most, config in (of_codes if problem.is_fp8 else table) if problem.head_dim <= most)


# --- what a kernel is made of ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Traits:
    """The host's constants of one kernel."""

    problem: DecodeProblem
    config: Config

    @property
    def roles(self) -> Roles:
        return _ROLES[self.config.consumers]

    @property
    def gives_wholes(self) -> bool:
        """Whether a block stores the results of a sequence that is one range: it has no other range to add."""
        return sums_ranges(self.problem) and self.config.ranges == 1

    @property
    def panels(self) -> int:
        """Panels of 64 channels, a multiple of the halves."""
        panels = -(-self.problem.head_dim // PANEL)
        return -(-panels // self.config.halves) * self.config.halves

    @property
    def half(self) -> int:
        """Panels of the value columns of a consumer."""
        return self.panels // self.config.halves

    @property
    def box(self) -> int:
        """Keys of one TMA load: those of a block, or of a page."""
        return self.config.block_N if not self.problem.page_size else min(self.config.block_N, self.problem.page_size)

    @property
    def panel_bytes(self) -> int:
        return self.config.block_N * _ROW_BYTES


@dataclass(frozen=True, eq=False)
class _Block:
    """What the roles of a block share."""

    q_s: Any  # (panels, 64, 64)
    k_s: Any  # (num_stages, panels, block_N, 64) as it is loaded
    v_s: Any  # the same
    k_operand_s: Any  # what MMAs read: k_s, or of codes (consumers, panels, block_N, 64) in 16 bits
    v_operand_s: Any  # the same, of the consumer's columns
    merged_s: Any  # (values, lanes) float32: what the second consumer gives to the first
    scales: Any  # of codes: k_scale and v_scale
    pipeline: Pipeline
    page_table: Any
    keys: Range
    batch: Any
    kv_head: Any
    split: Any
    thread: Any


@dataclass(frozen=True, eq=False)
class _Consumer:
    """The registers of a thread of a consumer, laid out as `sm90_softmax` describes."""

    number: int
    S: Any
    P: Any
    O: Any
    softmax: Softmax
    q_descriptor: Any
    k_descriptor: Any
    v_descriptor: Any
    thread: Any


def split_kv(problem: DecodeProblem, config: Config):
    """The prim_func of `tiles.decode_prim_func`, of few rows that of `tiles.decode_and_sum_prim_func`."""
    traits = _Traits(problem, config)
    make = decode_and_sum_prim_func if sums_ranges(problem) else decode_prim_func
    return make(problem, lambda *operands: _split_kv(traits, *operands))


@T.macro
def _split_kv(traits, operands, seqlens, page_table, results):
    row_tiles = T.ceildiv(operands.q.shape[1] * T.truncdiv(operands.q.shape[2], operands.cache_k.shape[2]), WGMMA_M)
    kv_heads = operands.cache_k.shape[2]
    splits = _splits(traits, results)
    with T.Kernel(splits, kv_heads * row_tiles, operands.q.shape[0], threads=traits.roles.threads) as (split, by, batch):
        T.annotate_min_blocks_per_sm(traits.config.blocks_per_sm)
        T.import_source(
            SOURCE
            + (CONVERT_SOURCE if traits.problem.is_fp8 else "")
            + (split_tiles.SOURCE if sums_ranges(traits.problem) else "")
        )
        q_s = T.alloc_shared((traits.panels, WGMMA_M, PANEL), traits.problem.dtype)
        k_s = T.alloc_shared(
            (traits.config.num_stages, traits.panels, traits.config.block_N, PANEL), traits.problem.cache_dtype
        )
        v_s = T.alloc_shared(
            (traits.config.num_stages, traits.panels, traits.config.block_N, PANEL), traits.problem.cache_dtype
        )
        k_operand_s, v_operand_s = _alloc_operands(traits, k_s, v_s)
        T.annotate_layout({buffer: make_swizzled_layout(buffer) for buffer in (q_s, k_operand_s, v_operand_s)})
        merged_s = T.alloc_shared((traits.half * PANEL // 4 + 2, WARP), "float32") if traits.config.merges else None
        pipeline = alloc_pipeline(traits.config.num_stages, 1, 4 * traits.config.halves)
        thread = T.get_thread_binding()
        group = T.alloc_var("int32", T.truncdiv(operands.q.shape[2], kv_heads))
        row, kv_head = T.int32(0), by
        if not traits.problem.has_few_rows:
            row, kv_head = T.alloc_var("int32", T.truncdiv(by, kv_heads) * WGMMA_M), T.truncmod(by, kv_heads)
        clear_q(traits, q_s, thread)
        T.fence_proxy_async()
        T.sync_threads()
        pdl.wait()
        # Ahead of all loads of keys and values, behind which those of q would wait for several us.
        if thread >= WARPGROUP:
            load_q(traits, operands, q_s, batch, kv_head, row, group, thread - WARPGROUP)
        length = T.alloc_var("int32", seqlens[batch])
        first = T.alloc_var("int32", 0)
        if traits.problem.window:
            position = length - operands.q.shape[1] + T.truncdiv(row, group)
            first = T.truncdiv(T.max(position - traits.problem.window + 1, 0), traits.config.block_N)
        blocks = T.alloc_var("int32", T.max(T.ceildiv(length, traits.config.block_N) - first, 0))
        begin = T.alloc_var("int32", T.truncdiv(split * blocks, splits))
        num_blocks = T.alloc_var("int32", T.truncdiv((split + 1) * blocks, splits) - begin)
        keys = Range(traits.problem, length, operands.q.shape[1], group, row, first + begin, num_blocks)
        _dispatch_roles(
            traits,
            operands,
            results,
            _Block(
                q_s, k_s, v_s, k_operand_s, v_operand_s, merged_s, (operands.k_scale, operands.v_scale), pipeline, page_table,
                keys, batch, kv_head, split, thread,
            ),
        )  # fmt: skip


def _splits(traits: _Traits, results: DecodeResults):
    """Return the blocks of a head."""
    if sums_ranges(traits.problem):
        return results.given.shape[2]
    return T.truncdiv(results.partial.shape[0], traits.config.ranges)


def _alloc_operands(traits: _Traits, k_s, v_s) -> tuple:
    """Return what MMAs read: the stages, or where codes of 8 bits are converted to."""
    if not traits.problem.is_fp8:
        return k_s, v_s
    panels = traits.panels, traits.half
    return tuple(
        T.alloc_shared((traits.config.consumers, n, traits.config.block_N, PANEL), traits.problem.dtype) for n in panels
    )


def _dispatch_roles(traits: _Traits, operands: DecodeOperands, results: DecodeResults, block: _Block) -> None:
    dispatch(
        block.thread,
        (WARPGROUP, functools.partial(produce, traits, operands, block)),
        (traits.roles.consumer_threads, functools.partial(_consume_all, traits, operands, results, block)),
    )


# --- consumers -------------------------------------------------------------------------------------------------------


@T.macro
def _consume_all(traits, operands, results, block):
    """Compute the ranges of the consumers, and add those of the head where this block is to add."""
    traits.roles.begin_consumer()
    _dispatch_consumers(traits, operands, results, block)
    if sums_ranges(traits.problem) and (not traits.gives_wholes or results.given.shape[2] > 1):
        range_sum(traits, operands, results, block, CONSUMERS_MEET).add(block.thread - WARPGROUP)


def _dispatch_consumers(traits: _Traits, operands: DecodeOperands, results: DecodeResults, block: _Block) -> None:
    consumers = (
        functools.partial(_consume, traits, operands, results, block, number) for number in range(traits.config.consumers)
    )
    dispatch(block.thread - WARPGROUP, *((WARPGROUP, consumer) for consumer in consumers))


@T.macro
def _consume(traits, operands, results, block, number):
    """Compute the consumer's range, or its half of the columns."""
    consumer, consumers = _alloc_consumer(traits, block, number), traits.config.consumers
    consumer.softmax.start()
    for i in T.unroll(traits.half * PANEL // 2):
        consumer.O[i] = T.float32(0)
    if traits.config.halves == 1:
        for i in T.serial(T.truncdiv(block.keys.num_blocks + consumers - 1 - number, consumers)):
            _attend(traits, block, consumer, i * consumers + number)
    else:
        for i in T.serial(block.keys.num_blocks):
            _attend(traits, block, consumer, i)
    # Not earlier: the blocks of the sum would all go to the few SMs that have none of this kernel's.
    pdl.trigger()
    if traits.config.merges:
        merge(traits, block, consumer)
    if traits.config.merges and number > 0:
        pass
    elif traits.gives_wholes:
        if results.given.shape[2] == 1:
            store(traits, operands, results, block, consumer, True)
        else:
            _store_range(traits, operands, results, block, consumer)
    else:
        _store_range(traits, operands, results, block, consumer)


@T.macro
def _store_range(traits, operands, results, block, consumer):
    store(traits, operands, results, block, consumer, False)
    if sums_ranges(traits.problem) and consumer.thread < WARP:  # which has stored all eight rows
        T.sync_warp()
        if consumer.thread == 0:
            range_sum(traits, operands, results, block, CONSUMERS_MEET).give(consumer.number)


def _alloc_consumer(traits: _Traits, block: _Block, number: int) -> _Consumer:
    block_N, v_leading = traits.config.block_N, traits.panel_bytes // _UNIT

    @T.macro
    def alloc():
        S = T.alloc_local((block_N // 2,), "float32")
        P = T.alloc_local((block_N // 2,), traits.problem.dtype)
        O = T.alloc_local((traits.half * PANEL // 2,), "float32")
        q_descriptor, k_descriptor, v_descriptor = T.alloc_wgmma_desc(), T.alloc_wgmma_desc(), T.alloc_wgmma_desc()
        T.initialize_wgmma_descriptor(q_descriptor, block.q_s.access_ptr("r"), SWIZZLE_128B, 1, SWIZZLE_ATOM)
        T.initialize_wgmma_descriptor(k_descriptor, block.k_operand_s.access_ptr("r"), SWIZZLE_128B, 1, SWIZZLE_ATOM)
        T.initialize_wgmma_descriptor(v_descriptor, block.v_operand_s.access_ptr("r"), SWIZZLE_128B, v_leading, SWIZZLE_ATOM)
        return S, P, O, q_descriptor, k_descriptor, v_descriptor

    @T.macro
    def alloc_scale():
        return T.alloc_var("float32", block.scales[0][block.kv_head] * T.float32(traits.problem.scale_log2))

    thread = block.thread % WARPGROUP
    lane = thread % WARP
    scale = alloc_scale() if traits.problem.scales == "head" else None
    softmax = alloc_softmax(traits.problem, thread // WARP * 16 + lane // 4, lane % 4 * 2, scale)
    S, P, O, *descriptors = alloc()
    return _Consumer(number, S, P, O, softmax, *descriptors, thread)


@T.macro
def _attend(traits, block, consumer, step):
    """Add the block of keys of a step."""
    stage = T.alloc_var("int32", uniform(block.pipeline.stage(step)))
    key = (block.keys.first_block + step) * traits.config.block_N
    block.pipeline.wait(block.pipeline.stage(step), block.pipeline.full_phase(step))
    _compute_scores(traits, block, consumer, stage, key)
    v_scale = _scale_of_page(traits, block, consumer, key)
    consumer.softmax.hide(consumer.S, block.keys, key, (0, WGMMA_M - 1), traits.config.block_N)
    consumer.softmax.update(consumer.S, traits.config.block_N)
    consumer.softmax.exponentiate(consumer.S, 0, traits.config.block_N // 8)
    for e in T.unroll(traits.config.block_N // 4):
        for i in T.vectorized(2):
            consumer.P[2 * e + i] = T.cast(consumer.S[2 * e + i] * v_scale, traits.problem.dtype)
    for e in T.unroll(traits.half * PANEL // 2):
        consumer.O[e] = consumer.O[e] * consumer.softmax.factor[e // 2 % 2]
    _add_values(traits, block, consumer, stage, key)
    if not traits.problem.is_fp8:
        block.pipeline.release(block.pipeline.stage(step), consumer.thread % WARP)


def _compute_scores(traits: _Traits, block: _Block, consumer: _Consumer, stage, key) -> None:
    """S = q k^T; codes of the values are converted meanwhile, after which the stage is released."""
    if not traits.problem.is_fp8:
        _issue_keys(traits, consumer, stage)
        _complete_keys(traits, consumer)
        return
    number, half = consumer.number, consumer.number * traits.half if traits.config.halves > 1 else 0

    @T.macro
    def emit():
        convert(traits, block.k_s, block.k_operand_s, consumer, stage, 0, traits.panels, traits.config.block_N)
        T.fence_proxy_async()
        warpgroup_sync(number)
        _issue_keys(traits, consumer, number)
        convert(traits, block.v_s, block.v_operand_s, consumer, stage, half, traits.half, block.keys.length - key)
        T.fence_proxy_async()
        T.sync_warp()
        block.pipeline.release(stage, consumer.thread % WARP)
        _complete_keys(traits, consumer)

    emit()


def _add_values(traits: _Traits, block: _Block, consumer: _Consumer, stage, key) -> None:
    """O += P v, of the consumer's columns."""
    if traits.problem.is_fp8:
        warpgroup_sync(consumer.number)  # all of v is converted
        _multiply_values(traits, consumer, consumer.number * traits.half)
    else:
        half = consumer.number * traits.half if traits.config.halves > 1 else 0
        _clear_values(traits, block, consumer, stage, block.keys.length - key)
        _multiply_values(traits, consumer, stage * traits.panels + half)


def _scale_of_page(traits: _Traits, block: _Block, consumer: _Consumer, key):
    """Multiply S by the scale of a page's keys, and return that of its values; 1 where pages have none."""
    if traits.problem.scales != "page":
        return T.float32(1)

    @T.macro
    def emit():
        page = block.page_table[block.batch, T.min(T.truncdiv(key, traits.problem.page_size), block.page_table.shape[1] - 1)]
        k_scale = T.alloc_var("float32", block.scales[0][page, block.kv_head])
        v_scale = T.alloc_var("float32", block.scales[1][page, block.kv_head])
        for e in T.unroll(traits.config.block_N // 2):
            consumer.S[e] = consumer.S[e] * k_scale
        return v_scale

    return emit()


@T.macro
def _issue_keys(traits, consumer, stage):
    """Issue S = q k^T."""
    ptx = PTX_TYPES[traits.problem.dtype]
    T.warpgroup_fence_operand(consumer.S, num_regs=traits.config.block_N // 2)
    T.warpgroup_arrive()
    for k in T.unroll(traits.panels * PANEL // WGMMA_K):
        T.ptx_wgmma_ss(
            "float32", f"m64n{traits.config.block_N}k16", True, True, ptx, ptx, "fp32",
            consumer.q_descriptor.data, (k // 4 * WGMMA_M * _ROW_BYTES + k % 4 * 32) // _UNIT,
            consumer.k_descriptor.data, ((stage * traits.panels + k // 4) * traits.panel_bytes + k % 4 * 32) // _UNIT,
            consumer.S.data, 0, k > 0, 1, 1,
        )  # fmt: skip
    T.warpgroup_commit_batch()


@T.macro
def _complete_keys(traits, consumer):
    T.wait_wgmma(0)
    T.warpgroup_fence_operand(consumer.S, num_regs=traits.config.block_N // 2)


@T.macro
def _multiply_values(traits, consumer, panel):
    """O += P v, whose panels begin at `panel` of all that the buffer has."""
    ptx = PTX_TYPES[traits.problem.dtype]
    T.warpgroup_fence_operand(consumer.O, num_regs=traits.half * PANEL // 2)
    T.warpgroup_fence_operand(consumer.P, num_regs=traits.config.block_N // 4)
    T.warpgroup_arrive()
    for k in T.unroll(traits.config.block_N // WGMMA_K):
        T.ptx_wgmma_rs(
            "float32", f"m64n{traits.half * PANEL}k16", False, ptx, ptx, "fp32",
            consumer.P.data, 8 * k,
            consumer.v_descriptor.data,
            (panel * traits.panel_bytes + k * WGMMA_K * _ROW_BYTES) // _UNIT,
            consumer.O.data, 0, T.bool(True), 1, 1,
        )  # fmt: skip
    T.warpgroup_commit_batch()
    T.wait_wgmma(0)
    T.warpgroup_fence_operand(consumer.O, num_regs=traits.half * PANEL // 2)


@T.macro
def _clear_values(traits, block, consumer, stage, rows):
    """Clear the consumer's values past the end of the sequence: 0 times what a cache may hold there could be NaN."""
    half = consumer.number * traits.half if traits.config.halves > 1 else 0
    if rows < traits.config.block_N:
        for turn in T.serial(traits.half * traits.config.block_N * 8 // WARPGROUP):
            piece = turn * WARPGROUP + consumer.thread
            row = piece // 8 % traits.config.block_N
            if row >= rows:
                for e in T.vectorized(8):
                    block.v_s[stage, half + piece // (8 * traits.config.block_N), row, piece % 8 * 8 + e] = T.cast(
                        0, traits.problem.dtype
                    )
        T.fence_proxy_async()
        warpgroup_sync(consumer.number)


# --- host ------------------------------------------------------------------------------------------------------------


def takes(problem: DecodeProblem) -> bool:
    """Hopper, pages whose boxes are whole patterns of the swizzle; of 8 bits rows of 16 bytes, and blocks of one scale."""
    if problem.arch != ARCH or (problem.is_fp8 and problem.head_dim % 16):
        return False
    page_size, block_N = problem.page_size, pick_config(problem).block_N
    if problem.scales == "page":
        return page_size % block_N == 0
    return takes_pages(page_size, block_N)


def sums_ranges(problem: DecodeProblem) -> bool:
    """Return whether the kernel also adds the ranges."""
    return problem.has_few_rows


def pass_configs(_: DecodeProblem) -> dict:
    return PASS_CONFIGS

"""Attention of up to eight rows over a long cache of 8-bit codes on Hopper, by the MMA of a warp.

    S^T = k q^T;  m' = max(m, columns of S^T);  P^T = 2^(scale (S^T - m'));  l = a l + columns of P^T;  O^T = a O^T + v^T P^T

Takes what `sm90_decode` takes, of caches of float8_e4m3fn, where the tokens and query heads that share a head of k and v are at
most eight: they are the columns of the MMA, and codes are its left operand. A lane loads the codes that it holds in that
operand, and converts two by one instruction to float16, which holds every code: nothing goes back to shared memory, and no warp
waits for another. q is multiplied by a power of two per row, so that float16 holds it as bfloat16 did.

With lane = 4 g + t, an MMA's left operand has rows g and g + 8 and of its 16 columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 (PTX ISA
9.7.14, mma.m16n8k16). Which channel is which column of k q^T, or which row of v^T P^T, is free:

| operand | a lane's codes |
| --- | --- |
| k | keys g and g + 8: 16 channels, four for each of four MMAs |
| v | keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: 16 channels, rows g and g + 8 of eight MMAs |

Warp roles, of a block of 384 threads, or from a head_dim of 264 on 256; one block per SM:

| warps | role | registers |
| --- | --- | --- |
| 0 to 3 | producer: TMA loads of k and v, by one warp | 24 |
| others | consumers: each of its own blocks of keys, one after another | 240 |

Pipeline, producer role -> consumer role:

| pipeline | carries | full | empty |
| --- | --- | --- | --- |
| producer -> consumer | k and v of a block of keys | one thread, the bytes | the warp that reads it |

Steady state:

    producer   acquire | TMA k, TMA v, in boxes that lie in one page | commit
    consumers  wait | load, convert k: S^T = k q^T | mask, softmax | load, convert v: O^T = a O^T + v^T P^T | release
               at the end: maxima to shared memory | barrier | O^T to shared memory | barrier | sums of all warps, store

Floor on an H200: the bytes of the cache at 4.25e12 bytes/s. That is 18 codes per SM and clock, or nine conversions, of which an
SM was seen to do 34 to 54.
"""

import functools

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import LOG2_E, DecodeOperands, DecodeProblem, DecodeResults
from tilelang_ext.kernels.attention.sm90_block import ARCH, PASS_CONFIGS
from tilelang_ext.kernels.attention.sm90_decode_load import Range, produce, takes_pages
from tilelang_ext.kernels.attention.sm90_decode_mma_attend import CODES_SOURCE, attend, fetch_q, scale_q
from tilelang_ext.kernels.attention.sm90_decode_mma_block import CONSUMERS_MEET, NOTHING, ROWS, Block, Config, Consumer, Traits
from tilelang_ext.kernels.attention.sm90_softmax import SOURCE, exp2, log2
from tilelang_ext.kernels.attention.sm90_sum import range_sum
from tilelang_ext.kernels.attention.tiles import decode_and_sum_prim_func
from tilelang_ext.kernels.sm90 import pdl, split_tiles
from tilelang_ext.kernels.sm90.pipeline import alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, dispatch


def pick_config(problem: DecodeProblem) -> Config:
    """Return the block of keys by head_dim: stages of 8 to 16 KB, as many as fit beside O of all warps."""
    table = [
        # (head_dim up to, config)
        (64, Config(64, 24, 8)),
        (128, Config(32, 24, 8)),
        (256, Config(16, 16, 8)),
        (384, Config(16, 12, 4)),
        (512, Config(16, 8, 4)),
    ]
    return next(config for most, config in table if problem.head_dim <= most)


def split_kv(problem: DecodeProblem, config: Config):
    """The prim_func of `tiles.decode_and_sum_prim_func`."""
    traits = Traits(problem, config)
    return decode_and_sum_prim_func(problem, lambda *operands: _split_kv(traits, *operands))


@T.macro
def _split_kv(traits, operands, seqlens, page_table, results):
    kv_heads = operands.cache_k.shape[2]
    splits = results.given.shape[2]
    with T.Kernel(splits, kv_heads, operands.q.shape[0], threads=traits.roles.threads) as (split, kv_head, batch):
        T.import_source(SOURCE + CODES_SOURCE + split_tiles.SOURCE)
        stages = traits.config.num_stages, traits.panels, traits.config.block_N, traits.width
        k_s = T.alloc_shared(stages, traits.problem.cache_dtype)
        v_s = T.alloc_shared(stages, traits.problem.cache_dtype)
        O_s = T.alloc_shared((traits.config.warps, ROWS, traits.channels), "float32")
        peak_s = T.alloc_shared((traits.config.warps, ROWS), "float32")
        total_s = T.alloc_shared((traits.config.warps, ROWS), "float32")
        T.annotate_layout({k_s: make_swizzled_layout(k_s), v_s: make_swizzled_layout(v_s)})
        pipeline = alloc_pipeline(traits.config.num_stages, 1, 1)
        thread = T.get_thread_binding()
        group = T.alloc_var("int32", T.truncdiv(operands.q.shape[2], kv_heads))
        pdl.wait()
        # Ahead of all loads of keys and values, behind which those of q would wait for several us.
        q = fetch_q(traits, operands, batch, kv_head, group, thread)
        length = T.alloc_var("int32", seqlens[batch])
        first = T.alloc_var("int32", 0)
        if traits.problem.window:
            position = length - operands.q.shape[1]
            first = T.truncdiv(T.max(position - traits.problem.window + 1, 0), traits.config.block_N)
        blocks = T.alloc_var("int32", T.max(T.ceildiv(length, traits.config.block_N) - first, 0))
        begin = T.alloc_var("int32", T.truncdiv(split * blocks, splits))
        num_blocks = T.alloc_var("int32", T.truncdiv((split + 1) * blocks, splits) - begin)
        keys = Range(traits.problem, length, operands.q.shape[1], group, 0, first + begin, num_blocks)
        _dispatch_roles(
            traits,
            operands,
            results,
            Block(
                k_s, v_s, O_s, q, peak_s, total_s, (operands.k_scale, operands.v_scale), pipeline, page_table, keys, batch,
                kv_head, split, thread,
            ),
        )  # fmt: skip


def _dispatch_roles(traits: Traits, operands: DecodeOperands, results: DecodeResults, block: Block) -> None:
    dispatch(
        block.thread,
        (WARPGROUP, functools.partial(produce, traits, operands, block)),
        (traits.roles.consumer_threads, functools.partial(_consume, traits, operands, results, block)),
    )


@T.macro
def _consume(traits, operands, results, block):
    """Compute the warp's blocks of the range, and what all warps have of it."""
    traits.roles.begin_consumer()
    consumer = _alloc_consumer(traits, block)
    scale_q(traits, block, consumer)
    for r in T.unroll(2):
        consumer.maximum[r] = NOTHING
        consumer.total[r] = T.float32(0)
    for i in T.unroll(traits.channels // 4):
        consumer.O[i] = T.float32(0)
    warps = traits.config.warps
    for i in T.serial(T.truncdiv(block.keys.num_blocks + warps - 1 - consumer.warp, warps)):
        attend(traits, block, consumer, i * warps + consumer.warp)
    pdl.trigger()
    _store(traits, operands, results, block, consumer)
    if results.given.shape[2] > 1:
        ranges = range_sum(traits, operands, results, block, CONSUMERS_MEET)
        T.sync_threads(barrier_id=CONSUMERS_MEET, arrive_count=ranges.threads)
        if block.thread == WARPGROUP:
            ranges.give(0)
        ranges.add(block.thread - WARPGROUP)


def _alloc_consumer(traits: Traits, block: Block) -> Consumer:
    @T.macro
    def alloc():
        Q, S = T.alloc_local((traits.channels // 8,), "uint32"), T.alloc_local((traits.tiles * 4,), "float32")
        P, O = T.alloc_local((traits.tiles * 2,), "uint32"), T.alloc_local((traits.channels // 4,), "float32")
        A = T.alloc_local((4,), "uint32")
        maximum, shift = T.alloc_local((2,), "float32"), T.alloc_local((2,), "float32")
        total, factor = T.alloc_local((2,), "float32"), T.alloc_local((2,), "float32")
        scale = T.alloc_local((2,), "float32")
        return Q, S, P, O, A, maximum, shift, total, factor, scale

    lane = block.thread % WARP
    return Consumer(*alloc(), block.thread // WARP - WARPGROUP // WARP, lane // 4, lane % 4, lane)


@T.macro
def _store(traits, operands, results, block, consumer):
    """Store O divided by the sums, and their logarithms, of all warps: of a range, or of all keys where they are one range."""
    is_whole = results.given.shape[2] == 1
    warps, channels, threads = traits.config.warps, traits.channels, traits.roles.consumer_threads
    group = block.keys.group
    for r in T.unroll(2):
        total = T.alloc_var("float32", consumer.total[r])
        total = total + T.shfl_xor(total, 4)
        total = total + T.shfl_xor(total, 8)
        total = total + T.shfl_xor(total, 16)
        if consumer.g == 0:
            block.peak_s[consumer.warp, 2 * consumer.t + r] = T.if_then_else(
                total > T.float32(0), consumer.maximum[r] * consumer.scale[r], T.float32(-1e30)
            )
            block.total_s[consumer.warp, 2 * consumer.t + r] = total
    T.sync_threads(barrier_id=CONSUMERS_MEET, arrive_count=threads)
    for r in T.unroll(2):
        own = T.alloc_var("float32", block.peak_s[consumer.warp, 2 * consumer.t + r])
        peak = T.alloc_var("float32", own)
        for w in T.unroll(warps):
            peak = T.max(peak, block.peak_s[w, 2 * consumer.t + r])
        consumer.factor[r] = exp2(own - peak)
    for i in T.unroll(channels // 16):
        for r in T.unroll(2):
            for e in T.vectorized(2):
                block.O_s[
                    consumer.warp,
                    2 * consumer.t + r,
                    i // (2 * traits.words) * traits.width + consumer.g * 4 * traits.words + i % (2 * traits.words) * 2 + e,
                ] = consumer.O[4 * i + 2 * e + r] * consumer.factor[r]
    T.sync_threads(barrier_id=CONSUMERS_MEET, arrive_count=threads)
    for turn in T.unroll(ROWS * channels // threads):
        element = turn * threads + block.thread - WARPGROUP
        row, channel = element // channels, element % channels
        if (row < operands.q.shape[1] * group) and (channel < traits.problem.head_dim):
            token = T.alloc_var("int32", T.truncdiv(row, group))
            head = T.alloc_var("int32", (block.kv_head - token) * group + row)
            peak = T.alloc_var("float32", block.peak_s[0, row])
            for w in T.unroll(warps):
                peak = T.max(peak, block.peak_s[w, row])
            total = T.alloc_var("float32", 0.0)
            value = T.alloc_var("float32", 0.0)
            for w in T.unroll(warps):
                total = total + block.total_s[w, row] * exp2(block.peak_s[w, row] - peak)
                value = value + block.O_s[w, row, channel]
            part = T.alloc_var("float32", 1.0)
            if traits.problem.has_sinks and is_whole:
                sink = T.alloc_var("float32", results.sinks[head] * T.float32(LOG2_E))
                common = T.alloc_var("float32", T.max(peak, sink))
                part = exp2(peak - common)
                total = total * part + exp2(sink - common)
                peak = common
            inverse = T.alloc_var("float32", T.if_then_else(total > T.float32(0), part / total, T.float32(0)))
            if traits.problem.scales == "head":
                inverse = inverse * block.scales[1][block.kv_head]
            logarithm = T.alloc_var("float32", T.if_then_else(total > T.float32(0), peak + log2(total), NOTHING))
            if is_whole:
                results.out[block.batch, token, head, channel] = T.cast(value * inverse, traits.problem.dtype)
                if channel == 0:
                    results.lse[block.batch, head, token] = logarithm * T.float32(1 / LOG2_E)
            else:
                results.partial[block.split, block.batch, token, head, channel] = value * inverse
                if channel == 0:
                    results.partial_lse[block.split, block.batch, head, token] = logarithm


def takes(problem: DecodeProblem) -> bool:
    """Hopper, codes of 8 bits with rows of 16 bytes, eight rows, no scales per page, and pages of whole boxes."""
    if (
        problem.arch != ARCH
        or not problem.is_fp8
        or problem.head_dim % 16
        or not problem.has_few_rows
        or problem.scales == "page"
    ):
        return False
    return takes_pages(problem.page_size, pick_config(problem).block_N)


def sums_ranges(_: DecodeProblem) -> bool:
    """Return whether the kernel also adds the ranges."""
    return True


def pass_configs(_: DecodeProblem) -> dict:
    return PASS_CONFIGS

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
from dataclasses import dataclass
from typing import Any

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import LOG2_E, DecodeOperands, DecodeProblem, DecodeResults
from tilelang_ext.kernels.attention.sm90_block import ARCH, PASS_CONFIGS
from tilelang_ext.kernels.attention.sm90_decode_load import MAX_COLUMNS, Range, produce, takes_pages
from tilelang_ext.kernels.attention.sm90_softmax import SOURCE, exp2, log2
from tilelang_ext.kernels.attention.sm90_sum import range_sum
from tilelang_ext.kernels.attention.tiles import decode_and_sum_prim_func
from tilelang_ext.kernels.sm90 import pdl, split_tiles
from tilelang_ext.kernels.sm90.pipeline import Pipeline, alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, Roles, dispatch

ROWS = 8  # columns of an MMA
_KEYS, _MMA_K = 16, 16  # of an MMA of k q^T
_PIECE = 16  # codes of one load of a lane, four words
_WORDS = 4
_CONSUMERS_MEET = 8  # number of a named barrier
_NOTHING = -T.infinity("float32")
_SLACK = 8  # of the exponents of 2

CODES_SOURCE = r"""
__device__ __forceinline__ unsigned tilelang_ext_low_codes(unsigned word) {
  unsigned values;
  asm("{.reg .b16 low, high;\n"
      "mov.b32 {low, high}, %1;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;}" : "=r"(values) : "r"(word));
  return values;
}
__device__ __forceinline__ unsigned tilelang_ext_high_codes(unsigned word) {
  unsigned values;
  asm("{.reg .b16 low, high;\n"
      "mov.b32 {low, high}, %1;\n"
      "cvt.rn.f16x2.e4m3x2 %0, high;}" : "=r"(values) : "r"(word));
  return values;
}
__device__ __forceinline__ unsigned tilelang_ext_pack_f16(float x, float y) {
  unsigned values;
  asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(values) : "f"(x), "f"(y));
  return values;
}
__device__ __forceinline__ unsigned tilelang_ext_transpose(unsigned pair) {
  unsigned transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}
"""


@dataclass(frozen=True)
class Config:
    """Keys of a block, stages of the pipeline, and consumer warps.

    The stages are a multiple of the warps, so that one warp has all blocks of a stage. Of another warp's block in its stage,
    which is loaded late, a warp would not know: two phases look alike.
    """

    block_N: int
    num_stages: int
    warps: int
    columns: int = MAX_COLUMNS  # value columns of a thread block, for the number of ranges
    block_M: int = ROWS
    ranges: int = 1
    parts: int = 1
    blocks_per_sm: int = 1
    min_blocks: int = 4  # of keys in a range

    def __post_init__(self):
        assert self.num_stages % self.warps == 0


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


def panel_width(problem: DecodeProblem) -> int:
    """Return the channels of a panel, which is one TMA load."""
    return 64 if problem.head_dim <= 64 else 128


# --- what a kernel is made of ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Traits:
    """The host's constants of one kernel."""

    problem: DecodeProblem
    config: Config

    @property
    def roles(self) -> Roles:
        return Roles(self.config.warps * WARP // WARPGROUP, 24, 240)

    @property
    def width(self) -> int:
        return panel_width(self.problem)

    @property
    def panels(self) -> int:
        return -(-self.problem.head_dim // self.width)

    @property
    def channels(self) -> int:
        """Channels with those past head_dim, which are zeros."""
        return self.panels * self.width

    @property
    def pieces(self) -> int:
        """Loads of a lane for a key of k."""
        return self.channels // (4 * _PIECE)

    @property
    def words(self) -> int:
        """Words of a lane's channels of v in a panel."""
        return self.width // 32

    @property
    def tiles(self) -> int:
        """MMAs beside each other for all keys of a block."""
        return self.config.block_N // _KEYS

    @property
    def box(self) -> int:
        """Keys of one TMA load: those of a block, or of a page."""
        return self.config.block_N if not self.problem.page_size else min(self.config.block_N, self.problem.page_size)


@dataclass(frozen=True, eq=False)
class _Block:
    """What the roles of a block share."""

    k_s: Any  # (num_stages, panels, block_N, width) codes
    v_s: Any  # the same
    O_s: Any  # (warps, ROWS, channels) float32
    q: Any  # registers of a lane: row g of q
    peak_s: Any  # (warps, ROWS) float32: of exponents of 2
    total_s: Any  # the same
    scales: Any  # k_scale and v_scale
    pipeline: Pipeline
    page_table: Any
    keys: Range
    batch: Any
    kv_head: Any
    split: Any
    thread: Any


@dataclass(frozen=True, eq=False)
class _Consumer:
    """The registers of a lane; of two, for columns 2 t and 2 t + 1 of the MMA."""

    Q: Any  # uint32 (channels / 8,): the right operand of k q^T
    S: Any  # float32 (tiles * 4,): keys g and g + 8 of a tile, in each columns 2 t and 2 t + 1
    P: Any  # uint32 (tiles * 2,): the right operand of v^T P^T
    O: Any  # float32 (channels / 4,)
    A: Any  # uint32 (4,): a left operand
    maximum: Any  # float32 (2,), of k . q
    shift: Any  # the maximum times the scale; 0 while no key was seen
    total: Any  # of this lane's keys
    factor: Any
    scale: Any  # of k . q, in the units of exponents of 2
    warp: Any
    g: Any
    t: Any
    lane: Any


def split_kv(problem: DecodeProblem, config: Config):
    """The prim_func of `tiles.decode_and_sum_prim_func`."""
    traits = _Traits(problem, config)
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
        q = _fetch_q(traits, operands, batch, kv_head, group, thread)
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
            _Block(
                k_s, v_s, O_s, q, peak_s, total_s, (operands.k_scale, operands.v_scale), pipeline, page_table, keys, batch,
                kv_head, split, thread,
            ),
        )  # fmt: skip


def _dispatch_roles(traits: _Traits, operands: DecodeOperands, results: DecodeResults, block: _Block) -> None:
    dispatch(
        block.thread,
        (WARPGROUP, functools.partial(produce, traits, operands, block)),
        (traits.roles.consumer_threads, functools.partial(_consume, traits, operands, results, block)),
    )


# --- consumers -------------------------------------------------------------------------------------------------------


@T.macro
def _consume(traits, operands, results, block):
    """Compute the warp's blocks of the range, and what all warps have of it."""
    traits.roles.begin_consumer()
    consumer = _alloc_consumer(traits, block)
    _scale_q(traits, block, consumer)
    for r in T.unroll(2):
        consumer.maximum[r] = _NOTHING
        consumer.total[r] = T.float32(0)
    for i in T.unroll(traits.channels // 4):
        consumer.O[i] = T.float32(0)
    warps = traits.config.warps
    for i in T.serial(T.truncdiv(block.keys.num_blocks + warps - 1 - consumer.warp, warps)):
        _attend(traits, block, consumer, i * warps + consumer.warp)
    pdl.trigger()
    _store(traits, operands, results, block, consumer)
    if results.given.shape[2] > 1:
        ranges = range_sum(traits, operands, results, block, _CONSUMERS_MEET)
        T.sync_threads(barrier_id=_CONSUMERS_MEET, arrive_count=ranges.threads)
        if block.thread == WARPGROUP:
            ranges.give(0)
        ranges.add(block.thread - WARPGROUP)


def _alloc_consumer(traits: _Traits, block: _Block) -> _Consumer:
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
    return _Consumer(*alloc(), block.thread // WARP - WARPGROUP // WARP, lane // 4, lane % 4, lane)


def _first_channel(traits: _Traits, piece: int, t):
    """Return the first channel of a lane's piece of k and q: of a panel of 128 its pieces lie side by side."""
    return t * _PIECE if traits.width == 64 else piece // 2 * traits.width + (2 * t + piece % 2) * _PIECE


def _fetch_q(traits: _Traits, operands: DecodeOperands, batch, kv_head, group, thread):
    """Begin to load row g of q, and return it; rows and channels past the end are 0."""
    D, lane = traits.problem.head_dim, thread % WARP
    g, t = lane // 4, lane % 4

    @T.macro
    def load(values, piece, channel, is_row, token, head):
        for e in T.unroll(_PIECE // 8):
            for i in T.vectorized(8):
                values[piece * _PIECE + e * 8 + i] = T.cast(0, traits.problem.dtype)
            if is_row and (channel + e * 8 < D):
                for i in T.vectorized(8):
                    values[piece * _PIECE + e * 8 + i] = operands.q[batch, token, head, channel + e * 8 + i]

    def load_all(values, *row):
        for piece in range(traits.pieces):
            load(values, piece, _first_channel(traits, piece, t), *row)

    @T.macro
    def emit():
        values = T.alloc_local((traits.pieces * _PIECE,), traits.problem.dtype)
        token = T.alloc_var("int32", T.truncdiv(g, group))
        load_all(values, g < operands.q.shape[1] * group, token, (kv_head - token) * group + g)
        return values

    return emit()


def _scale_q(traits: _Traits, block: _Block, consumer: _Consumer) -> None:
    """Make the right operand of row g of q, times the power of two that brings its largest element near 1."""
    Q, t, values = consumer.Q, consumer.t, block.q

    @T.macro
    def emit():
        largest = T.alloc_var("float32", 0.0)
        for i in T.unroll(traits.pieces * _PIECE):
            largest = T.max(largest, T.abs(T.cast(values[i], "float32")))
        largest = T.max(largest, T.shfl_xor(largest, 1))
        largest = T.max(largest, T.shfl_xor(largest, 2))
        power = T.alloc_var("int32", T.reinterpret(largest, "int32") >> 23)  # the exponent's bits
        power = T.min(T.max(power, 1), 252)
        inverse = T.alloc_var("float32", T.reinterpret((T.int32(253) - power) << 23, "float32"))
        for i in T.unroll(traits.pieces * _PIECE // 2):
            Q[i] = T.call_pure_extern(
                "uint32",
                "tilelang_ext_pack_f16",
                T.cast(values[2 * i], "float32") * inverse,
                T.cast(values[2 * i + 1], "float32") * inverse,
            )
        back = T.alloc_var("float32", T.reinterpret((power + 1) << 23, "float32") * T.float32(traits.problem.scale_log2))
        if traits.problem.scales == "head":
            back = back * block.scales[0][block.kv_head]
        for r in T.unroll(2):
            consumer.scale[r] = T.shfl_sync(back, 4 * (2 * t + r))

    emit()


@T.macro
def _attend(traits, block, consumer, step):
    """Add the block of keys of a step."""
    stage = T.alloc_var("int32", block.pipeline.stage(step))
    key = T.alloc_var("int32", (block.keys.first_block + step) * traits.config.block_N)
    block.pipeline.wait(stage, block.pipeline.full_phase(step))
    for i in T.unroll(traits.tiles * 4):
        consumer.S[i] = T.float32(0)
    for tile in T.unroll(traits.tiles):
        _multiply_keys(traits, block, consumer, stage, tile)
    _hide(traits, block, consumer, key)
    _update(traits, consumer)
    for tile in T.unroll(traits.tiles):
        _multiply_values(traits, block, consumer, stage, tile, block.keys.length - key)
    T.sync_warp()
    block.pipeline.release(stage, consumer.lane)


def _multiply_keys(traits: _Traits, block: _Block, consumer: _Consumer, stage, tile) -> None:
    """S^T += k q^T of 16 keys."""
    A, g, t = consumer.A, consumer.g, consumer.t

    @T.macro
    def multiply(piece, panel, column):
        codes = T.alloc_local((2 * _PIECE,), traits.problem.cache_dtype)
        for half in T.unroll(2):
            for e in T.vectorized(_PIECE):
                codes[half * _PIECE + e] = block.k_s[stage, panel, tile * _KEYS + half * 8 + g, column + e]
        words = T.view(codes, (2 * _WORDS,), "uint32")
        for word in T.unroll(_WORDS):
            A[0] = _low(words[word])
            A[1] = _low(words[_WORDS + word])
            A[2] = _high(words[word])
            A[3] = _high(words[_WORDS + word])
            _issue_mma(A, consumer.Q, (piece * _WORDS + word) * 2, consumer.S, tile * 4)

    for piece in range(traits.pieces):
        channel = _first_channel(traits, piece, t)
        panel = 0 if traits.width == 64 else piece // 2
        multiply(piece, panel, channel - panel * traits.width)


def _multiply_values(traits: _Traits, block: _Block, consumer: _Consumer, stage, tile, left) -> None:
    """O^T += v^T P^T of 16 keys. The block has `left` that exist: 0 times what a cache may hold past them could be NaN."""
    A, g, t, words_of_key = consumer.A, consumer.g, consumer.t, traits.words

    @T.macro
    def multiply(panel):
        codes = T.alloc_local((16 * words_of_key,), traits.problem.cache_dtype)
        for i in T.unroll(4):
            for e in T.vectorized(4 * words_of_key):
                codes[i * 4 * words_of_key + e] = block.v_s[
                    stage, panel, tile * _KEYS + i // 2 * 8 + 2 * t + i % 2, g * 4 * words_of_key + e
                ]
        words = T.view(codes, (4 * words_of_key,), "uint32")
        if left < traits.config.block_N:
            for i in T.unroll(4):
                if tile * _KEYS + i // 2 * 8 + 2 * t + i % 2 >= left:
                    for e in T.unroll(words_of_key):
                        words[i * words_of_key + e] = T.uint32(0)
        for word in T.unroll(words_of_key):
            for half in T.unroll(2):
                # Bytes 2 half and 2 half + 1 of two keys, in pairs of keys
                x = _pair(words[word], words[words_of_key + word], half)
                y = _pair(words[2 * words_of_key + word], words[3 * words_of_key + word], half)
                A[0] = _low(x)
                A[1] = _high(x)
                A[2] = _low(y)
                A[3] = _high(y)
                _issue_mma(A, consumer.P, tile * 2, consumer.O, ((panel * words_of_key + word) * 2 + half) * 4)

    for panel in range(traits.panels):
        multiply(panel)


def _low(word):
    return T.call_pure_extern("uint32", "tilelang_ext_low_codes", word)


def _high(word):
    return T.call_pure_extern("uint32", "tilelang_ext_high_codes", word)


def _pair(x, y, half):
    return T.call_pure_extern("uint32", "__byte_perm", x, y, T.if_then_else(half == 0, T.uint32(0x5140), T.uint32(0x7362)))


@T.macro
def _issue_mma(A, B, b, C, c):
    T.ptx_mma("float32", "m16n8k16", "row", "col", "fp16", "fp16", "fp32", A.data, 0, B.data, b, C.data, c, T.bool(False))


@T.macro
def _hide(traits, block, consumer, key):
    """Hide keys of the block that begins at `key` from the rows that may not see them."""
    if block.keys.has_hidden(key, (0, ROWS - 1), traits.config.block_N):
        for r in T.unroll(2):
            first = block.keys.first_key(2 * consumer.t + r) - key - consumer.g
            end = block.keys.end_key(2 * consumer.t + r) - key - consumer.g
            for i in T.unroll(traits.tiles * 2):
                if (i * 8 >= end) or (i * 8 < first):
                    consumer.S[2 * i + r] = _NOTHING


@T.macro
def _update(traits, consumer):
    """The online softmax of a block: maxima, powers and their sums, O times its factors, and P."""
    S, maximum, shift, total, factor, scale = (
        consumer.S, consumer.maximum, consumer.shift, consumer.total, consumer.factor, consumer.scale
    )  # fmt: skip
    for r in T.unroll(2):
        peak = T.alloc_var("float32", maximum[r])
        for i in T.unroll(traits.tiles * 2):
            peak = T.max(peak, S[2 * i + r])
        peak = T.max(peak, T.shfl_xor(peak, 4))
        peak = T.max(peak, T.shfl_xor(peak, 8))
        peak = T.max(peak, T.shfl_xor(peak, 16))
        # A maximum that grows by little stays, so that O is seldom multiplied: powers are then up to 2^_SLACK, which float16
        # holds. Of a row without keys 2^(-inf - 0) is 0.
        peak = T.if_then_else((peak - maximum[r]) * scale[r] <= T.float32(_SLACK), maximum[r], peak)
        shift[r] = T.if_then_else(peak == _NOTHING, T.float32(0), peak * scale[r])
        factor[r] = exp2(maximum[r] * scale[r] - shift[r])
        maximum[r] = peak
        total[r] = total[r] * factor[r]
        for i in T.unroll(traits.tiles * 2):
            S[2 * i + r] = exp2(S[2 * i + r] * scale[r] - shift[r])
            total[r] = total[r] + S[2 * i + r]
    for i in T.unroll(traits.tiles * 2):
        consumer.P[i] = T.call_pure_extern(
            "uint32",
            "tilelang_ext_transpose",
            T.call_pure_extern("uint32", "tilelang_ext_pack_f16", S[2 * i], S[2 * i + 1]),
        )
    changes = (factor[0] != T.float32(1)) | (factor[1] != T.float32(1))
    if T.call_pure_extern("int32", "__any_sync", T.uint32(0xFFFFFFFF), changes) != 0:
        for i in T.unroll(traits.channels // 4):
            consumer.O[i] = consumer.O[i] * factor[i % 2]


# --- epilogue --------------------------------------------------------------------------------------------------------


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
    T.sync_threads(barrier_id=_CONSUMERS_MEET, arrive_count=threads)
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
    T.sync_threads(barrier_id=_CONSUMERS_MEET, arrive_count=threads)
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
            logarithm = T.alloc_var("float32", T.if_then_else(total > T.float32(0), peak + log2(total), _NOTHING))
            if is_whole:
                results.out[block.batch, token, head, channel] = T.cast(value * inverse, traits.problem.dtype)
                if channel == 0:
                    results.lse[block.batch, head, token] = logarithm * T.float32(1 / LOG2_E)
            else:
                results.partial[block.split, block.batch, token, head, channel] = value * inverse
                if channel == 0:
                    results.partial_lse[block.split, block.batch, head, token] = logarithm


# --- host ------------------------------------------------------------------------------------------------------------


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

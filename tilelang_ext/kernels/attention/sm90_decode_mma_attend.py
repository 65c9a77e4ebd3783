"""A consumer warp of decode over 8-bit caches on Hopper: q as an operand of its MMAs, and one block of keys and values."""

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import DecodeOperands
from tilelang_ext.kernels.attention.sm90_decode_mma_block import KEYS, NOTHING, PIECE, ROWS, WORDS, Block, Consumer, Traits
from tilelang_ext.kernels.attention.sm90_softmax import exp2
from tilelang_ext.kernels.sm90.roles import WARP

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


def _first_channel(traits: Traits, piece: int, t):
    """Return the first channel of a lane's piece of k and q: of a panel of 128 its pieces lie side by side."""
    return t * PIECE if traits.width == 64 else piece // 2 * traits.width + (2 * t + piece % 2) * PIECE


def fetch_q(traits: Traits, operands: DecodeOperands, batch, kv_head, group, thread):
    """Begin to load row g of q, and return it; rows and channels past the end are 0."""
    D, lane = traits.problem.head_dim, thread % WARP
    g, t = lane // 4, lane % 4

    @T.macro
    def load(values, piece, channel, is_row, token, head):
        for e in T.unroll(PIECE // 8):
            for i in T.vectorized(8):
                values[piece * PIECE + e * 8 + i] = T.cast(0, traits.problem.dtype)
            if is_row and (channel + e * 8 < D):
                for i in T.vectorized(8):
                    values[piece * PIECE + e * 8 + i] = operands.q[batch, token, head, channel + e * 8 + i]

    def load_all(values, *row):
        for piece in range(traits.pieces):
            load(values, piece, _first_channel(traits, piece, t), *row)

    @T.macro
    def emit():
        values = T.alloc_local((traits.pieces * PIECE,), traits.problem.dtype)
        token = T.alloc_var("int32", T.truncdiv(g, group))
        load_all(values, g < operands.q.shape[1] * group, token, (kv_head - token) * group + g)
        return values

    return emit()


def scale_q(traits: Traits, block: Block, consumer: Consumer) -> None:
    """Make the right operand of row g of q, times the power of two that brings its largest element near 1."""
    Q, t, values = consumer.Q, consumer.t, block.q

    @T.macro
    def emit():
        largest = T.alloc_var("float32", 0.0)
        for i in T.unroll(traits.pieces * PIECE):
            largest = T.max(largest, T.abs(T.cast(values[i], "float32")))
        largest = T.max(largest, T.shfl_xor(largest, 1))
        largest = T.max(largest, T.shfl_xor(largest, 2))
        power = T.alloc_var("int32", T.reinterpret(largest, "int32") >> 23)  # the exponent's bits
        power = T.min(T.max(power, 1), 252)
        inverse = T.alloc_var("float32", T.reinterpret((T.int32(253) - power) << 23, "float32"))
        for i in T.unroll(traits.pieces * PIECE // 2):
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
def attend(traits, block, consumer, step):
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


def _multiply_keys(traits: Traits, block: Block, consumer: Consumer, stage, tile) -> None:
    """S^T += k q^T of 16 keys."""
    A, g, t = consumer.A, consumer.g, consumer.t

    @T.macro
    def multiply(piece, panel, column):
        codes = T.alloc_local((2 * PIECE,), traits.problem.cache_dtype)
        for half in T.unroll(2):
            for e in T.vectorized(PIECE):
                codes[half * PIECE + e] = block.k_s[stage, panel, tile * KEYS + half * 8 + g, column + e]
        words = T.view(codes, (2 * WORDS,), "uint32")
        for word in T.unroll(WORDS):
            A[0] = _low(words[word])
            A[1] = _low(words[WORDS + word])
            A[2] = _high(words[word])
            A[3] = _high(words[WORDS + word])
            _issue_mma(A, consumer.Q, (piece * WORDS + word) * 2, consumer.S, tile * 4)

    for piece in range(traits.pieces):
        channel = _first_channel(traits, piece, t)
        panel = 0 if traits.width == 64 else piece // 2
        multiply(piece, panel, channel - panel * traits.width)


def _multiply_values(traits: Traits, block: Block, consumer: Consumer, stage, tile, left) -> None:
    """O^T += v^T P^T of 16 keys. The block has `left` that exist: 0 times what a cache may hold past them could be NaN."""
    A, g, t, words_of_key = consumer.A, consumer.g, consumer.t, traits.words

    @T.macro
    def multiply(panel):
        codes = T.alloc_local((16 * words_of_key,), traits.problem.cache_dtype)
        for i in T.unroll(4):
            for e in T.vectorized(4 * words_of_key):
                codes[i * 4 * words_of_key + e] = block.v_s[
                    stage, panel, tile * KEYS + i // 2 * 8 + 2 * t + i % 2, g * 4 * words_of_key + e
                ]
        words = T.view(codes, (4 * words_of_key,), "uint32")
        if left < traits.config.block_N:
            for i in T.unroll(4):
                if tile * KEYS + i // 2 * 8 + 2 * t + i % 2 >= left:
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
                    consumer.S[2 * i + r] = NOTHING


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
        shift[r] = T.if_then_else(peak == NOTHING, T.float32(0), peak * scale[r])
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

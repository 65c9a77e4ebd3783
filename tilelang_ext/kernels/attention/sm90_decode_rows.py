"""What consumers of `sm90_decode` do before and after the keys: q goes to shared memory, and results are stored."""

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import LOG2_E
from tilelang_ext.kernels.attention.sm90_config import WGMMA_M
from tilelang_ext.kernels.attention.sm90_softmax import exp2, log2
from tilelang_ext.kernels.attention.sm90_sum import MAX_ROWS
from tilelang_ext.kernels.attention.tiles import PANEL
from tilelang_ext.kernels.sm90.roles import WARP

CONSUMERS_MEET = 8  # number of a named barrier


@T.macro
def clear_q(traits, q_s, thread):
    """Clear all rows, of which `load_q` fills those that there are; by all threads of a block."""
    threads = traits.roles.threads
    for turn in T.serial(-(-traits.panels * WGMMA_M * 8 // threads)):
        piece = turn * threads + thread
        if piece < traits.panels * WGMMA_M * 8:
            for e in T.vectorized(8):
                q_s[piece // (WGMMA_M * 8), piece // 8 % WGMMA_M, piece % 8 * 8 + e] = T.cast(0, traits.problem.dtype)


@T.macro
def load_q(traits, operands, q_s, batch, kv_head, first_row, group, thread):
    """Load the rows of q that there are, 16 bytes at a time, all on their way together."""
    rows, threads = operands.q.shape[1] * group, traits.roles.consumer_threads
    most = MAX_ROWS if traits.problem.has_few_rows else WGMMA_M
    turns = -(-traits.panels * most * 8 // threads)
    values = T.alloc_local((turns * 8,), traits.problem.dtype)
    for turn in T.unroll(turns):
        piece = turn * threads + thread
        panel, row, channel = piece // (most * 8), piece // 8 % most, piece % 8 * 8
        if (first_row + row < rows) and (panel * PANEL + channel < traits.problem.head_dim):
            token = T.alloc_var("int32", T.truncdiv(first_row + row, group))
            head = T.alloc_var("int32", (kv_head - token) * group + first_row + row)
            for e in T.vectorized(8):
                values[turn * 8 + e] = operands.q[batch, token, head, panel * PANEL + channel + e]
    for turn in T.unroll(turns):
        piece = turn * threads + thread
        panel, row, channel = piece // (most * 8), piece // 8 % most, piece % 8 * 8
        if (first_row + row < rows) and (panel * PANEL + channel < traits.problem.head_dim):
            for e in T.vectorized(8):
                q_s[panel, row, channel + e] = values[turn * 8 + e]
    T.fence_proxy_async()
    T.sync_threads(barrier_id=CONSUMERS_MEET, arrive_count=threads)


@T.macro
def merge(traits, block, consumer):
    """Add what the second consumer has to what the first has: rows are those of their first warps."""
    softmax, merged_s, values = consumer.softmax, block.merged_s, traits.half * PANEL // 4
    if consumer.number == 1:
        if consumer.thread < WARP:
            for e in T.unroll(values):
                merged_s[e, consumer.thread] = consumer.O[e // 2 * 4 + e % 2]
            merged_s[values, consumer.thread] = softmax.maximum[0]
            merged_s[values + 1, consumer.thread] = softmax.total[0]
        T.sync_threads(barrier_id=CONSUMERS_MEET, arrive_count=traits.roles.consumer_threads)
    else:
        T.sync_threads(barrier_id=CONSUMERS_MEET, arrive_count=traits.roles.consumer_threads)
        if consumer.thread < WARP:
            other = T.alloc_var("float32", merged_s[values, consumer.thread])
            peak = T.alloc_var("float32", T.max(softmax.maximum[0], other))
            shift = T.alloc_var("float32", T.if_then_else(peak == -T.infinity("float32"), T.float32(0), peak * softmax.scale))
            own = T.alloc_var("float32", exp2(softmax.maximum[0] * softmax.scale - shift))
            other = exp2(other * softmax.scale - shift)
            for e in T.unroll(values):
                consumer.O[e // 2 * 4 + e % 2] = consumer.O[e // 2 * 4 + e % 2] * own + merged_s[e, consumer.thread] * other
            softmax.total[0] = softmax.total[0] * own + merged_s[values + 1, consumer.thread] * other
            softmax.maximum[0] = peak


@T.macro
def store(traits, operands, results, block, consumer, is_whole):
    """Store O divided by the sums, and their logarithms: of a range where the consumer's results lie, or of all keys."""
    softmax = consumer.softmax
    place = block.split * traits.config.ranges + (consumer.number if traits.config.halves == 1 else 0)
    first = consumer.number * traits.half * PANEL if traits.config.halves > 1 else 0
    rows = operands.q.shape[1] * block.keys.group
    for r in T.unroll(2):
        row = block.keys.row + softmax.row + 8 * r
        token = T.alloc_var("int32", T.truncdiv(row, block.keys.group))
        head = T.alloc_var("int32", (block.kv_head - token) * block.keys.group + row)
        total = T.alloc_var("float32", softmax.total[r])
        total = total + T.shfl_xor(total, 1)
        total = total + T.shfl_xor(total, 2)
        inverse = T.alloc_var("float32", 0.0)
        peak = T.alloc_var("float32", softmax.maximum[r] * softmax.scale)
        if row < rows:
            inverse = T.if_then_else(total > T.float32(0), T.float32(1) / total, T.float32(0))
            if is_whole and traits.problem.has_sinks:
                sink = T.alloc_var("float32", results.sinks[head] * T.float32(LOG2_E))
                common = T.alloc_var("float32", T.max(T.max(peak, sink), T.float32(-1e30)))
                part = T.alloc_var("float32", exp2(peak - common))
                total = total * part + exp2(sink - common)
                inverse = T.if_then_else(total > T.float32(0), part / total, T.float32(0))
                peak = common
            if traits.problem.scales == "head":
                inverse = inverse * operands.v_scale[block.kv_head]
            if (softmax.column == 0) and (first == 0):
                logarithm = T.alloc_var(
                    "float32", T.if_then_else(total > T.float32(0), peak + log2(total), -T.infinity("float32"))
                )
                if is_whole:
                    results.lse[block.batch, head, token] = logarithm * T.float32(1 / LOG2_E)
                else:
                    results.partial_lse[place, block.batch, head, token] = logarithm
            for j in T.unroll(traits.half * PANEL // 8):
                if first + j * 8 < traits.problem.head_dim:
                    for i in T.vectorized(2):
                        value = consumer.O[4 * j + 2 * r + i] * inverse
                        channel = first + j * 8 + softmax.column + i
                        if is_whole:
                            results.out[block.batch, token, head, channel] = T.cast(value, traits.problem.dtype)
                        else:
                            results.partial[place, block.batch, token, head, channel] = value

"""What a warp does with its rows of one head's state, (V, K): the macros that the kernels of the gated delta rule share.

A group of `lanes` lanes holds whole rows together, by loads of 16 bytes per lane that lie side by side. S k and S q of a row
are sums over the lanes of its group. With S' = g S,

    S' k = S (g k);  r = beta (v - S' k);  o = scale * (S (g q) + (q . k) r)

both sums come from the state as it was read, in one pass. Warps are independent of one another: there is no shared memory and
no barrier. CUDA, HIP and Metal share this source.
"""

from types import SimpleNamespace

from tvm import tirx

from tilelang_ext import language as T
from tilelang_ext.kernels.gated_delta.config import Config
from tilelang_ext.kernels.gated_delta.problem import STRIDE_UNIT, V_UNIT, WARP, Problem
from tilelang_ext.kernels.sm90 import prefetch

# A kernel that uses PDL: its accesses are inside by construction, and it has no shared memory to order.
PASS_CONFIGS = {"tl.disable_safe_memory_legalize": True, "tl.disable_thread_storage_sync": True}
_LOAD_BYTES = 16
_MMA_TYPES = {"bfloat16": "bf16", "float16": "fp16"}
LINEAR_FROM = 20.0  # softplus(x) is x in float32 from here on
NORM_EPS = 1e-6  # as flash-linear-attention has it


def assume_units(*tensors) -> None:
    """State that strides are multiples of STRIDE_UNIT, without which loads would not be wide."""
    for tensor in tensors:
        for stride in tensor.strides:
            if isinstance(stride, tirx.Var):
                T.evaluate(T.assume(stride % STRIDE_UNIT == 0))


def _softplus(x):
    return T.if_then_else(x > LINEAR_FROM, x, T.max(x, 0) + T.log(1 + T.exp(-T.abs(x))))


def macros(problem: Problem, config: Config) -> SimpleNamespace:
    """Return the macros for the rows of one warp and the sizes of its local arrays, by name.

    | name | elements of a lane |
    | --- | --- |
    | raw, S | rows_per_lane rows of `channels` channels |
    | q_raw, k_raw; v_raw | for each token `channels` channels; one number per row |
    | q_f, k_f; log_g | `channels` channels; one number, or with a gate per channel `channels` |
    | o, r_f | the result and r of each row |
    """
    tokens, lanes, rows = problem.tokens, config.lanes, config.rows_per_lane
    channels = problem.K // lanes
    width = min(_LOAD_BYTES * 8 // T.dtype(problem.state_dtype).bits, channels)  # of one load
    loads = channels // width
    gates, per_channel = channels if problem.per_channel else 1, problem.per_channel
    steps = lanes.bit_length() - 1  # of a sum over the lanes of a group
    heads_per_qk = problem.heads // problem.qk_heads
    side_by_side = not problem.in_place  # the rows of a group; in place they alternate, as they do where it was measured
    together = min(rows, V_UNIT) if side_by_side else 1  # rows of one load of v

    def channel(lane, i):
        """Return the channel of K that element i of a lane is."""
        return i // width * (lanes * width) + lane * width + i % width

    def row(first_row, group, i):
        """Return the row of V that element i of a group is."""
        return first_row + (group * rows + i if side_by_side else i * config.groups + group)

    def row_of_lane(lane):
        """Return the element whose sums a lane has after `share_sums`: with rows <= lanes / 2, neighbours have the same."""
        return lane // (lanes // rows)

    def asks_for_rows(block, thread):
        """Whether a thread asks for its warp's rows in L2, ahead of their loads."""
        is_first = thread % WARP == 0
        return is_first if config.asking_blocks is None else tirx.all(is_first, block < config.asking_blocks)

    @T.macro
    def ask_for_inputs(q, k, v, a, b, sequence, head, first_row, thread):
        """Ask for a block's inputs in L2, thread t for those of token t; what still writes them may go on.

        Not for A_log and dt_bias, which all blocks read: L2 answers requests for one line one after the other.
        """
        t = thread
        if t < tokens:
            prefetch.prefetch(k[sequence, t, head // heads_per_qk, 0], problem.K * 2)
            prefetch.prefetch(q[sequence, t, head // heads_per_qk, 0], problem.K * 2)
            prefetch.prefetch_line(v[sequence, t, head, first_row])
            prefetch.prefetch_line(b[sequence, t, head])
            if per_channel:
                prefetch.prefetch_line(a[sequence, t, head, 0])
            else:
                prefetch.prefetch_line(a[sequence, t, head])

    @T.macro
    def load_vector(source, sequence, t, head, lane, loaded, number):
        """Load a lane's channels of q or k, of one token, as vector `number` of those loaded."""
        for part in T.unroll(loads):
            for i in T.vectorized(width):
                loaded[(number * loads + part) * width + i] = source[sequence, t, head, (part * lanes + lane) * width + i]

    @T.macro
    def store_vector(target, sequence, t, head, lane, values):
        """Store a lane's channels of one token."""
        rounded = T.alloc_local((channels,), problem.dtype)
        for i in T.unroll(channels):
            rounded[i] = T.cast(values[i], problem.dtype)
        for part in T.unroll(loads):
            for i in T.vectorized(width):
                target[sequence, t, head, (part * lanes + lane) * width + i] = rounded[part * width + i]

    @T.macro
    def load_vectors(source, sequence, head, lane, loaded):
        """Load a lane's channels of q or k, of every token."""
        for t in T.unroll(tokens):
            load_vector(source, sequence, t, head, lane, loaded, t)

    @T.macro
    def load_values(v, sequence, head, first_row, group, loaded):
        for t in T.unroll(tokens):
            for part in T.unroll(rows // together):
                for i in T.vectorized(together):
                    loaded[t * rows + part * together + i] = v[sequence, t, head, row(first_row, group, part * together + i)]

    @T.macro
    def load_rows(state, slot, head, first_row, group, lane, raw):
        for j in T.unroll(rows):
            for part in T.unroll(loads):
                for i in T.vectorized(width):
                    raw[(j * loads + part) * width + i] = state[
                        slot, head, row(first_row, group, j), (part * lanes + lane) * width + i
                    ]

    @T.macro
    def store_rows(target, slot, head, first_row, group, lane, S):
        raw = T.alloc_local((rows * channels,), problem.state_dtype)
        for i in T.unroll(rows * channels):
            raw[i] = T.cast(S[i], problem.state_dtype)
        for j in T.unroll(rows):
            for part in T.unroll(loads):
                for i in T.vectorized(width):
                    target[slot, head, row(first_row, group, j), (part * lanes + lane) * width + i] = raw[
                        (j * loads + part) * width + i
                    ]

    @T.macro
    def add_over_lanes(values, count):
        """Make each of some values the sum over the lanes of the group."""
        for s in T.unroll(steps):
            for i in T.unroll(count):
                values[i] += T.shfl_xor(values[i], lanes >> (s + 1))

    def sharing(count, distance):
        """Return the macro that adds up `count` values over lanes up to twice `distance` apart."""
        half = max(count // 2, 1)

        @T.macro
        def share(values, lane):
            is_upper = lane // distance % 2 == 1
            if count == 1:
                values[0] += T.shfl_xor(values[0], distance)
            else:
                for i in T.unroll(half):
                    given = T.if_then_else(is_upper, values[i], values[half + i])
                    kept = T.if_then_else(is_upper, values[half + i], values[i])
                    values[i] = kept + T.shfl_xor(given, distance)
            if distance > 1:
                sharing(half, distance // 2)(values, lane)

        return share

    def share_sums(values, count, lane):
        """Make values[0] a sum over the lanes of the group: in lane l that of value l // (lanes / count); count <= lanes.

        Lanes exchange halves of what they have: about `count` shuffles, where `add_over_lanes` has `steps` times as many.
        """
        sharing(count, lanes // 2)(values, lane)

    @T.macro
    def log_gates(a, dt_bias, A_log, sequence, t, head, lane, log_g):
        """log(g) of each channel of this lane, or one for all."""
        rate = T.exp(A_log[head])
        if per_channel:
            for i in T.unroll(channels):
                x = T.cast(a[sequence, t, head, channel(lane, i)], "float32") + dt_bias[head, channel(lane, i)]
                log_g[i] = -rate * _softplus(x)
        else:
            x = T.cast(a[sequence, t, head], "float32") + dt_bias[head]
            log_g[0] = -rate * _softplus(x)

    def norm_factor(square):
        return T.rsqrt(square + T.float32(NORM_EPS))

    @T.macro
    def normalise(x):
        """Divide the vector that the lanes of a group hold together by its norm."""
        square = T.alloc_local((1,), "float32")
        square[0] = 0
        for i in T.unroll(channels):
            square[0] += x[i] * x[i]
        add_over_lanes(square, 1)
        factor = norm_factor(square[0])
        for i in T.unroll(channels):
            x[i] *= factor

    @T.macro
    def vectors(q_raw, k_raw, t, q_f, k_f):
        """q and k of one token in float32."""
        for i in T.unroll(channels):
            q_f[i] = T.cast(q_raw[t * channels + i], "float32")
            k_f[i] = T.cast(k_raw[t * channels + i], "float32")
        if problem.l2_norm:
            normalise(q_f)
            normalise(k_f)

    @T.macro
    def add_up(S, q_f, k_f, log_g, sums):
        """S = g S; the parts of this lane of S k and S q for each row, and of q k, as sums."""
        g = T.alloc_local((gates,), "float32")
        for i in T.unroll(gates):
            g[i] = T.exp(log_g[i])
        sums[2 * rows] = 0
        for i in T.unroll(channels):
            sums[2 * rows] += q_f[i] * k_f[i]
        for j in T.unroll(rows):
            sums[2 * j] = 0
            sums[2 * j + 1] = 0
            for i in T.unroll(channels):
                decayed = S[j * channels + i] * g[i % gates]
                S[j * channels + i] = decayed
                sums[2 * j] += decayed * k_f[i]
                sums[2 * j + 1] += decayed * q_f[i]

    @T.macro
    def update(S, k_f, v_raw, t, beta, sums, o, r_f):
        """The result and the r of each row from sums over all lanes, and S becomes the state after the token."""
        for j in T.unroll(rows):
            r = beta * (T.cast(v_raw[t * rows + j], "float32") - sums[2 * j])
            for i in T.unroll(channels):
                S[j * channels + i] += r * k_f[i]
            o[j] = T.float32(problem.scale) * (sums[2 * j + 1] + sums[2 * rows] * r)
            r_f[j] = r

    @T.macro
    def products(raw, k_f, q_f, sums):
        """The parts of this lane of S k and S q for each row, from the state as it was loaded."""
        for j in T.unroll(rows):
            sums[2 * j] = 0
            sums[2 * j + 1] = 0
            for i in T.unroll(channels):
                x = T.cast(raw[j * channels + i], "float32")
                sums[2 * j] += x * k_f[i]
                sums[2 * j + 1] += x * q_f[i]

    @T.macro
    def columns_of(k_raw, q_raw, group, kq):
        """Make k and q, of 16 bits, the first two of the eight columns of an MMA; the others are zero."""
        k_words, q_words = T.view(k_raw, (channels // 2,), "uint32"), T.view(q_raw, (channels // 2,), "uint32")
        for i in T.unroll(channels // 2):
            kq[i] = T.if_then_else(group == 0, k_words[i], T.if_then_else(group == 1, q_words[i], T.uint32(0)))

    @T.macro
    def multiply_rows(raw, count, kq, sums):
        """The products of one or two rows of each group with k and q, sums[2 j] and sums[2 j + 1], in the group's first lane; 0
        in its others. Channels are in the order of loads: the sum over them has none."""
        of_16_bits = T.view(raw, (count * channels // 2,), "uint32")
        words = T.alloc_local((4,), "uint32")
        out = T.alloc_local((4,), "float32")
        for i in T.unroll(4):
            out[i] = 0
        for step in T.unroll(channels // 4):
            for i in T.unroll(2):
                words[2 * i] = of_16_bits[2 * step + i]
                words[2 * i + 1] = of_16_bits[channels // 2 + 2 * step + i] if count > 1 else T.uint32(0)
            T.ptx_mma(
                "float32", "m16n8k16", "row", "col", _MMA_TYPES[problem.dtype], _MMA_TYPES[problem.dtype], "fp32",
                words.data, 0, kq.data, 2 * step, out.data, 0, T.bool(False),
            )  # fmt: skip
        for i in T.unroll(2 * count):
            sums[i] = out[i]

    @T.macro
    def step(S, q_f, k_f, v_raw, t, log_g, beta, o, r_f):
        """One token: the result and the r of each row, and S becomes the state after the token."""
        sums = T.alloc_local((2 * rows + 1,), "float32")
        add_up(S, q_f, k_f, log_g, sums)
        add_over_lanes(sums, 2 * rows + 1)
        update(S, k_f, v_raw, t, beta, sums, o, r_f)

    @T.macro
    def store_values(out, sequence, t, head, first_row, group, lane, values):
        """Store one number per row, each by another lane of its group."""
        for j in T.unroll(rows):
            if lane == j % lanes:
                out[sequence, t, head, row(first_row, group, j)] = T.cast(values[j], out.dtype)

    @T.macro
    def store_nothing(out, sequence, head, first_row, group, lane, slot):
        """The result where there is no slot: 0 for an index below 0, NaN past the pool."""
        nothing = T.alloc_local((rows,), "float32")
        for j in T.unroll(rows):
            nothing[j] = T.if_then_else(slot < 0, 0, T.infinity("float32") - T.infinity("float32"))
        for t in T.unroll(tokens):
            store_values(out, sequence, t, head, first_row, group, lane, nothing)

    return SimpleNamespace(
        channels=channels,
        rows=rows,
        gates=gates,
        channel=channel,
        row=row,
        asks_for_rows=asks_for_rows,
        ask_for_inputs=ask_for_inputs,
        load_vector=load_vector,
        load_vectors=load_vectors,
        store_vector=store_vector,
        load_values=load_values,
        load_rows=load_rows,
        store_rows=store_rows,
        log_gates=log_gates,
        add_over_lanes=add_over_lanes,
        add_up=add_up,
        update=update,
        row_of_lane=row_of_lane,
        share_sums=share_sums,
        products=products,
        norm_factor=norm_factor,
        columns_of=columns_of,
        multiply_rows=multiply_rows,
        vectors=vectors,
        step=step,
        store_values=store_values,
        store_nothing=store_nothing,
    )

"""One to eight tokens of each sequence without writing the state each time: the last tokens are kept instead, and replayed.

The tokens since the state was written are in a window of a ring of entries, of k, r and the logarithm of the decay since then:

    S = G S_0 + sum over entries i of (G / G_i) r_i k_i^T

is computed in registers from the state S_0 as it was written; then the step is that of `decode`, and the new tokens become
entries. Where they would make the window longer than `limit`, S is written first and the window begins at the new tokens. So a
call reads the state and writes 1 / limit of it on average. Entries that are being read are never overwritten, since the ring
has room for `limit` and the new tokens.

For one token S is only formed where it is written: the entries' part of S k is the sum of (G / G_i) (k_i . k) r_i, and that of
S q the same with q. These weights serve all rows of a warp, turn after turn. Four lanes per row hold a state of 16 bits,
entries, k and q as the MMA of 16x8x16 takes them, which then computes S_0 k, S_0 q and all k_i . k and k_i . q, unless channels
have decays of their own.
"""

from collections.abc import Callable

from tvm import tirx

from tilelang_ext import language as T
from tilelang_ext.kernels.gated_delta.config import MAX_WEIGHED, MMA_LANES, Config, pick_config
from tilelang_ext.kernels.gated_delta.problem import V_UNIT, WARP, Problem
from tilelang_ext.kernels.gated_delta.rows import PASS_CONFIGS, assume_units, macros
from tilelang_ext.kernels.sm90 import pdl, prefetch

_AT_ONCE = 4  # entries, of few channels per lane, whose loads are in flight together where S is restored


def replay(problem: Problem, config: Config):
    """The prim_func: (q, k, v, state, A_log, dt_bias, a, b, indices, windows, k_ring, r_ring, decay_ring, out)."""
    tokens, heads, K, dtype, ring = problem.tokens, problem.heads, problem.K, problem.dtype, problem.ring
    warps, lanes = config.warps, config.lanes
    of_warp = macros(problem, config)
    channels, rows, gates = of_warp.channels, of_warp.rows, of_warp.gates
    heads_per_qk, parts = heads // problem.qk_heads, problem.V // (warps * config.rows * config.turns)
    by_mma = lanes == MMA_LANES
    most = MAX_WEIGHED if by_mma else min(lanes, MAX_WEIGHED)
    at_once = max(config.groups, min(most, 1 << (problem.limit - 1).bit_length()))  # entries, `own` per lane
    own = -(-at_once // lanes)
    rounds = -(-problem.limit // at_once)
    shares = at_once // config.groups  # entries whose weights a group computes
    restored = min(_AT_ONCE, max(1, 32 // channels))  # entries whose loads are in flight together
    # Whether the lanes of a group hold all that restores its rows, but for keys. With MMAs that made other calls slower.
    from_lanes = tokens == 1 and rounds == 1 and not problem.per_channel and not by_mma
    together = min(rows, V_UNIT)  # rows of one load of r
    state_bytes = T.dtype(problem.state_dtype).bits // 8
    types = problem.types()
    slots = types.state.shape[0]
    decay_shape = (slots, ring, heads, K) if problem.per_channel else (slots, ring, heads)

    def entry_at(first, number):
        """Return the entry of the ring that is `number` entries after the first; both are less than the ring's length."""
        return T.if_then_else(first + number < ring, first + number, first + number - ring)

    def decay_at(decay_ring, slot, entry, head, channel):
        return decay_ring[slot, entry, head, channel] if problem.per_channel else decay_ring[slot, entry, head]

    def last_decay(decay_ring, slot, first, count, head, channel):
        """Return log(G) of the window: that of its last entry, or 0."""
        last = entry_at(first, T.max(count - 1, 0))
        return T.if_then_else(count > 0, decay_at(decay_ring, slot, last, head, channel), 0)

    @T.macro
    def restore(raw, k_ring, r_ring, decay_ring, slot, head, first, count, first_row, group, lane, log_total, S):
        """S = G S_0 + sum of (G / G_i) r_i k_i^T over `count` entries from `first` on; log_total becomes log(G)."""
        k_raw = T.alloc_local((restored * channels,), dtype)
        r_raw = T.alloc_local((restored * rows,), "float32")
        logs = T.alloc_local((restored * gates,), "float32")
        for i in T.unroll(gates):
            log_total[i] = last_decay(decay_ring, slot, first, count, head, of_warp.channel(lane, i))
        for i in T.unroll(gates):
            logs[i] = T.exp(log_total[i])
        for i in T.unroll(rows * channels):
            S[i] = logs[i % channels % gates] * T.cast(raw[i], "float32")
        for chunk in T.serial(T.ceildiv(count, restored)):
            for e in T.unroll(restored):
                entry = T.alloc_var("int32", entry_at(first, T.min(chunk * restored + e, count - 1)))
                of_warp.load_vector(k_ring, slot, entry, head // heads_per_qk, lane, k_raw, e)
                for part in T.unroll(rows // together):
                    for i in T.vectorized(together):
                        r_raw[e * rows + part * together + i] = r_ring[
                            slot, entry, head, of_warp.row(first_row, group, part * together + i)
                        ]
                for i in T.unroll(gates):
                    logs[e * gates + i] = decay_at(decay_ring, slot, entry, head, of_warp.channel(lane, i))
            for e in T.unroll(restored):
                for i in T.unroll(gates):
                    weight = T.exp(log_total[i] - logs[e * gates + i])
                    logs[e * gates + i] = T.if_then_else(chunk * restored + e < count, weight, 0)
                for i in T.unroll(channels):
                    weighted = logs[e * gates + i % gates] * T.cast(k_raw[e * channels + i], "float32")
                    for j in T.unroll(rows):
                        S[j * channels + i] += weighted * r_raw[e * rows + j]

    @T.macro
    def load_entries(r_ring, slot, head, first, count, chunk, first_row, group, lane, r_raw):
        """Load r of this lane's entries, of each row."""
        for o in T.unroll(own):
            entry = T.alloc_var("int32", entry_at(first, T.min(chunk * at_once + o * lanes + lane, count - 1)))
            for part in T.unroll(rows // together):
                for i in T.vectorized(together):
                    r_raw[o * rows + part * together + i] = r_ring[
                        slot, entry, head, of_warp.row(first_row, group, part * together + i)
                    ]

    @T.macro
    def load_keys(k_ring, decay_ring, slot, head, first, count, chunk, group, lane, keys, decays):
        """Load the keys and decays of the entries whose weights this group computes; of a scalar gate this lane's decays."""
        if not problem.per_channel:
            for o in T.unroll(own):
                decays[o] = decay_ring[slot, entry_at(first, T.min(chunk * at_once + o * lanes + lane, count - 1)), head]
        for e in T.unroll(shares):
            entry = entry_at(first, T.min(chunk * at_once + e * config.groups + group, count - 1))
            of_warp.load_vector(k_ring, slot, entry, head // heads_per_qk, lane, keys, e)
            if problem.per_channel:
                for i in T.unroll(channels):
                    decays[e * channels + i] = decay_ring[slot, entry, head, of_warp.channel(lane, i)]

    def is_kept(count, chunk, o, lane):
        """Return whether this lane has an entry `o` of a chunk that is in the window."""
        return tirx.all(o * lanes + lane < at_once, chunk * at_once + o * lanes + lane < count)

    @T.macro
    def restore_from_lanes(raw, k_ring, decay_ring, slot, head, first, count, thread, r_raw, S):
        """S = G S_0 + sum of (G / G_i) r_i k_i^T, with r_i of this turn's rows and its weight from the lane that holds them."""
        lane = thread % lanes
        k_raw = T.alloc_local((restored * channels,), dtype)
        weighted = T.alloc_local((own * rows,), "float32")
        log_total = T.alloc_var("float32", last_decay(decay_ring, slot, first, count, head, 0))
        G = T.alloc_var("float32", T.exp(log_total))
        for o in T.unroll(own):
            decay = decay_ring[slot, entry_at(first, T.min(o * lanes + lane, count - 1)), head]
            weight = T.alloc_var("float32", T.if_then_else(is_kept(count, 0, o, lane), T.exp(log_total - decay), T.float32(0)))
            for j in T.unroll(rows):
                weighted[o * rows + j] = weight * r_raw[o * rows + j]
        for i in T.unroll(rows * channels):
            S[i] = G * T.cast(raw[i], "float32")
        for o in T.unroll(own):
            for chunk in T.serial(T.ceildiv(T.min(count - o * lanes, lanes), restored)):
                for e in T.unroll(restored):
                    entry = T.alloc_var("int32", entry_at(first, T.min(o * lanes + chunk * restored + e, count - 1)))
                    of_warp.load_vector(k_ring, slot, entry, head // heads_per_qk, lane, k_raw, e)
                for e in T.unroll(restored):
                    for j in T.unroll(rows):
                        r = T.shfl_sync(weighted[o * rows + j], thread % WARP - lane + chunk * restored + e)
                        for i in T.unroll(channels):
                            S[j * channels + i] += r * T.cast(k_raw[e * channels + i], "float32")

    @T.macro
    def weigh_entries(keys, decays, count, chunk, lane, k_f, q_f, kq, norms, log_gate, mine):
        """Compute (G / G_i) (k_i . k) and (G / G_i) (k_i . q) of this lane's entries: chunk * at_once + lane, and lanes on.

        With these weights w the entries' part of S k and of S q is the sum of w r, without S. A group computes those of
        `shares` entries, and each lane then fetches its own.
        """
        weights = T.alloc_local((max(2 * shares, 4),), "float32")
        if by_mma:
            of_warp.multiply_rows(keys, shares, kq, weights)
        else:
            for e in T.unroll(shares):
                weights[2 * e] = 0
                weights[2 * e + 1] = 0
                for i in T.unroll(channels):
                    weighted = T.alloc_var("float32", T.cast(keys[e * channels + i], "float32"))
                    if problem.per_channel:
                        weighted *= T.exp(log_gate[i] - decays[e * channels + i])
                    weights[2 * e] += weighted * k_f[i]
                    weights[2 * e + 1] += weighted * q_f[i]
            of_warp.share_sums(weights, 2 * shares, lane)
        for o in T.unroll(own):
            decay = T.alloc_var("float32", T.float32(1))
            if not problem.per_channel:
                decay = T.exp(log_gate[0] - decays[o])
            number = o * lanes + lane
            for i in T.unroll(2):
                value = number // config.groups * 2 + i
                of_lane = number % config.groups * lanes
                # The MMA leaves the two products of a row with the first lane of its group, `share_sums` one with each lane.
                fetched = T.shfl_sync(
                    weights[o * lanes // config.groups * 2 + i if by_mma else 0],
                    of_lane if by_mma else (of_lane + value * (lanes // (2 * shares))) % WARP,
                )
                scaled = fetched * decay * norms[i] if by_mma else fetched * decay
                mine[2 * o + i] = T.if_then_else(is_kept(count, chunk, o, lane), scaled, T.float32(0))

    @T.macro
    def add_entries(mine, r_raw, count, chunk, lane, sums):
        """Add the part of this lane's entries of S k and S q for each row."""
        for o in T.unroll(own):
            for j in T.unroll(rows):
                r = T.if_then_else(is_kept(count, chunk, o, lane), r_raw[o * rows + j], T.float32(0))
                sums[2 * j] += mine[2 * o] * r
                sums[2 * j + 1] += mine[2 * o + 1] * r

    @T.macro
    def keep(k_ring, decay_ring, slot, entry, head, group, lane, k_f, log_total):
        """Write what an entry has once for all rows of a head, by the first group of one warp."""
        if group == 0:
            if head % heads_per_qk == 0:
                of_warp.store_vector(k_ring, slot, entry, head // heads_per_qk, lane, k_f)
            if problem.per_channel:
                for i in T.unroll(channels):
                    decay_ring[slot, entry, head, of_warp.channel(lane, i)] = log_total[i]
            elif lane == 0:
                decay_ring[slot, entry, head] = log_total[0]

    @T.prim_func
    def gated_delta_replay(
        q: types.q,
        k: types.k,
        v: types.v,
        state: types.state,
        A_log: types.A_log,
        dt_bias: types.dt_bias,
        a: types.a,
        b: types.b,
        indices: types.indices,
        windows: T.Tensor((types.q.shape[0], 2), "int32"),
        k_ring: T.Tensor((slots, ring, problem.qk_heads, K), dtype),
        r_ring: T.Tensor((slots, ring, heads, problem.V), "float32"),
        decay_ring: T.Tensor(decay_shape, "float32"),
        out: types.out,
    ):
        with T.Kernel(q.shape[0] * heads * parts, threads=warps * WARP) as block:
            if problem.uses_pdl:
                prefetch.declare()
            if config.min_blocks_per_sm:
                T.annotate_min_blocks_per_sm(config.min_blocks_per_sm)
            part, head, sequence = block % parts, block // parts % heads, block // (parts * heads)
            assume_units(q, k, v, state)
            thread = T.get_thread_binding()
            lane, group = thread % lanes, thread % WARP // lanes
            first_row = (part * warps + thread // WARP) * (config.rows * config.turns)
            raw = T.alloc_local((rows * channels,), problem.state_dtype)
            S = T.alloc_local((rows * channels,), "float32")
            q_raw = T.alloc_local((tokens * channels,), dtype)
            k_raw = T.alloc_local((tokens * channels,), dtype)
            v_raw = T.alloc_local((tokens * rows,), dtype)
            r_raw = T.alloc_local((own * rows,), "float32")
            q_f = T.alloc_local((channels,), "float32")
            k_f = T.alloc_local((channels,), "float32")
            kq = T.alloc_local((channels // 2,), "uint32")
            of_kq = T.alloc_local((4,), "float32")
            mine = T.alloc_local((2 * own,), "float32")
            qk = T.alloc_local((1,), "float32")
            beta = T.alloc_local((1,), "float32")
            keys = T.alloc_local((shares * channels,), dtype)
            decays = T.alloc_local((shares * channels if problem.per_channel else own,), "float32")
            total = T.alloc_local((gates,), "float32")
            decayed_q = T.alloc_local((channels if problem.per_channel else 1,), "float32")
            decayed_k = T.alloc_local((channels if problem.per_channel else 1,), "float32")
            norms = T.alloc_local((2,), "float32")  # what products of the MMA with k and with q are to be multiplied by
            log_g = T.alloc_local((gates,), "float32")
            log_total = T.alloc_local((gates,), "float32")
            kept = T.alloc_local((gates,), "float32")
            o = T.alloc_local((rows,), "float32")
            r_f = T.alloc_local((rows,), "float32")
            sums = T.alloc_local((2 * rows,), "float32")
            slot = T.alloc_var("int32", sequence)
            if problem.uses_pdl:
                pdl.trigger()
                if not problem.has_indices and of_warp.asks_for_rows(block, thread):
                    prefetch.prefetch(state[sequence, head, first_row, 0], config.rows * config.turns * K * state_bytes)
                of_warp.ask_for_inputs(q, k, v, a, b, sequence, head, first_row, thread)
                if thread == 0:
                    prefetch.prefetch_line(windows[sequence, 0])
                pdl.wait()
            if problem.has_indices:
                slot = indices[sequence]
            if slot >= 0 and slot < slots:
                first, count = windows[sequence, 0], windows[sequence, 1]
                of_warp.load_rows(state, slot, head, first_row, group, lane, raw)
                of_warp.load_vectors(k, sequence, head // heads_per_qk, lane, k_raw)
                of_warp.load_vectors(q, sequence, head // heads_per_qk, lane, q_raw)
                if tokens > 1:
                    of_warp.load_values(v, sequence, head, first_row, group, v_raw)
                is_written = count + tokens > problem.limit
                if tokens > 1:
                    for turn in T.serial(config.turns):
                        row = first_row + turn * config.rows
                        if turn > 0:
                            of_warp.load_rows(state, slot, head, row, group, lane, raw)
                            of_warp.load_values(v, sequence, head, row, group, v_raw)
                        restore(raw, k_ring, r_ring, decay_ring, slot, head, first, count, row, group, lane, log_total, S)
                        if is_written:
                            of_warp.store_rows(state, slot, head, row, group, lane, S)
                            for i in T.unroll(gates):
                                log_total[i] = 0
                        for t in T.unroll(tokens):
                            of_warp.log_gates(a, dt_bias, A_log, sequence, t, head, lane, log_g)
                            beta[0] = 1 / (1 + T.exp(-T.cast(b[sequence, t, head], "float32")))
                            of_warp.vectors(q_raw, k_raw, t, q_f, k_f)
                            for i in T.unroll(gates):
                                log_total[i] += log_g[i]
                            of_warp.step(S, q_f, k_f, v_raw, t, log_g, beta[0], o, r_f)
                            of_warp.store_values(out, sequence, t, head, row, group, lane, o)
                            entry = entry_at(first, count + t)
                            of_warp.store_values(r_ring, slot, entry, head, row, group, lane, r_f)
                            if row == 0:
                                keep(k_ring, decay_ring, slot, entry, head, group, lane, k_f, log_total)
                else:
                    # The weights of the entries serve all rows of the warp, whose state is loaded a turn ahead.
                    of_warp.log_gates(a, dt_bias, A_log, sequence, 0, head, lane, log_g)
                    beta[0] = 1 / (1 + T.exp(-T.cast(b[sequence, 0, head], "float32")))
                    for i in T.unroll(2 * own):
                        mine[i] = 0
                    if count > 0:
                        load_keys(k_ring, decay_ring, slot, head, first, count, 0, group, lane, keys, decays)
                        load_entries(r_ring, slot, head, first, count, 0, first_row, group, lane, r_raw)
                    of_warp.vectors(q_raw, k_raw, 0, q_f, k_f)
                    if by_mma:
                        of_warp.columns_of(k_raw, q_raw, group, kq)
                        of_warp.multiply_rows(kq, 1, kq, of_kq)
                        norms[0] = of_warp.norm_factor(T.shfl_sync(of_kq[0], 0)) if problem.l2_norm else T.float32(1)
                        norms[1] = of_warp.norm_factor(T.shfl_sync(of_kq[1], lanes)) if problem.l2_norm else T.float32(1)
                        qk[0] = T.shfl_sync(of_kq[1], 0) * norms[0] * norms[1]
                    else:
                        qk[0] = 0
                        for i in T.unroll(channels):
                            qk[0] += q_f[i] * k_f[i]
                        of_warp.add_over_lanes(qk, 1)
                    for i in T.unroll(gates):
                        log_total[i] = last_decay(decay_ring, slot, first, count, head, of_warp.channel(lane, i)) + log_g[i]
                    if count > 0:
                        weigh_entries(keys, decays, count, 0, lane, k_f, q_f, kq, norms, log_total, mine)
                    entry = entry_at(first, count)
                    if first_row == 0:
                        for i in T.unroll(gates):
                            kept[i] = T.if_then_else(is_written, log_g[i], log_total[i])
                        keep(k_ring, decay_ring, slot, entry, head, group, lane, k_f, kept)
                    for i in T.unroll(gates):
                        total[i] = T.exp(log_total[i])
                    if problem.per_channel:
                        for i in T.unroll(channels):
                            decayed_k[i] = total[i] * k_f[i]
                            decayed_q[i] = total[i] * q_f[i]
                    for turn in T.serial(config.turns):
                        row = first_row + turn * config.rows
                        own_row = of_warp.row(row, group, of_warp.row_of_lane(lane))
                        of_row = T.cast(v[sequence, 0, head, own_row], "float32")
                        if by_mma:
                            of_warp.multiply_rows(raw, rows, kq, sums)
                            for i in T.unroll(2 * rows):
                                sums[i] *= norms[i % 2] * total[0]
                        elif problem.per_channel:
                            of_warp.products(raw, decayed_k, decayed_q, sums)
                        else:
                            of_warp.products(raw, k_f, q_f, sums)
                            for i in T.unroll(2 * rows):
                                sums[i] *= total[0]
                        if count > 0:
                            add_entries(mine, r_raw, count, 0, lane, sums)
                        if rounds > 1:
                            for chunk in T.serial(1, T.ceildiv(count, at_once)):
                                load_keys(k_ring, decay_ring, slot, head, first, count, chunk, group, lane, keys, decays)
                                load_entries(r_ring, slot, head, first, count, chunk, row, group, lane, r_raw)
                                weigh_entries(keys, decays, count, chunk, lane, k_f, q_f, kq, norms, log_total, mine)
                                add_entries(mine, r_raw, count, chunk, lane, sums)
                        if is_written:
                            if from_lanes:
                                restore_from_lanes(raw, k_ring, decay_ring, slot, head, first, count, thread, r_raw, S)
                            else:
                                restore(raw, k_ring, r_ring, decay_ring, slot, head, first, count, row, group, lane, kept, S)
                            of_warp.store_rows(state, slot, head, row, group, lane, S)
                        if turn < config.turns - 1:
                            of_warp.load_rows(state, slot, head, row + config.rows, group, lane, raw)
                            if count > 0:
                                load_entries(r_ring, slot, head, first, count, 0, row + config.rows, group, lane, r_raw)
                        of_warp.share_sums(sums, 2 * rows, lane)
                        other = T.shfl_xor(sums[0], lanes // (2 * rows))
                        is_of_q = lane // (lanes // (2 * rows)) % 2 == 1
                        r = beta[0] * (of_row - T.if_then_else(is_of_q, other, sums[0]))
                        of_q = T.if_then_else(is_of_q, sums[0], other)
                        if lane % (lanes // rows) == 0:
                            out[sequence, 0, head, own_row] = T.cast(T.float32(problem.scale) * (of_q + qk[0] * r), dtype)
                            r_ring[slot, entry, head, own_row] = r
            else:
                for turn in T.serial(config.turns):
                    of_warp.store_nothing(out, sequence, head, first_row + turn * config.rows, group, lane, slot)

    return gated_delta_replay


def compile_kernel(problem: Problem, batch: int, compile: Callable) -> Callable:
    """Return the compiled kernel for batches that have the configuration of this one."""
    return compile(replay, problem, pick_config(problem, batch), pass_configs=PASS_CONFIGS if problem.uses_pdl else None)

"""One to eight tokens of each sequence without writing the state each time: the last tokens are kept instead, and replayed.

The tokens since the state was written are in a window of a ring of entries, of k, r and the logarithm of the decay since then:

    S = G S_0 + sum over entries i of (G / G_i) r_i k_i^T

is computed in registers from the state S_0 as it was written; then the step is that of `decode`, and the new tokens become
entries. Where they would make the window longer than `limit`, S is written first and the window begins at the new tokens. So a
call reads the state and writes 1 / limit of it on average. Entries that are being read are never overwritten, since the ring
has room for `limit` and the new tokens.

For one token S is only formed where it is written: else the entries' part of S k is the sum of (G / G_i) (k_i . k) r_i, and
that of S q the same with q. These weights serve all rows of a warp, turn after turn.
"""

from collections.abc import Callable

from tvm import tirx

from tilelang_ext import language as T
from tilelang_ext.kernels.gated_delta.config import MAX_WEIGHED, Config, pick_config
from tilelang_ext.kernels.gated_delta.problem import V_UNIT, WARP, Problem
from tilelang_ext.kernels.gated_delta.rows import PASS_CONFIGS, assume_units, macros
from tilelang_ext.kernels.sm90 import pdl, prefetch

_AT_ONCE = 4  # entries whose loads are in flight together where S is restored


def replay(problem: Problem, config: Config):
    """The prim_func: (q, k, v, state, A_log, dt_bias, a, b, indices, windows, k_ring, r_ring, decay_ring, out)."""
    tokens, heads, K, dtype, ring = problem.tokens, problem.heads, problem.K, problem.dtype, problem.ring
    warps, lanes = config.warps, config.lanes
    of_warp = macros(problem, config)
    channels, rows, gates = of_warp.channels, of_warp.rows, of_warp.gates
    heads_per_qk, parts = heads // problem.qk_heads, problem.V // (warps * config.rows * config.turns)
    at_once = max(config.groups, min(lanes, MAX_WEIGHED, 1 << (problem.limit - 1).bit_length()))  # entries, one per lane
    rounds = -(-problem.limit // at_once)
    shares = at_once // config.groups  # entries whose weights a group computes
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
        k_raw = T.alloc_local((_AT_ONCE * channels,), dtype)
        r_raw = T.alloc_local((_AT_ONCE * rows,), "float32")
        logs = T.alloc_local((_AT_ONCE * gates,), "float32")
        for i in T.unroll(gates):
            log_total[i] = last_decay(decay_ring, slot, first, count, head, of_warp.channel(lane, i))
        for i in T.unroll(gates):
            logs[i] = T.exp(log_total[i])
        for i in T.unroll(rows * channels):
            S[i] = logs[i % channels % gates] * T.cast(raw[i], "float32")
        for chunk in T.serial(T.ceildiv(count, _AT_ONCE)):
            for e in T.unroll(_AT_ONCE):
                entry = T.alloc_var("int32", entry_at(first, T.min(chunk * _AT_ONCE + e, count - 1)))
                of_warp.load_vector(k_ring, slot, entry, head // heads_per_qk, lane, k_raw, e)
                for part in T.unroll(rows // together):
                    for i in T.vectorized(together):
                        r_raw[e * rows + part * together + i] = r_ring[
                            slot, entry, head, of_warp.row(first_row, group, part * together + i)
                        ]
                for i in T.unroll(gates):
                    logs[e * gates + i] = decay_at(decay_ring, slot, entry, head, of_warp.channel(lane, i))
            for e in T.unroll(_AT_ONCE):
                for i in T.unroll(gates):
                    weight = T.exp(log_total[i] - logs[e * gates + i])
                    logs[e * gates + i] = T.if_then_else(chunk * _AT_ONCE + e < count, weight, 0)
                for i in T.unroll(channels):
                    weighted = logs[e * gates + i % gates] * T.cast(k_raw[e * channels + i], "float32")
                    for j in T.unroll(rows):
                        S[j * channels + i] += weighted * r_raw[e * rows + j]

    @T.macro
    def load_entries(r_ring, slot, head, first, count, chunk, first_row, group, lane, r_raw):
        """Load r of this lane's entry, of each row."""
        entry = T.alloc_var("int32", entry_at(first, T.min(chunk * at_once + lane, count - 1)))
        for part in T.unroll(rows // together):
            for i in T.vectorized(together):
                r_raw[part * together + i] = r_ring[slot, entry, head, of_warp.row(first_row, group, part * together + i)]

    @T.macro
    def load_keys(k_ring, decay_ring, slot, head, first, count, chunk, group, lane, keys, decays):
        """Load the keys and decays of the entries whose weights this group computes; of a scalar gate this lane's decay."""
        entry = T.alloc_var("int32", entry_at(first, T.min(chunk * at_once + lane, count - 1)))
        if not problem.per_channel:
            decays[0] = decay_ring[slot, entry, head]
        for e in T.unroll(shares):
            entry = entry_at(first, T.min(chunk * at_once + e * config.groups + group, count - 1))
            of_warp.load_vector(k_ring, slot, entry, head // heads_per_qk, lane, keys, e)
            if problem.per_channel:
                for i in T.unroll(channels):
                    decays[e * channels + i] = decay_ring[slot, entry, head, of_warp.channel(lane, i)]

    @T.macro
    def weigh_entries(keys, decays, count, chunk, lane, k_f, q_f, log_gate, mine):
        """Compute (G / G_i) (k_i . k) and (G / G_i) (k_i . q) of this lane's entry: entry chunk * at_once + lane.

        With these weights w the entries' part of S k and of S q is the sum of w r, without S. A group computes those of
        `shares` entries, and each lane then fetches its own.
        """
        weights = T.alloc_local((2 * shares,), "float32")
        decay = T.alloc_var("float32", T.float32(1))
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
        if not problem.per_channel:
            decay = T.exp(log_gate[0] - decays[0])
        for i in T.unroll(2):
            source = lane % config.groups * lanes + (lane // config.groups * 2 + i) * (lanes // (2 * shares))
            fetched = T.shfl_sync(weights[0], source % WARP)
            mine[i] = T.if_then_else(tirx.all(lane < at_once, chunk * at_once + lane < count), fetched * decay, T.float32(0))

    @T.macro
    def add_entries(mine, r_raw, count, chunk, lane, sums):
        """Add the part of this lane's entry of S k and S q for each row."""
        for j in T.unroll(rows):
            r = T.if_then_else(tirx.all(lane < at_once, chunk * at_once + lane < count), r_raw[j], T.float32(0))
            sums[2 * j] += mine[0] * r
            sums[2 * j + 1] += mine[1] * r

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
            r_raw = T.alloc_local((rows,), "float32")
            q_f = T.alloc_local((channels,), "float32")
            k_f = T.alloc_local((channels,), "float32")
            mine = T.alloc_local((2,), "float32")
            qk = T.alloc_local((1,), "float32")
            beta = T.alloc_local((1,), "float32")
            keys = T.alloc_local((shares * channels,), dtype)
            decays = T.alloc_local((shares * channels if problem.per_channel else 1,), "float32")
            total = T.alloc_local((gates,), "float32")
            decayed_q = T.alloc_local((channels,), "float32")
            decayed_k = T.alloc_local((channels,), "float32")
            log_g = T.alloc_local((gates,), "float32")
            log_total = T.alloc_local((gates,), "float32")
            o = T.alloc_local((rows,), "float32")
            r_f = T.alloc_local((rows,), "float32")
            sums = T.alloc_local((2 * rows,), "float32")
            slot = T.alloc_var("int32", sequence)
            if problem.uses_pdl:
                pdl.trigger()
                if not problem.has_indices and thread % WARP == 0:
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
                of_warp.load_values(v, sequence, head, first_row, group, v_raw)
                if tokens == 1:
                    of_warp.log_gates(a, dt_bias, A_log, sequence, 0, head, lane, log_g)
                    beta[0] = 1 / (1 + T.exp(-T.cast(b[sequence, 0, head], "float32")))
                is_written = count + tokens > problem.limit
                if is_written or tokens > 1:
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
                            if tokens > 1:
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
                    for i in T.unroll(gates):
                        log_total[i] = last_decay(decay_ring, slot, first, count, head, of_warp.channel(lane, i)) + log_g[i]
                    mine[0] = 0
                    mine[1] = 0
                    if count > 0:
                        load_keys(k_ring, decay_ring, slot, head, first, count, 0, group, lane, keys, decays)
                        load_entries(r_ring, slot, head, first, count, 0, first_row, group, lane, r_raw)
                    of_warp.vectors(q_raw, k_raw, 0, q_f, k_f)
                    qk[0] = 0
                    for i in T.unroll(channels):
                        qk[0] += q_f[i] * k_f[i]
                    of_warp.add_over_lanes(qk, 1)
                    if count > 0:
                        weigh_entries(keys, decays, count, 0, lane, k_f, q_f, log_total, mine)
                    entry = entry_at(first, count)
                    if first_row == 0:
                        keep(k_ring, decay_ring, slot, entry, head, group, lane, k_f, log_total)
                    for i in T.unroll(gates):
                        total[i] = T.exp(log_total[i])
                    for i in T.unroll(channels):
                        decayed_k[i] = total[i % gates] * k_f[i]
                        decayed_q[i] = total[i % gates] * q_f[i]
                    for turn in T.serial(config.turns):
                        row = first_row + turn * config.rows
                        own_row = of_warp.row(row, group, of_warp.row_of_lane(lane))
                        of_row = T.cast(v[sequence, 0, head, own_row], "float32")
                        of_warp.products(raw, decayed_k, decayed_q, sums)
                        if count > 0:
                            add_entries(mine, r_raw, count, 0, lane, sums)
                        if rounds > 1:
                            for chunk in T.serial(1, T.ceildiv(count, at_once)):
                                load_keys(k_ring, decay_ring, slot, head, first, count, chunk, group, lane, keys, decays)
                                load_entries(r_ring, slot, head, first, count, chunk, row, group, lane, r_raw)
                                weigh_entries(keys, decays, count, chunk, lane, k_f, q_f, log_total, mine)
                                add_entries(mine, r_raw, count, chunk, lane, sums)
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

"""One to eight tokens of each sequence without writing the state each time: the last tokens are kept instead, and replayed.

The tokens since the state was written are in a window of a ring of entries, of k, r and the logarithm of the decay since then:

    S = G S_0 + sum over entries i of (G / G_i) r_i k_i^T

is computed in registers from the state S_0 as it was written; then the step is that of `decode`, and the new tokens become
entries. Where they would make the window longer than `limit`, S is written first and the window begins at the new tokens. So a
call reads the state and writes 1 / limit of it on average. Entries that are being read are never overwritten, since the ring
has room for `limit` and the new tokens.
"""

from collections.abc import Callable

from tilelang_ext import language as T
from tilelang_ext.kernels.gated_delta.problem import WARP, Problem
from tilelang_ext.kernels.gated_delta.rows import PASS_CONFIGS, Config, assume_units, macros, pick_config
from tilelang_ext.kernels.sm90 import pdl, prefetch

_AT_ONCE = 2  # entries whose loads are in flight together


def replay(problem: Problem, config: Config):
    """The prim_func: (q, k, v, state, A_log, dt_bias, a, b, indices, windows, k_ring, r_ring, decay_ring, out)."""
    tokens, heads, K, dtype, ring = problem.tokens, problem.heads, problem.K, problem.dtype, problem.ring
    warps, lanes = config.warps, config.lanes
    of_warp = macros(problem, config)
    channels, rows, gates = of_warp.channels, of_warp.rows, of_warp.gates
    heads_per_qk, parts = heads // problem.qk_heads, problem.V // (warps * config.rows)
    shares = lanes // config.groups  # entries whose weights a group computes at a time
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
                entry = entry_at(first, T.min(chunk * _AT_ONCE + e, count - 1))
                of_warp.load_vector(k_ring, slot, entry, head // heads_per_qk, lane, k_raw, e)
                for j in T.unroll(rows):
                    r_raw[e * rows + j] = r_ring[slot, entry, head, of_warp.row(first_row, group, j)]
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
    def add_entries(k_ring, r_ring, decay_ring, slot, head, first, count, first_row, group, lane, q_f, k_f, log_gate, sums):
        """Add what the entries give to S k and S q of each row: the sum of w r, with w = (G / G_i) (k_i . k), without S."""
        k_raw = T.alloc_local((shares * channels,), dtype)
        r_raw = T.alloc_local((rows,), "float32")
        weights = T.alloc_local((2 * shares,), "float32")
        mine = T.alloc_local((2,), "float32")
        decays = T.alloc_local((gates,), "float32")
        for chunk in T.serial(T.ceildiv(count, lanes)):
            for j in T.unroll(rows):
                mine_entry = entry_at(first, T.min(chunk * lanes + lane, count - 1))
                r_raw[j] = r_ring[slot, mine_entry, head, of_warp.row(first_row, group, j)]
            # A group computes the weights of `shares` entries, and each lane then fetches those of one.
            for e in T.unroll(shares):
                entry = entry_at(first, T.min(chunk * lanes + e * config.groups + group, count - 1))
                of_warp.load_vector(k_ring, slot, entry, head // heads_per_qk, lane, k_raw, e)
            for e in T.unroll(shares):
                number = chunk * lanes + e * config.groups + group
                entry = entry_at(first, T.min(number, count - 1))
                weights[2 * e] = 0
                weights[2 * e + 1] = 0
                for i in T.unroll(gates):
                    decay = T.exp(log_gate[i] - decay_at(decay_ring, slot, entry, head, of_warp.channel(lane, i)))
                    decays[i] = T.if_then_else(number < count, decay, 0)
                for i in T.unroll(channels):
                    weighted = decays[i % gates] * T.cast(k_raw[e * channels + i], "float32")
                    weights[2 * e] += weighted * k_f[i]
                    weights[2 * e + 1] += weighted * q_f[i]
            of_warp.add_over_lanes(weights, 2 * shares)
            for i in T.unroll(2):
                mine[i] = 0
                for e in T.unroll(shares):
                    fetched = T.shfl_sync(weights[2 * e + i], lane % config.groups * lanes)
                    if lane // config.groups == e:
                        mine[i] = fetched
            for j in T.unroll(rows):
                sums[2 * j] += mine[0] * r_raw[j]
                sums[2 * j + 1] += mine[1] * r_raw[j]

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
            part, head, sequence = block % parts, block // parts % heads, block // (parts * heads)
            assume_units(q, k, v, state)
            thread = T.get_thread_binding()
            lane, group = thread % lanes, thread % WARP // lanes
            first_row = (part * warps + thread // WARP) * config.rows
            raw = T.alloc_local((rows * channels,), problem.state_dtype)
            S = T.alloc_local((rows * channels,), "float32")
            q_raw = T.alloc_local((tokens * channels,), dtype)
            k_raw = T.alloc_local((tokens * channels,), dtype)
            v_raw = T.alloc_local((tokens * rows,), dtype)
            q_f = T.alloc_local((channels,), "float32")
            k_f = T.alloc_local((channels,), "float32")
            log_g = T.alloc_local((gates,), "float32")
            log_total = T.alloc_local((gates,), "float32")
            o = T.alloc_local((rows,), "float32")
            r_f = T.alloc_local((rows,), "float32")
            sums = T.alloc_local((2 * rows + 1,), "float32")
            slot = T.alloc_var("int32", sequence)
            if problem.uses_pdl:
                pdl.trigger()
                if not problem.has_indices and thread % WARP == 0:
                    prefetch.prefetch(state[sequence, head, first_row, 0], config.rows * K * state_bytes)
                pdl.wait()
            if problem.has_indices:
                slot = indices[sequence]
            if slot >= 0 and slot < slots:
                first, count = windows[sequence, 0], windows[sequence, 1]
                of_warp.load_rows(state, slot, head, first_row, group, lane, raw)
                of_warp.load_vectors(k, sequence, head // heads_per_qk, lane, k_raw)
                of_warp.load_vectors(q, sequence, head // heads_per_qk, lane, q_raw)
                of_warp.load_values(v, sequence, head, first_row, group, v_raw)
                is_written = count + tokens > problem.limit
                if is_written or tokens > 1:
                    restore(raw, k_ring, r_ring, decay_ring, slot, head, first, count, first_row, group, lane, log_total, S)
                else:
                    for i in T.unroll(rows * channels):
                        S[i] = T.cast(raw[i], "float32")
                    for i in T.unroll(gates):
                        log_total[i] = last_decay(decay_ring, slot, first, count, head, of_warp.channel(lane, i))
                if is_written:
                    of_warp.store_rows(state, slot, head, first_row, group, lane, S)
                    for i in T.unroll(gates):
                        log_total[i] = 0
                for t in T.unroll(tokens):
                    of_warp.log_gates(a, dt_bias, A_log, sequence, t, head, lane, log_g)
                    beta = 1 / (1 + T.exp(-T.cast(b[sequence, t, head], "float32")))
                    of_warp.vectors(q_raw, k_raw, t, q_f, k_f)
                    for i in T.unroll(gates):
                        log_total[i] += log_g[i]
                    if tokens > 1:
                        of_warp.step(S, q_f, k_f, v_raw, t, log_g, beta, o, r_f)
                    else:
                        of_warp.add_up(S, q_f, k_f, log_total, sums)
                        if not is_written:
                            add_entries(
                                k_ring, r_ring, decay_ring, slot, head, first, count, first_row, group, lane, q_f, k_f,
                                log_total, sums,
                            )  # fmt: skip
                        of_warp.add_over_lanes(sums, 2 * rows + 1)
                        of_warp.update(S, k_f, v_raw, t, beta, sums, o, r_f)
                    of_warp.store_values(out, sequence, t, head, first_row, group, lane, o)
                    entry = entry_at(first, count + t)
                    of_warp.store_values(r_ring, slot, entry, head, first_row, group, lane, r_f)
                    if first_row == 0:
                        keep(k_ring, decay_ring, slot, entry, head, group, lane, k_f, log_total)
            else:
                of_warp.store_nothing(out, sequence, head, first_row, group, lane, slot)

    return gated_delta_replay


def compile_kernel(problem: Problem, batch: int, compile: Callable) -> Callable:
    """Return the compiled kernel for batches that have the configuration of this one."""
    return compile(replay, problem, pick_config(problem, batch), pass_configs=PASS_CONFIGS if problem.uses_pdl else None)

"""One to eight tokens of each sequence: every element of the state is read once, stays in registers, and is written once.

Loads of all rows and tokens are issued before any arithmetic, since the time is that of the state's bytes: at 4.25 TB/s (H200)
0.49 us per sequence of 8 heads of 128 x 128 in float32, read and written.
"""

from collections.abc import Callable

from tilelang_ext import language as T
from tilelang_ext.kernels.gated_delta.config import Config, pick_config
from tilelang_ext.kernels.gated_delta.problem import WARP, Problem
from tilelang_ext.kernels.gated_delta.rows import PASS_CONFIGS, assume_units, macros
from tilelang_ext.kernels.sm90 import pdl, prefetch

SHARED_BYTES, RESERVED_BYTES = 228 * 1024, 1024  # of an SM of Hopper, and of each of its blocks


def decode(problem: Problem, config: Config):
    """The prim_func: (q, k, v, state, A_log, dt_bias, a, b, indices, accepted, out, new_state)."""
    tokens, heads, dtype = problem.tokens, problem.heads, problem.dtype
    warps, lanes = config.warps, config.lanes
    of_warp = macros(problem, config)
    channels, rows, gates = of_warp.channels, of_warp.rows, of_warp.gates
    heads_per_qk, parts = heads // problem.qk_heads, problem.V // (warps * config.rows)
    state_bytes = T.dtype(problem.state_dtype).bits // 8
    types = problem.types()
    new_state_type = problem.state_type("new_state")
    num_accepted = T.dynamic("num_accepted")

    @T.macro
    def occupy(thread):
        """Allocate so much shared memory that no more blocks fit on an SM. It is written so that it is not left out."""
        room = T.alloc_shared((SHARED_BYTES // config.max_blocks_per_sm - RESERVED_BYTES,), "uint8")
        room[thread] = T.uint8(0)

    @T.macro
    def run(q, k, v, state, A_log, dt_bias, a, b, indices, accepted, out, target):
        with T.Kernel(q.shape[0] * heads * parts, threads=warps * WARP) as block:
            if problem.uses_pdl:
                prefetch.declare()
            part, head, sequence = block % parts, block // parts % heads, block // (parts * heads)
            assume_units(q, k, v, state, target)
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
            o = T.alloc_local((rows,), "float32")
            r_f = T.alloc_local((rows,), "float32")
            slot = T.alloc_var("int32", sequence)
            if problem.uses_pdl:
                pdl.trigger()
                if not problem.has_indices and of_warp.asks_for_rows(block, thread):
                    prefetch.prefetch(state[sequence, head, first_row, 0], config.rows * problem.K * state_bytes)
                if not problem.in_place:
                    of_warp.ask_for_inputs(q, k, v, a, b, sequence, head, first_row, thread)
                pdl.wait()
            if problem.has_indices:
                slot = indices[sequence]
            if slot >= 0 and slot < state.shape[0]:
                of_warp.load_rows(state, slot, head, first_row, group, lane, raw)
                of_warp.load_vectors(k, sequence, head // heads_per_qk, lane, k_raw)
                of_warp.load_vectors(q, sequence, head // heads_per_qk, lane, q_raw)
                of_warp.load_values(v, sequence, head, first_row, group, v_raw)
                for i in T.unroll(rows * channels):
                    S[i] = T.cast(raw[i], "float32")
                if problem.has_accepted and not problem.in_place and accepted[sequence] <= 0:
                    of_warp.store_rows(target, slot, head, first_row, group, lane, S)
                for t in T.unroll(tokens):
                    of_warp.log_gates(a, dt_bias, A_log, sequence, t, head, lane, log_g)
                    beta = 1 / (1 + T.exp(-T.cast(b[sequence, t, head], "float32")))
                    of_warp.vectors(q_raw, k_raw, t, q_f, k_f)
                    of_warp.step(S, q_f, k_f, v_raw, t, log_g, beta, o, r_f)
                    of_warp.store_values(out, sequence, t, head, first_row, group, lane, o)
                    if problem.each_token:
                        of_warp.store_rows(target, sequence * tokens + t, head, first_row, group, lane, S)
                    elif problem.has_accepted and T.min(accepted[sequence], tokens) == t + 1:
                        of_warp.store_rows(target, slot, head, first_row, group, lane, S)
                if not problem.each_token and not problem.has_accepted:
                    of_warp.store_rows(target, slot, head, first_row, group, lane, S)
            else:
                of_warp.store_nothing(out, sequence, head, first_row, group, lane, slot)
                if config.max_blocks_per_sm:
                    occupy(thread)

    @T.prim_func
    def gated_delta_decode(
        q: types.q,
        k: types.k,
        v: types.v,
        state: types.state,
        A_log: types.A_log,
        dt_bias: types.dt_bias,
        a: types.a,
        b: types.b,
        indices: types.indices,
        accepted: T.Tensor((num_accepted,), "int32"),
        out: types.out,
        new_state: new_state_type,
    ):
        target = state if problem.in_place else new_state
        run(q, k, v, state, A_log, dt_bias, a, b, indices, accepted, out, target)

    return gated_delta_decode


def compile_kernel(problem: Problem, batch: int, compile: Callable) -> Callable:
    """Return the compiled kernel for batches that have the configuration of this one."""
    return compile(decode, problem, pick_config(problem, batch), pass_configs=PASS_CONFIGS if problem.uses_pdl else None)

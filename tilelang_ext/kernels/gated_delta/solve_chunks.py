"""What the chunks of `gated_delta_prefill` need besides states: T, A and the factors of tokens, one block per chunk and head.

Two GEMMs, K K^T and Q K^T, then (I + L) T = diag(beta) column by column: a thread keeps a column of T in registers and
subtracts from what is below an element its multiples of L's column, which is stored as a row, so that four elements are one
load. Forward substitution is as exact as float32 is, whatever the keys; powers of L, by which the inverse could be had with
MMAs alone, grow without bound where neighbouring keys are alike.
"""

from collections.abc import Callable

from tilelang_ext import language as T
from tilelang_ext.kernels.gated_delta.prefill_problem import PrefillProblem, alloc_span, find_chunk
from tilelang_ext.kernels.gated_delta.rows import LINEAR_FROM, NORM_EPS
from tilelang_ext.kernels.sm90 import pdl

_THREADS = 128
_LEAST_LOG_G = -100.0  # exp of it is 0 in float32; sums of less would lose the digits of what comes after
_WIDTH = 4  # elements of a load of float32


def _log_g(A_log, x):
    softplus = T.if_then_else(x > LINEAR_FROM, x, T.max(x, 0) + T.log(1 + T.exp(-T.abs(x))))
    return T.max(-T.exp(A_log) * softplus, T.float32(_LEAST_LOG_G))


def solve_chunks(problem: PrefillProblem):
    """The prim_func (q, k, A_log, dt_bias, a, b, cu_seqlens, solution, scores, factors)."""
    C, K, heads, dtype, types = problem.chunk, problem.K, problem.heads, problem.dtype, problem.types()
    heads_per_qk = heads // problem.qk_heads

    @T.macro
    def token_factors(A_log, dt_bias, a, b, head, span, thread, log_s, sum_s, beta_s):
        """Per token: beta, and the sum of log g from the chunk's first token on. Past the last token both add nothing."""
        if thread < C:
            token = T.min(span.first + thread, a.shape[1] - 1)
            is_here = thread < span.tokens
            x = T.cast(a[span.batch, token, head], "float32") + dt_bias[head]
            log_s[thread] = T.if_then_else(is_here, _log_g(A_log[head], x), T.float32(0))
            beta = 1 / (1 + T.exp(-T.cast(b[span.batch, token, head], "float32")))
            beta_s[thread] = T.if_then_else(is_here, beta, T.float32(0))
        T.sync_threads()
        if thread < C:
            total = T.alloc_var("float32", init=0.0)
            for i in T.unroll(C):
                total = total + T.if_then_else(i <= thread, log_s[i], T.float32(0))
            sum_s[thread] = total

    @T.macro
    def inverse_norms(rows_s, span, norm_s):
        """Per token: what its vector is multiplied by; 0 past the last token, which tells it from the others."""
        if problem.l2_norm:
            rows_f = T.alloc_fragment((C, K), "float32")
            norm_f = T.alloc_fragment((C,), "float32")
            T.copy(rows_s, rows_f)
            for i, j in T.Parallel(C, K):
                rows_f[i, j] = rows_f[i, j] * rows_f[i, j]
            T.reduce_sum(rows_f, norm_f, dim=1)
            for i in T.Parallel(C):
                norm_s[i] = T.if_then_else(i < span.tokens, T.rsqrt(norm_f[i] + T.float32(NORM_EPS)), T.float32(0))
        else:
            for i in T.Parallel(C):
                norm_s[i] = T.if_then_else(i < span.tokens, T.float32(1), T.float32(0))

    @T.macro
    def solve(L_s, beta_s, solution, tile, thread):
        """A thread's column of T; L_s[j, i] is L[i, j]."""
        column = T.alloc_local((C,), "float32")
        below = T.alloc_local((_WIDTH,), "float32")
        if thread < C:
            for i in T.unroll(C):
                column[i] = T.if_then_else(i == thread, T.float32(1), T.float32(0))
            for j in T.unroll(C - 1):
                for part in T.unroll(C // _WIDTH):
                    if part * _WIDTH + _WIDTH - 1 > j:
                        for e in T.vectorized(_WIDTH):
                            below[e] = L_s[j, part * _WIDTH + e]
                        for e in T.unroll(_WIDTH):
                            column[part * _WIDTH + e] = column[part * _WIDTH + e] - below[e] * column[j]
            beta = beta_s[thread]
            for i in T.unroll(C):
                solution[tile, i, thread] = T.cast(column[i] * beta, dtype)

    @T.prim_func
    def solve_chunks(
        q: types.q,
        k: types.k,
        A_log: types.A_log,
        dt_bias: types.dt_bias,
        a: types.a,
        b: types.b,
        cu_seqlens: types.cu_seqlens,
        solution: types.solution,
        scores: types.scores,
        factors: types.factors,
    ):
        with T.Kernel(solution.shape[0], threads=_THREADS) as tile:
            q_s = T.alloc_shared((C, K), dtype)
            k_s = T.alloc_shared((C, K), dtype)
            L_s = T.alloc_shared((C, C + _WIDTH), "float32")  # the lanes of an accumulator write to different banks
            log_s = T.alloc_shared((C,), "float32")
            sum_s = T.alloc_shared((C,), "float32")
            beta_s = T.alloc_shared((C,), "float32")
            q_norm_s = T.alloc_shared((C,), "float32")
            k_norm_s = T.alloc_shared((C,), "float32")
            kk_f = T.alloc_fragment((C, C), "float32")
            qk_f = T.alloc_fragment((C, C), "float32")
            thread = T.get_thread_binding()
            slot, head = tile // heads, tile % heads
            span = alloc_span()
            if problem.uses_pdl:
                pdl.wait()
            find_chunk(problem, q, cu_seqlens, slot, span)
            if span.tokens > 0:
                T.copy(k[span.batch, span.first : span.first + C, head // heads_per_qk, 0:K], k_s)
                T.copy(q[span.batch, span.first : span.first + C, head // heads_per_qk, 0:K], q_s)
                token_factors(A_log, dt_bias, a, b, head, span, thread, log_s, sum_s, beta_s)
                inverse_norms(k_s, span, k_norm_s)
                inverse_norms(q_s, span, q_norm_s)
                T.fill(kk_f, 0)
                T.fill(qk_f, 0)
                T.gemm(k_s, k_s, kk_f, transpose_B=True)
                T.gemm(q_s, k_s, qk_f, transpose_B=True)
                for i, j in T.Parallel(C, C):
                    decay = T.exp(T.min(sum_s[i] - sum_s[j], T.float32(0)))
                    is_here = k_norm_s[i] > 0
                    L = beta_s[i] * decay * k_norm_s[i] * k_norm_s[j] * kk_f[i, j]
                    A = T.float32(problem.scale) * decay * q_norm_s[i] * k_norm_s[j] * qk_f[i, j]
                    L_s[j, i] = T.if_then_else(j < i, T.if_then_else(is_here, L, T.float32(0)), T.float32(0))
                    qk_f[i, j] = T.if_then_else(j <= i, T.if_then_else(is_here, A, T.float32(0)), T.float32(0))
                T.copy(qk_f, scores[tile, 0:C, 0:C])
                if thread < C:
                    total, last = sum_s[thread], sum_s[C - 1]
                    factors[tile, 0, thread] = T.exp(total) * k_norm_s[thread]
                    factors[tile, 1, thread] = T.exp(last - total) * k_norm_s[thread]
                    factors[tile, 2, thread] = T.float32(problem.scale) * T.exp(total) * q_norm_s[thread]
                    factors[tile, 3, thread] = T.exp(last)
                T.sync_threads()
                solve(L_s, beta_s, solution, tile, thread)

    return solve_chunks


def compile_kernel(problem: PrefillProblem, device) -> Callable:
    """Return the compiled kernel."""
    return device.compile(solve_chunks, problem)

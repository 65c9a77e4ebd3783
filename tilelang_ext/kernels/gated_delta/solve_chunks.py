"""What the chunks of `gated_delta_prefill` need besides states: T, A and the factors of tokens, one block per chunk and head.

Two GEMMs, K K^T and Q K^T, then (I + L) T = diag(beta) column by column: two threads keep a column of T in registers and
subtract from what is below an element its multiples of L's column, which is stored as a row, so that four elements are one
load. Forward substitution is as exact as float32 is, whatever the keys; powers of L, by which the inverse could be had with
MMAs alone, grow without bound where neighbouring keys are alike.
"""

from collections.abc import Callable

from tilelang_ext import language as T
from tilelang_ext.kernels.gated_delta.prefill_problem import PrefillProblem, alloc_span, find_chunk
from tilelang_ext.kernels.gated_delta.rows import LINEAR_FROM, NORM_EPS
from tilelang_ext.kernels.sm90 import pdl

_THREADS = 128
_BLOCKS_PER_SM = 4  # or the compiler would load what is below for many steps ahead, into 232 registers
_LEAST_LOG_G = -100.0  # exp of it is 0 in float32; sums of less would lose the digits of what comes after
_WIDTH = 4  # elements of a load of float32


def _log_g(A_log, x):
    softplus = T.if_then_else(x > LINEAR_FROM, x, T.max(x, 0) + T.log(1 + T.exp(-T.abs(x))))
    return T.max(-T.exp(A_log) * softplus, T.float32(_LEAST_LOG_G))


def solve_chunks(problem: PrefillProblem):
    """The prim_func (q, k, A_log, dt_bias, a, b, cu_seqlens, solution, scores, factors)."""
    C, K, heads, dtype, types = problem.chunk, problem.K, problem.heads, problem.dtype, problem.types()
    heads_per_qk = heads // problem.qk_heads

    def row(e, own):
        """Return the row of element e of the even or the odd half of a column."""
        return (e // _WIDTH * 2 + own) * _WIDTH + e % _WIDTH

    def place(row):
        """Return the element of its half that a row is."""
        return row // (2 * _WIDTH) * _WIDTH + row % _WIDTH

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
        """Half of a column of T, which two neighbouring threads share: four rows each in turn; L_s[j, i] is L[i, j]."""
        own_rows = T.alloc_local((C // 2,), "float32")
        below = T.alloc_local((_WIDTH,), "float32")
        column, parity = thread // 2, thread % 2
        if thread < 2 * C:
            for e in T.unroll(C // 2):
                own_rows[e] = T.if_then_else(row(e, parity) == column, T.float32(1), T.float32(0))
            for j in T.unroll(C - 1):
                from_other = T.shfl_xor(own_rows[place(j)], 1)
                x = T.if_then_else(parity == j // _WIDTH % 2, own_rows[place(j)], from_other)
                for part in T.unroll(C // 2 // _WIDTH):
                    if row(part * _WIDTH + _WIDTH - 1, 1) > j:
                        for e in T.vectorized(_WIDTH):
                            below[e] = L_s[j, row(part * _WIDTH, parity) + e]
                        for e in T.unroll(_WIDTH):
                            own_rows[part * _WIDTH + e] = own_rows[part * _WIDTH + e] - below[e] * x
            beta = beta_s[column]
            for e in T.unroll(C // 2):
                solution[tile, row(e, parity), column] = T.cast(own_rows[e] * beta, dtype)

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
            sum_of_row = T.alloc_fragment((C,), "float32")
            L_of_row = T.alloc_fragment((C,), "float32")
            A_of_row = T.alloc_fragment((C,), "float32")
            sum_of_column = T.alloc_fragment((C,), "float32")
            of_column = T.alloc_fragment((C,), "float32")
            if problem.target_kind == "cuda":
                T.annotate_min_blocks_per_sm(_BLOCKS_PER_SM)
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
                for i in T.Parallel(C):
                    sum_of_row[i] = sum_s[i]
                    L_of_row[i] = beta_s[i] * k_norm_s[i]
                    A_of_row[i] = T.float32(problem.scale) * q_norm_s[i]
                for j in T.Parallel(C):
                    sum_of_column[j] = sum_s[j]
                    of_column[j] = k_norm_s[j]
                for i, j in T.Parallel(C, C):
                    decay = T.exp(T.min(sum_of_row[i] - sum_of_column[j], T.float32(0))) * of_column[j]
                    L = L_of_row[i] * decay * kk_f[i, j]
                    A = A_of_row[i] * decay * qk_f[i, j]
                    L_s[j, i] = T.if_then_else(j < i, T.if_then_else(L_of_row[i] != 0, L, T.float32(0)), T.float32(0))
                    qk_f[i, j] = T.if_then_else(j <= i, T.if_then_else(A_of_row[i] != 0, A, T.float32(0)), T.float32(0))
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
    return device.compile(solve_chunks, problem.without_states())

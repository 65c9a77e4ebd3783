"""From chunk to chunk on every target: results and states by tiles, one block per sequence, head and slice of V.

The kernel for every problem. The state of a slice is an accumulator, and is rounded to the dtype of q where an MMA reads it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tilelang_ext import language as T
from tilelang_ext.kernels.gated_delta.prefill_problem import (
    FACTORS,
    MAX_SEQUENCES,
    PrefillProblem,
    alloc_span,
    find_sequence,
)


@dataclass(frozen=True)
class Config:
    """Rows of the state of a block, and its threads."""

    block_V: int
    threads: int


def pick_config(problem: PrefillProblem) -> Config:
    """Return the configuration; none has been timed. On Metal q, k, S, T and R take 27 of the 32 KB of a threadgroup."""
    if problem.target_kind == "metal":
        return Config(16, 128)
    if problem.V % 32:
        # Two blocks of an AMD matrix instruction, for two waves of 32 lanes.
        return Config(16, 64 if problem.target_kind == "hip" else 128)
    return Config(32, 128)


def scan_chunks(problem: PrefillProblem, config: Config):
    """The prim_func (q, k, v, solution, scores, factors, cu_seqlens, initial, out, final)."""
    C, K, V, heads, dtype = problem.chunk, problem.K, problem.V, problem.heads, problem.dtype
    block_V, types = config.block_V, problem.types()
    slices, heads_per_qk = V // block_V, heads // problem.qk_heads

    @T.macro
    def load_keys(k, span, first, rows, head, k_s):
        """Rows past the end of a sequence are cleared: 0 times an infinity of another one would be NaN."""
        if problem.has_lengths:
            for i, j in T.Parallel(C, K):
                k_s[i, j] = T.if_then_else(
                    i < rows, k[span.batch, T.min(first + i, k.shape[1] - 1), head // heads_per_qk, j], T.cast(0, dtype)
                )
        else:
            T.copy(k[span.batch, first : first + C, head // heads_per_qk, 0:K], k_s)

    @T.prim_func
    def scan_chunks(
        q: types.q,
        k: types.k,
        v: types.v,
        solution: types.solution,
        scores: types.scores,
        factors: types.factors,
        cu_seqlens: types.cu_seqlens,
        initial: types.initial,
        out: types.out,
        final: types.final,
    ):
        with T.Kernel(final.shape[0] * heads * slices, threads=config.threads) as block:
            q_s = T.alloc_shared((C, K), dtype)
            k_s = T.alloc_shared((C, K), dtype)
            S_s = T.alloc_shared((block_V, K), dtype)
            matrix_s = T.alloc_shared((C, C), dtype)  # T, then A
            X_s = T.alloc_shared((C, block_V), dtype)
            R_s = T.alloc_shared((C, block_V), dtype)
            factor_s = T.alloc_shared((FACTORS, C), "float32")
            S_f = T.alloc_fragment((block_V, K), "float32")
            X_f = T.alloc_fragment((C, block_V), "float32")
            R_f = T.alloc_fragment((C, block_V), "float32")
            O_f = T.alloc_fragment((C, block_V), "float32")
            column, head, sequence = block % slices * block_V, block // slices % heads, block // (slices * heads)
            span = alloc_span()
            find_sequence(problem, q, cu_seqlens, sequence, span)
            if problem.has_initial:
                T.copy(initial[sequence, head, column : column + block_V, 0:K], S_f)
            else:
                T.fill(S_f, 0)
            for chunk in T.serial(T.ceildiv(span.tokens, C)):
                first, rows = span.first + chunk * C, span.tokens - chunk * C
                tile = (span.slot + chunk) * heads + head
                T.copy(S_f, S_s)
                load_keys(k, span, first, rows, head, k_s)
                T.copy(q[span.batch, first : first + C, head // heads_per_qk, 0:K], q_s)
                T.copy(solution[tile, 0:C, 0:C], matrix_s)
                T.copy(factors[tile, 0:FACTORS, 0:C], factor_s)
                T.fill(X_f, 0)
                T.gemm(k_s, S_s, X_f, transpose_B=True)
                for i, j in T.Parallel(C, block_V):
                    X_f[i, j] = T.if_then_else(
                        i < rows,
                        T.cast(v[span.batch, T.min(first + i, v.shape[1] - 1), head, column + j], "float32")
                        - factor_s[0, i] * X_f[i, j],
                        T.float32(0),
                    )
                T.copy(X_f, X_s)
                T.fill(R_f, 0)
                T.gemm(matrix_s, X_s, R_f)
                T.fill(O_f, 0)
                T.gemm(q_s, S_s, O_f, transpose_B=True)
                for i, j in T.Parallel(C, block_V):
                    O_f[i, j] = factor_s[2, i] * O_f[i, j]
                T.copy(R_f, R_s)
                T.copy(scores[tile, 0:C, 0:C], matrix_s)
                T.gemm(matrix_s, R_s, O_f)
                for i, j in T.Parallel(C, block_V):
                    if i < rows:
                        out[span.batch, first + i, head, column + j] = T.cast(O_f[i, j], dtype)
                for i, j in T.Parallel(C, block_V):
                    R_f[i, j] = factor_s[1, i] * R_f[i, j]
                T.copy(R_f, X_s)
                for i, j in T.Parallel(block_V, K):
                    S_f[i, j] = factor_s[3, 0] * S_f[i, j]
                T.gemm(X_s, k_s, S_f, transpose_A=True)
            T.copy(S_f, final[sequence, head, column : column + block_V, 0:K])

    return scan_chunks


def takes(problem: PrefillProblem) -> bool:
    """Take every problem."""
    return True


def sequences_served(problem: PrefillProblem, sequences: int) -> tuple[int, int]:
    """Return the fewest and the most sequences that have the kernel of this number."""
    return 1, MAX_SEQUENCES


def compile_kernel(problem: PrefillProblem, sequences: int, device) -> Callable:
    """Return the compiled kernel."""
    return device.compile(scan_chunks, problem, pick_config(problem))

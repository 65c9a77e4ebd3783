"""Attention by tiles, on every target: a loop over key blocks around two `T.gemm` and an online softmax.

    S = q k^T;  m' = max(m, rows of S);  P = 2^(scale (S - m'));  l = a l + rows of P;  O = a O + P v,  a = 2^(scale (m - m'))

The kernel for every problem. A block has `block_M` queries of one head, and `columns` of its value columns: where a wide head
has more, the third dimension of the grid takes them in passes, each of which computes S again, so that O fits in registers and
a block of values in shared memory. `sm90_forward` comes before it in `launch.KERNELS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.probabilities import round_to_fragment, round_to_shared
from tilelang_ext.kernels.attention.problem import LOG2_E, Problem
from tilelang_ext.kernels.attention.tiles import alloc_tile, locate, of_head, prim_func, row_tiles
from tilelang_ext.marks import ROLLED_K

_LANES = 64  # channels come in multiples of these: what lies past head_dim is zero


@dataclass(frozen=True)
class Config:
    """Queries and keys of a tile, channels of q and k in shared memory at a time, value columns of a pass, threads, and whether
    P goes through shared memory.
    """

    block_M: int
    block_N: int
    block_K: int
    columns: int
    threads: int
    shares_P: bool = False


def pick_config(problem: Problem) -> Config:
    """Return the configuration for the device: none but Hopper's has been timed."""
    channels = -(-problem.head_dim // _LANES) * _LANES
    if problem.target_kind == "metal":
        # q, k and v take 4, 4 and 16 KB of the 32 KB of threadgroup memory, or 8 KB each.
        return Config(32, 32, channels if channels <= 128 else 64, min(channels, 256), 128)
    # At most 16 + 16 + 16 + 8 KB of the 64 KB of LDS of AMD; O takes 64 registers of a thread.
    # On RDNA the accumulator of a matrix instruction lies otherwise than its left operand.
    is_rdna = problem.arch.startswith("gfx1")
    return Config(64, 64, channels if channels <= 128 else 64, min(channels, 128), 128, is_rdna)


def attention(problem: Problem, config: Config):
    """The prim_func of `tiles.prim_func`."""
    dtype, D = problem.result, problem.head_dim
    block_M, block_N, block_K, columns = config.block_M, config.block_N, config.block_K, config.columns
    k_steps = -(-D // block_K)
    annotations = {ROLLED_K: True} if problem.arch.startswith("gfx11") else None

    @T.macro
    def load(source, batch, row, head, channel, to_s):
        if problem.is_fp8:
            for i, j in T.Parallel(*to_s.shape):
                to_s[i, j] = T.if_then_else(
                    (row + i < source.shape[1]) & (channel + j < D),
                    T.cast(source[batch, T.min(row + i, source.shape[1] - 1), head, T.min(channel + j, D - 1)], dtype),
                    T.cast(0, dtype),
                )
        else:
            T.copy(source[batch, row : row + to_s.shape[0], head, channel : channel + to_s.shape[1]], to_s)

    @T.macro
    def load_values(v, tile, key, column, v_s):
        """Rows past the end of a sequence are cleared: 0 times an infinity of another one would be NaN."""
        if problem.has_lengths:
            for i, j in T.Parallel(block_N, columns):
                v_s[i, j] = T.if_then_else(
                    (key + i < tile.last) & (column + j < D),
                    T.cast(v[tile.batch, T.min(key + i, tile.last - 1), tile.kv_head, T.min(column + j, D - 1)], dtype),
                    T.cast(0, dtype),
                )
        else:
            load(v, tile.batch, key, tile.kv_head, column, v_s)

    def alloc_probabilities():
        return (T.alloc_shared if config.shares_P else T.alloc_fragment)((block_M, block_N), dtype)

    @T.macro
    def emit(operands):
        q, k, v, sinks, out, lse = operands.q, operands.k, operands.v, operands.sinks, operands.out, operands.lse
        with T.Kernel(
            row_tiles(problem, operands, block_M), q.shape[0] * q.shape[2], T.ceildiv(D, columns), threads=config.threads
        ) as (bx, by, bz):
            q_s = T.alloc_shared((block_M, block_K), dtype)
            k_s = T.alloc_shared((block_N, block_K), dtype)
            v_s = T.alloc_shared((block_N, columns), dtype)
            S = T.alloc_fragment((block_M, block_N), "float32")
            P = alloc_probabilities()
            O = T.alloc_fragment((block_M, columns), "float32")
            m = T.alloc_fragment((block_M,), "float32")
            m_old = T.alloc_fragment((block_M,), "float32")
            l = T.alloc_fragment((block_M,), "float32")
            l_block = T.alloc_fragment((block_M,), "float32")
            a = T.alloc_fragment((block_M,), "float32")
            tile = alloc_tile(problem, block_N)
            locate(operands, block_M, bx, by, tile)
            T.fill(O, 0)
            T.fill(l, 0)
            T.fill(m, -T.infinity("float32"))
            scale = T.alloc_var("float32", problem.scale_log2)
            v_scale = T.alloc_var("float32", 1.0)
            if problem.is_fp8:
                scale = scale * of_head(operands.q_scale, tile.head) * of_head(operands.k_scale, tile.kv_head)
                v_scale = of_head(operands.v_scale, tile.kv_head)
            if k_steps == 1:
                load(q, tile.batch, tile.query, tile.head, 0, q_s)
            for n in T.serial(tile.num_blocks):
                key = tile.key(n)
                T.fill(S, 0)
                for step in T.serial(k_steps):
                    if k_steps > 1:
                        load(q, tile.batch, tile.query, tile.head, step * block_K, q_s)
                    load(k, tile.batch, key, tile.kv_head, step * block_K, k_s)
                    T.gemm(q_s, k_s, S, transpose_B=True, policy=T.GemmWarpPolicy.FullRow, annotations=annotations)
                load_values(v, tile, key, bz * columns, v_s)
                for i, j in T.Parallel(block_M, block_N):
                    S[i, j] = T.if_then_else(
                        (key + j < tile.end_key(i)) & (key + j >= tile.first_key(i)),
                        S[i, j] * scale,
                        -T.infinity("float32"),
                    )
                T.copy(m, m_old)
                T.reduce_max(S, m, dim=1, clear=False)
                for i in T.Parallel(block_M):
                    # A row that has seen no key yet: -inf - -inf would be NaN.
                    m[i] = T.max(m[i], T.float32(-1e30))
                    a[i] = T.exp2(m_old[i] - m[i])
                for i, j in T.Parallel(block_M, block_N):
                    S[i, j] = T.exp2(S[i, j] - m[i])
                T.reduce_sum(S, l_block, dim=1)
                for i in T.Parallel(block_M):
                    l[i] = l[i] * a[i] + l_block[i]
                for i, j in T.Parallel(block_M, columns):
                    O[i, j] *= a[i]
                (round_to_shared if config.shares_P else round_to_fragment)(S, P)
                T.gemm(P, v_s, O, policy=T.GemmWarpPolicy.FullRow)
            for i in T.Parallel(block_M):
                m[i] = T.if_then_else(l[i] > T.float32(0), m[i], -T.infinity("float32"))
                a[i] = T.if_then_else(l[i] > T.float32(0), T.float32(1), T.float32(0))
                if problem.has_sinks:
                    m_old[i] = T.max(T.max(m[i], sinks[tile.head] * T.float32(LOG2_E)), T.float32(-1e30))
                    a[i] = T.exp2(m[i] - m_old[i])
                    l[i] = l[i] * a[i] + T.exp2(sinks[tile.head] * T.float32(LOG2_E) - m_old[i])
                    m[i] = m_old[i]
                a[i] = T.if_then_else(l[i] > T.float32(0), v_scale * a[i] / l[i], T.float32(0))
            for i, j in T.Parallel(block_M, columns):
                if (tile.query + i < tile.end) & (bz * columns + j < D):
                    out[tile.batch, tile.query + i, tile.head, bz * columns + j] = T.cast(O[i, j] * a[i], dtype)
            if bz == 0:
                for i in T.Parallel(block_M):
                    if tile.query + i < tile.end:
                        lse[tile.batch, tile.head, tile.query + i] = T.if_then_else(
                            l[i] > T.float32(0), (m[i] + T.log2(l[i])) * T.float32(1 / LOG2_E), -T.infinity("float32")
                        )

    return prim_func(problem, emit)


def takes(problem: Problem) -> bool:
    """Take every problem."""
    return True


def compile_kernel(problem: Problem, device) -> Callable:
    """Return the compiled kernel."""
    return device.compile(attention, problem, pick_config(problem))

"""Matmul by tiles, on every target: a pipelined loop over K blocks around `T.gemm`, and the epilogue on its accumulators.

out[i, j] = activation(row_scale[i] * column_scale[j] * (a[i] . b[:, j]) + bias[j]) + residual[i, j]

The kernel for every M, N and K, and for every layout of a and b. N and K are constants of it. Rows in memory that are no
multiples of 16 bytes are loaded without TMA. `sm90_persistent` comes before it in `operator.KERNELS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.epilogue import finished
from tilelang_ext.kernels.matmul.problem import Operands, Problem
from tilelang_ext.marks import READ_ONCE

SHORT = 64  # rows that fill no larger tile
MAX_EXTENT = 2**31 - 1


@dataclass(frozen=True)
class Config:
    """Tile of a block, stages of the pipeline, threads of a block."""

    block_M: int
    block_N: int
    block_K: int
    num_stages: int
    threads: int


def pick_config(problem: Problem) -> Config:
    """Return the first configuration of the table that fits the problem."""
    kind = problem.target_kind
    table = [
        # (fits, config)
        (kind == "metal", Config(64, 64, 32, 1, 128)),  # two tiles take 9 KB of the 32 KB of threadgroup memory
        # AMD: no chip has timed these. The 64 KB of LDS that every chip has hold one stage of the larger tile twice.
        (kind == "hip" and problem.M <= SHORT, Config(64, 64, 64, 1, 128)),
        (kind == "hip", Config(128, 128, 32, 1, 256)),
        (problem.M <= SHORT, Config(64, 64, 64, 4, 128)),  # 64 KB of stages, so that SMs hold several of these few tiles
        (True, Config(128, 128, 64, 3, 256)),  # 96 KB of stages, what the smallest GPUs since sm_80 have
    ]
    return next(config for fits, config in table if fits)


def matmul(problem: Problem, config: Config):
    """The prim_func (a, b, row_scale, column_scale, bias, residual, out)."""
    block_M, block_N, block_K = config.block_M, config.block_N, config.block_K
    M, N, K = T.dynamic("M"), problem.N, problem.K
    types = problem.types(M, N, K)
    a_type, b_type, row_scale_type, column_scale_type, bias_type, residual_type, out_type = types
    a_is_k_major, b_is_k_major = problem.a_is_k_major, problem.b_is_k_major

    @T.macro
    def load(a, b, A_s, B_s, row, column, k):
        if a_is_k_major:
            T.copy(a[row, k], A_s)
        else:
            T.copy(a[k, row], A_s)
        if b_is_k_major:
            T.copy(b[column, k], B_s)
        else:
            T.copy(b[k, column], B_s)

    @T.prim_func
    def matmul(
        a: a_type,
        b: b_type,
        row_scale: row_scale_type,
        column_scale: column_scale_type,
        bias: bias_type,
        residual: residual_type,
        out: out_type,
    ):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=config.threads) as (bx, by):
            A_s = T.alloc_shared((block_M, block_K) if a_is_k_major else (block_K, block_M), problem.dtype)
            B_s = T.alloc_shared((block_N, block_K) if b_is_k_major else (block_K, block_N), problem.dtype)
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            T.use_swizzle(8)
            T.clear(C_f)
            for k in T.Pipelined(T.ceildiv(K, block_K), num_stages=config.num_stages):
                load(a, b, A_s, B_s, by * block_M, bx * block_N, k * block_K)
                T.gemm(A_s, B_s, C_f, transpose_A=not a_is_k_major, transpose_B=b_is_k_major)
            for i, j in T.Parallel(block_M, block_N, annotations={READ_ONCE: 1}):
                # Rows and columns past the end are not stored: any element of the epilogue's operands will do for them.
                C_f[i, j] = finished(
                    problem.epilogue,
                    Operands(a, b, row_scale, column_scale, bias, residual, out),
                    C_f[i, j],
                    T.min(by * block_M + i, M - 1),
                    (T.min(bx * block_N + j, N - 1),),
                )
            T.copy(C_f, out[by * block_M, bx * block_N])

    return matmul


def takes(problem: Problem) -> bool:
    """Take every problem."""
    return True


def sizes_served(problem: Problem) -> tuple[int, int]:
    """Return the fewest and the most rows that have the tile of the problem."""
    return (1, SHORT) if problem.M <= SHORT else (SHORT + 1, MAX_EXTENT)


def compile_kernel(problem: Problem, device) -> Callable:
    """Return the compiled kernel; sizes of M that share a tile share a kernel."""
    return device.compile(matmul, problem.without_sizes("M"), pick_config(problem))

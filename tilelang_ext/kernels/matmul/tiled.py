"""Matmul by tiles, on every target: a pipelined loop over K blocks around `T.gemm`, and the epilogue on its accumulators.

out[i, j] = activation(row_scale[i] * column_scale[j] * (a[i] . b[:, j]) + bias[j]) + residual[i, j]

The kernel for every M, N and K, and for every layout of a and b. N and K are constants of it. Rows in memory that are no
multiples of 16 bytes are loaded without TMA. `sm90_persistent` comes before it in `operator.KERNELS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.epilogue import finished
from tilelang_ext.kernels.matmul.problem import TMA_ALIGNMENT, Operands, Problem
from tilelang_ext.kernels.metal_tile import Gemm, pick_tile

SHORT = 64  # rows that fill no larger tile
MAX_EXTENT = 2**31 - 1
WITHOUT_TMA = {"tl.disable_tma_lower": True, "tl.disable_warp_specialized": True}


@dataclass(frozen=True)
class Config:
    """Tile of a block, stages of the pipeline, threads of a block."""

    block_M: int
    block_N: int
    block_K: int
    num_stages: int
    threads: int


def pick_config(problem: Problem) -> Config:
    """Return the first configuration of the table that fits the problem, or on Metal the cheapest by a model."""
    kind = problem.target_kind
    if kind == "metal":
        tile = pick_tile((Gemm(problem.M, problem.N),), blocks_K=(32, 64))
        return Config(tile.block_M, tile.block_N, tile.block_K, 1, tile.threads)
    table = [
        # (fits, config)
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

    epilogue = problem.epilogue
    bias_dtype = "float32" if epilogue.bias_dtype is None else epilogue.bias_dtype

    @T.macro
    def finish(operands, C_f, row, column):
        row_scale_f = T.alloc_fragment((block_M,), "float32")
        column_scale_f = T.alloc_fragment((block_N,), "float32")
        bias_f = T.alloc_fragment((block_N,), bias_dtype)
        # Rows and columns past the end are not stored: any element of the epilogue's operands will do for them.
        if epilogue.row_scale:
            for i in T.Parallel(block_M):
                row_scale_f[i] = operands.row_scale[T.min(row + i, M - 1)]
        if epilogue.column_scale:
            for j in T.Parallel(block_N):
                column_scale_f[j] = operands.column_scale[T.min(column + j, N - 1)]
        if epilogue.bias_dtype is not None:
            for j in T.Parallel(block_N):
                bias_f[j] = operands.bias[T.min(column + j, N - 1)]
        for i, j in T.Parallel(block_M, block_N):
            C_f[i, j] = finished(
                epilogue,
                operands,
                C_f[i, j],
                T.min(row + i, M - 1),
                (T.min(column + j, N - 1),),
                row_scale_f[i],
                column_scale_f[j],
                bias_f[j],
            )

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
            finish(Operands(a, b, row_scale, column_scale, bias, residual, out), C_f, by * block_M, bx * block_N)
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
    # Of a stride that it does not know, upstream presumes that it is a multiple of 16 bytes.
    is_unaligned = problem.target_kind == "cuda" and not problem.a_is_k_major and problem.M % TMA_ALIGNMENT > 0
    pass_configs = WITHOUT_TMA if is_unaligned else None
    return device.compile(matmul, problem.without_sizes("M"), pick_config(problem), pass_configs=pass_configs)

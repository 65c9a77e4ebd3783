"""Scaled matmul by tiles, on every target: a pipelined loop over K blocks of 128 around `T.fp8_scaled_matmul`.

out[i, j] = sum over groups g of scale_a[i, g] * scale_b[j, g] * (a[i, g] . b[j, g]) + bias[j]

The kernel for every M, N and K. Scales of groups are applied in every K block, scales of all of K in the epilogue. Rows of a
and b whose stride is no multiple of 16 bytes are loaded without TMA. Tuned kernels for one architecture come before it in
`operator.KERNELS`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from tilelang_ext import language as T
from tilelang_ext.formats import FP8_BLOCK
from tilelang_ext.kernels.metal_tile import FP8_OPERATIONS, Gemm, pick_tile
from tilelang_ext.kernels.scaled_mm.problem import Problem
from tilelang_ext.marks import READ_ONCE

BLOCK_K = FP8_BLOCK  # a float32 block of scales, and the most that one accumulator of Hopper's tensor cores may sum

_LARGE_SHARED_MEMORY = ("sm_80", "sm_90a", "sm_100a", "sm_103a")  # at least 160 KB per block; other GPUs have 99 KB


@dataclass(frozen=True)
class Config:
    """Tile of a block, stages of the pipeline, threads of a block."""

    block_M: int
    block_N: int
    num_stages: int
    threads: int


def pick_config(problem: Problem) -> Config:
    """Return the first configuration of the table that fits the problem, or on Metal the cheapest by a model."""
    kind = problem.target_kind
    byte_scales = any(layout.scale_format is not None for layout in (problem.layout_a, problem.layout_b))
    if kind == "metal":
        # The result, the sum of a K block, and with scales per 32 elements the product of one group.
        sums = 1 if _is_fast(problem) else 3 if byte_scales else 2
        gemm = Gemm(problem.max_M, problem.N, 1, 1, 1, 1, operand_decoding=FP8_OPERATIONS, sums=sums)
        tile = pick_tile((gemm,), blocks_K=(BLOCK_K,), blocks_M=(16, 32, 64, 128))
        return Config(tile.block_M, tile.block_N, 1, tile.threads)
    table = [
        # (fits, config)
        # AMD: the 64 KB of LDS that every chip has hold two blocks of these. No chip has timed them. With scales of 4 groups in
        # a K block, more for each wave spills: RDNA 3, which also decodes the codes, has the fewest registers to spare.
        (kind == "hip" and byte_scales and problem.arch.startswith("gfx11"), Config(32, 64, 1, 256)),
        (kind == "hip" and byte_scales, Config(64, 64, 1, 256)),
        # RDNA 3: addresses of columns that end inside a tile take the registers that 128 columns would need.
        (kind == "hip" and problem.arch.startswith("gfx11") and problem.N % 128, Config(128, 64, 1, 256)),
        (kind == "hip" and problem.max_M <= 64, Config(64, 64, 2, 128)),
        (kind == "hip", Config(128, 128, 1, 256)),
        (byte_scales, Config(64, 64, 4, 128)),  # scales of 4 groups per K block: larger tiles spill
        (problem.max_M <= 64, Config(64, 128, 4, 128)),  # no rows to fill a larger tile; 96 KB of stages fit everywhere
        (problem.arch in _LARGE_SHARED_MEMORY, Config(128, 128, 4, 256)),  # 128 KB of stages, a warpgroup for each 64 rows
        (True, Config(128, 128, 3, 256)),  # 96 KB
    ]
    return next(config for fits, config in table if fits)


def _is_fast(problem: Problem) -> bool:
    return problem.fast_accum and problem.layout_a.k is None and problem.layout_b.k is None


def scaled_matmul(problem: Problem, config: Config):
    """The prim_func: (a, scale_a, b, scale_b, out), with bias before out where the problem has one."""
    N, K, layout_a, layout_b = problem.N, problem.K, problem.layout_a, problem.layout_b
    block_M, block_N, num_stages, threads = config.block_M, config.block_N, config.num_stages, config.threads
    M = T.dynamic("M")
    a_type, b_type = T.Tensor((M, K), problem.a_dtype), T.Tensor((N, K), problem.b_dtype)
    scale_a_type = problem.scale(layout_a, M, "scale_a")
    scale_b_type = problem.scale(layout_b, N, "scale_b")
    out_type = T.Tensor((M, N), problem.out_dtype)
    fast = _is_fast(problem)

    def block_scales(scale, layout, row, rows, k):
        """Return the scales of one tile and one K block; 1 where they cover all of K."""
        if layout.k is None:
            return T.float32(1)
        row_block, groups = row // layout.rows, BLOCK_K // layout.k
        row_blocks = -(-rows // layout.rows)
        return scale[row_block : row_block + row_blocks, k * groups : (k + 1) * groups]

    def row_scale(scale, layout, row):
        """Return the scale of a row, if it covers all of K; 1 where scales of groups were applied in each K block."""
        if layout.k is not None:
            return T.float32(1)
        return scale[0 if layout.rows is None else row, 0]

    def column_bias(bias, column):
        return T.float32(0) if bias is None else T.cast(bias[column], "float32")

    block_layouts = tuple(T.BlockScaledLayout.per_tensor() if layout.k is None else layout for layout in (layout_a, layout_b))

    @T.macro
    def multiply(A_s, B_s, C_f, scale_a, scale_b, row, column, k):
        if fast:
            T.gemm(A_s, B_s, C_f, transpose_B=True)
        else:
            T.fp8_scaled_matmul(
                A_s,
                block_scales(scale_a, layout_a, row, block_M, k),
                B_s,
                block_scales(scale_b, layout_b, column, block_N, k),
                C_f,
                transpose_B=True,
                scale_layout=block_layouts,
            )

    @T.macro
    def matmul(a, scale_a, b, scale_b, bias, out):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=threads) as (bx, by):
            A_s = T.alloc_shared((block_M, BLOCK_K), problem.a_dtype)
            B_s = T.alloc_shared((block_N, BLOCK_K), problem.b_dtype)
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            T.use_swizzle(8)
            T.clear(C_f)
            for k in T.Pipelined(T.ceildiv(K, BLOCK_K), num_stages=num_stages):
                T.copy(a[by * block_M, k * BLOCK_K], A_s)
                T.copy(b[bx * block_N, k * BLOCK_K], B_s)
                multiply(A_s, B_s, C_f, scale_a, scale_b, by * block_M, bx * block_N, k)
            for i, j in T.Parallel(block_M, block_N, annotations={READ_ONCE: 1}):
                # Rows and columns past the end are not stored: any scale will do for them.
                C_f[i, j] = C_f[i, j] * row_scale(scale_a, layout_a, T.min(by * block_M + i, M - 1)) * row_scale(
                    scale_b, layout_b, T.min(bx * block_N + j, N - 1)
                ) + column_bias(bias, T.min(bx * block_N + j, N - 1))
            T.copy(C_f, out[by * block_M, bx * block_N])

    if problem.bias_dtype is None:

        @T.prim_func
        def scaled_matmul(a: a_type, scale_a: scale_a_type, b: b_type, scale_b: scale_b_type, out: out_type):
            matmul(a, scale_a, b, scale_b, None, out)
    else:
        bias_type = T.Tensor((N,), problem.bias_dtype)

        @T.prim_func
        def scaled_matmul(a: a_type, scale_a: scale_a_type, b: b_type, scale_b: scale_b_type, bias: bias_type, out: out_type):
            matmul(a, scale_a, b, scale_b, bias, out)

    return scaled_matmul


def takes(problem: Problem) -> bool:
    """Take every problem."""
    return True


def compile_kernel(problem: Problem, compile: Callable) -> Callable:
    """Return the compiled kernel; sizes of M that share a tile share a kernel."""
    return compile(scaled_matmul, replace(problem, max_M=0), pick_config(problem))

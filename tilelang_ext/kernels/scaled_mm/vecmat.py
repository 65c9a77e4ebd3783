"""Scaled matmul for 1 to 4 rows: every weight is read once, by wide loads, and decoded in registers. No matrix unit.

out[m, n] = sum over groups g of scale_a[m, g] * scale_b[n, g] * (a[m, g] . b[n, g]) + bias[n]

A block owns some rows of b, and its threads share K: each loads 16 codes of every row and of a, so that no byte of a or b
is loaded twice by a block and nothing is staged. Threads are summed by `T.warp_reduce_sum` (simd_sum, shuffles), warps through
shared memory. The time is that of the bytes: 6.9 us for 1x4096x7168 at 4.25 TB/s (H200), which takes some 32 KB in flight on
each of its processors; hence a thread's loads all come before its arithmetic. The source is one for CUDA, HIP and Metal.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tilelang_ext import language as T
from tilelang_ext.formats import OCP_OF_FNUZ, BlockScaledLayout, format_of
from tilelang_ext.kernels.scaled_mm.problem import VECMAT_MAX_M, Problem, compile_prim_func

_LOAD_BYTES = 16  # the widest load of a thread
_WARP = 32  # of T.warp_reduce_sum: on AMD's waves of 64, each half by itself
_DECODED = 4  # codes decoded at a time
_MAX_THREADS = 256
_MAX_ROUNDS = 2  # loads in flight a thread and row


@dataclass(frozen=True)
class Config:
    """`threads` share K in `slabs` of `rounds` loads each; a block computes `rows` columns of out at a time, `groups` times."""

    threads: int
    rounds: int
    slabs: int
    rows: int
    groups: int


def pick_config(problem: Problem) -> Config:
    """Return how threads share K, and how many rows of b a block has."""
    loads = problem.K // _codes_a_load(problem)  # along K
    rounds_in_all = -(-loads // _MAX_THREADS)
    rounds = min(1 if problem.arch.startswith("gfx1") else _MAX_ROUNDS, rounds_in_all)  # more would spill on RDNA
    threads = -(-loads // (rounds_in_all * _WARP)) * _WARP
    table = [
        # (kind, rows, groups)
        ("cuda", 4, 1),  # 64 bytes in flight a thread and round; many small blocks even out over 132 processors
        ("hip", 4, 1),  # as on CUDA; no chip has timed it
        ("metal", 4, 16),  # a is read once for 64 rows: at M = 1 it adds 1/64 to the weights' bytes
    ]
    rows, groups = next((rows, groups) for kind, rows, groups in table if kind == problem.kind)
    return Config(threads, rounds, -(-loads // (threads * rounds)), rows, groups)


def _codes_a_load(problem: Problem) -> int:
    """16, or what keeps the loads of every row aligned."""
    return math.gcd(_LOAD_BYTES, problem.K)


def vecmat(problem: Problem, config: Config):
    """The prim_func: (a, scale_a, b, scale_b, out), with bias before out where the problem has one."""
    M, N, K, layout_a, layout_b = problem.max_M, problem.N, problem.K, problem.layout_a, problem.layout_b
    threads, rounds, slabs, rows, groups = config.threads, config.rounds, config.slabs, config.rows, config.groups
    codes = _codes_a_load(problem)
    decoded = min(_DECODED, codes)
    loads, warps = K // codes, threads // _WARP
    a_type, b_type = T.Tensor((M, K), problem.a_dtype), T.Tensor((N, K), problem.b_dtype)
    scale_a_type = problem.scale(layout_a, M, "scale_a")
    scale_b_type = problem.scale(layout_b, N, "scale_b")
    out_type = T.Tensor((M, N), problem.out_dtype)

    def factor(scale, layout: BlockScaledLayout, row, k, whole_k: bool):
        """The scale of a row at element k, if it covers all of K as `whole_k` says; else 1."""
        if (layout.k is None) is not whole_k:
            return T.float32(1)
        value = scale[0 if layout.rows is None else row // layout.rows, 0 if layout.k is None else k // layout.k]
        return T.e8m0_to_float(value) if layout.scale_format is not None else value

    def of_column(bias, column):
        return T.float32(0) if bias is None else T.cast(bias[column], "float32")

    @T.macro
    def load(source, first_row, last_row, count, first_load, codes_f):
        for round in T.unroll(rounds):
            place = first_load + round * threads
            if place < loads:
                for row in T.unroll(count):
                    for v in T.vectorized(codes):
                        codes_f[(round * count + row) * codes + v] = source[T.min(first_row + row, last_row), place * codes + v]

    @T.macro
    def multiply(a_codes, b_codes, scale_a, scale_b, first_row, first_load, sums):
        a_f = T.alloc_local((M * decoded,), "float32")
        b_f = T.alloc_local((decoded,), "float32")
        partial = T.alloc_local((M * rows,), "float32")
        a_scales = T.alloc_local((M,), "float32")
        b_scales = T.alloc_local((rows,), "float32")
        for round in T.unroll(rounds):
            place = first_load + round * threads
            if place < loads:
                for m in T.unroll(M):
                    a_scales[m] = factor(scale_a, layout_a, m, place * codes, False)
                for row in T.unroll(rows):
                    b_scales[row] = factor(scale_b, layout_b, T.min(first_row + row, N - 1), place * codes, False)
                for i in T.unroll(M * rows):
                    partial[i] = 0
                for part in T.unroll(codes // decoded):
                    for m in T.unroll(M):
                        for v in T.vectorized(decoded):
                            a_f[m * decoded + v] = T.cast(a_codes[(round * M + m) * codes + part * decoded + v], "float32")
                    for row in T.unroll(rows):
                        for v in T.vectorized(decoded):
                            b_f[v] = T.cast(b_codes[(round * rows + row) * codes + part * decoded + v], "float32")
                        for m in T.unroll(M):
                            for v in T.unroll(decoded):
                                partial[m * rows + row] += a_f[m * decoded + v] * b_f[v]
                for m in T.unroll(M):
                    for row in T.unroll(rows):
                        sums[m * rows + row] += partial[m * rows + row] * a_scales[m] * b_scales[row]

    @T.macro
    def matmul(a, scale_a, b, scale_b, bias, out):
        with T.Kernel(T.ceildiv(N, rows * groups), threads=threads) as bx:
            tx = T.get_thread_binding()
            a_codes = T.alloc_local((rounds * M * codes,), problem.a_dtype)
            b_codes = T.alloc_local((rounds * rows * codes,), problem.b_dtype)
            sums = T.alloc_local((M * rows,), "float32")
            warp_sums = T.alloc_shared((warps, M * rows), "float32")
            if slabs == 1:
                load(a, 0, M - 1, M, tx, a_codes)
            for group in T.serial(groups):
                first_row = (bx * groups + group) * rows
                for i in T.unroll(M * rows):
                    sums[i] = 0
                for slab in T.serial(slabs):
                    first_load = slab * rounds * threads + tx
                    load(b, first_row, N - 1, rows, first_load, b_codes)
                    if slabs > 1:
                        load(a, 0, M - 1, M, first_load, a_codes)
                    multiply(a_codes, b_codes, scale_a, scale_b, first_row, first_load, sums)
                for i in T.unroll(M * rows):
                    sums[i] = T.warp_reduce_sum(sums[i])
                if tx % _WARP == 0:
                    for i in T.unroll(M * rows):
                        warp_sums[tx // _WARP, i] = sums[i]
                if tx < M * rows:
                    m, n = tx // rows, first_row + tx % rows
                    if n < N:
                        sums[0] = 0
                        for warp in T.unroll(warps):
                            sums[0] += warp_sums[warp, tx]
                        out[m, n] = T.cast(
                            sums[0] * factor(scale_a, layout_a, m, 0, True) * factor(scale_b, layout_b, n, 0, True)
                            + of_column(bias, n),
                            problem.out_dtype,
                        )

    if problem.bias_dtype is None:

        @T.prim_func
        def vecmat(a: a_type, scale_a: scale_a_type, b: b_type, scale_b: scale_b_type, out: out_type):
            matmul(a, scale_a, b, scale_b, None, out)
    else:
        bias_type = T.Tensor((N,), problem.bias_dtype)

        @T.prim_func
        def vecmat(a: a_type, scale_a: scale_a_type, b: b_type, scale_b: scale_b_type, bias: bias_type, out: out_type):
            matmul(a, scale_a, b, scale_b, bias, out)

    return vecmat


def takes(problem: Problem) -> bool:
    """Up to VECMAT_MAX_M rows; on AMD of the flavour that tilelang's casts read there, or values would be 4 times off."""
    casts = problem.kind != "hip" or all(
        (format_of(dtype) in OCP_OF_FNUZ) is (problem.arch == "gfx942") for dtype in (problem.a_dtype, problem.b_dtype)
    )
    return casts and problem.max_M <= VECMAT_MAX_M


def compile_kernel(problem: Problem) -> Callable:
    """Return run(a, scale_a, b, scale_b, bias, out)."""
    return compile_prim_func(problem, vecmat(problem, pick_config(problem)))

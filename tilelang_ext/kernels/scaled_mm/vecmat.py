"""Scaled matmul for 1 to 4 rows: every weight is read once, by wide loads, and decoded in registers, without tensor cores.

out[m, n] = sum over groups g of scale_a[m, g] * scale_b[n, g] * (a[m, g] . b[n, g]) + bias[n]

A block owns some rows of b, and its threads split K: each loads 16 codes of every row of b and of a, so that a block loads no
byte twice and no operand goes through shared memory. Accumulators are reduced in a warp by `T.warp_reduce_sum` (shuffles,
simd_sum) and over the warps through shared memory. The time is that of the bytes: 6.9 us for 1x4096x7168 at 4.25 TB/s (H200).
That takes some 32 KB in flight on each SM; hence a thread issues all of its loads before its arithmetic. CUDA, HIP and Metal
share this source.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from tilelang_ext import language as T
from tilelang_ext.formats import OCP_OF_FNUZ, BlockScaledLayout, format_of
from tilelang_ext.kernels.scaled_mm.problem import VECMAT_MAX_M, Problem

_LOAD_BYTES = 16  # the widest load of a thread
_WARP = 32  # of T.warp_reduce_sum: on AMD's waves of 64, each half by itself
_DECODED = 4  # codes decoded at a time
_MAX_THREADS = 256
_MAX_ROUNDS = 2  # loads in flight per thread and row


@dataclass(frozen=True)
class Config:
    """`threads` split K, in `slabs` of `rounds` loads per thread; a block computes `passes` times `rows` columns of out."""

    threads: int
    rounds: int
    slabs: int
    rows: int
    passes: int


def pick_config(problem: Problem) -> Config:
    """Return how threads split K, and how many rows of b a block has."""
    loads = problem.K // _codes_per_load(problem)  # along K
    rounds_in_all = -(-loads // _MAX_THREADS)
    rounds = min(1 if problem.arch.startswith("gfx1") else _MAX_ROUNDS, rounds_in_all)  # more would spill on RDNA
    threads = -(-loads // (rounds_in_all * _WARP)) * _WARP
    table = [
        # (target_kind, rows, passes)
        ("cuda", 4, 1),  # 64 bytes in flight per thread and round; many small blocks spread evenly over the SMs
        ("hip", 4, 1),  # as on CUDA; no chip has timed it
        ("metal", 4, 16),  # a is read once for 64 rows: at M = 1 it adds 1/64 to the weights' bytes
    ]
    rows, passes = next((rows, passes) for target_kind, rows, passes in table if target_kind == problem.target_kind)
    return Config(threads, rounds, -(-loads // (threads * rounds)), rows, passes)


def _codes_per_load(problem: Problem) -> int:
    """Return 16, or fewer where rows would not be aligned to such loads."""
    return math.gcd(_LOAD_BYTES, problem.K)


def vecmat(problem: Problem, config: Config):
    """The prim_func: (a, scale_a, b, scale_b, out), with bias before out where the problem has one."""
    M, N, K, layout_a, layout_b = problem.max_M, problem.N, problem.K, problem.layout_a, problem.layout_b
    threads, rounds, slabs, rows, passes = config.threads, config.rounds, config.slabs, config.rows, config.passes
    codes = _codes_per_load(problem)
    decoded = min(_DECODED, codes)
    loads, warps = K // codes, threads // _WARP
    a_type, b_type = T.Tensor((M, K), problem.a_dtype), T.Tensor((N, K), problem.b_dtype)
    scale_a_type = problem.scale(layout_a, M, "scale_a")
    scale_b_type = problem.scale(layout_b, N, "scale_b")
    out_type = T.Tensor((M, N), problem.out_dtype)

    def factor(scale, layout: BlockScaledLayout, row, k, whole_k: bool):
        """Return the scale of a row at element k if it covers all of K, or a group of K, as `whole_k` asks; else 1."""
        if (layout.k is None) is not whole_k:
            return T.float32(1)
        value = scale[0 if layout.rows is None else row // layout.rows, 0 if layout.k is None else k // layout.k]
        return T.e8m0_to_float(value) if layout.scale_format is not None else value

    def column_bias(bias, column):
        return T.float32(0) if bias is None else T.cast(bias[column], "float32")

    @T.macro
    def load(source, first_row, last_row, count, first_load, codes_f):
        for round in T.unroll(rounds):
            index = first_load + round * threads
            if index < loads:
                for row in T.unroll(count):
                    for v in T.vectorized(codes):
                        codes_f[(round * count + row) * codes + v] = source[T.min(first_row + row, last_row), index * codes + v]

    @T.macro
    def multiply(a_codes, b_codes, scale_a, scale_b, first_row, first_load, acc):
        a_f = T.alloc_local((M * decoded,), "float32")
        b_f = T.alloc_local((decoded,), "float32")
        partial = T.alloc_local((M * rows,), "float32")
        a_scales = T.alloc_local((M,), "float32")
        b_scales = T.alloc_local((rows,), "float32")
        for round in T.unroll(rounds):
            index = first_load + round * threads
            if index < loads:
                for m in T.unroll(M):
                    a_scales[m] = factor(scale_a, layout_a, m, index * codes, False)
                for row in T.unroll(rows):
                    b_scales[row] = factor(scale_b, layout_b, T.min(first_row + row, N - 1), index * codes, False)
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
                        acc[m * rows + row] += partial[m * rows + row] * a_scales[m] * b_scales[row]

    @T.macro
    def matmul(a, scale_a, b, scale_b, bias, out):
        with T.Kernel(T.ceildiv(N, rows * passes), threads=threads) as bx:
            tx = T.get_thread_binding()
            a_codes = T.alloc_local((rounds * M * codes,), problem.a_dtype)
            b_codes = T.alloc_local((rounds * rows * codes,), problem.b_dtype)
            acc = T.alloc_local((M * rows,), "float32")
            warp_acc_s = T.alloc_shared((warps, M * rows), "float32")
            if slabs == 1:
                load(a, 0, M - 1, M, tx, a_codes)
            for number in T.serial(passes):
                first_row = (bx * passes + number) * rows
                for i in T.unroll(M * rows):
                    acc[i] = 0
                for slab in T.serial(slabs):
                    first_load = slab * rounds * threads + tx
                    load(b, first_row, N - 1, rows, first_load, b_codes)
                    if slabs > 1:
                        load(a, 0, M - 1, M, first_load, a_codes)
                    multiply(a_codes, b_codes, scale_a, scale_b, first_row, first_load, acc)
                for i in T.unroll(M * rows):
                    acc[i] = T.warp_reduce_sum(acc[i])
                if tx % _WARP == 0:
                    for i in T.unroll(M * rows):
                        warp_acc_s[tx // _WARP, i] = acc[i]
                if tx < M * rows:
                    m, n = tx // rows, first_row + tx % rows
                    if n < N:
                        acc[0] = 0
                        for warp in T.unroll(warps):
                            acc[0] += warp_acc_s[warp, tx]
                        out[m, n] = T.cast(
                            acc[0] * factor(scale_a, layout_a, m, 0, True) * factor(scale_b, layout_b, n, 0, True)
                            + column_bias(bias, n),
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
    """Up to VECMAT_MAX_M rows; on AMD only the flavour of fp8 that tilelang's casts read there."""
    casts = problem.target_kind != "hip" or all(
        (format_of(dtype) in OCP_OF_FNUZ) is (problem.arch == "gfx942") for dtype in (problem.a_dtype, problem.b_dtype)
    )
    return casts and problem.max_M <= VECMAT_MAX_M


def compile_kernel(problem: Problem, compile: Callable) -> Callable:
    """Return the compiled kernel."""
    return compile(vecmat, problem, pick_config(problem))

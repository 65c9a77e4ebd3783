"""Scaled matmul on Hopper for up to 128 rows: every block streams its own weights once, with most of a processor's memory.

out[i, j] = sum over groups g of scale_a[i, g] * scale_b[j, g] * (a[i, g] . b[j, g]) + bias[j]

The time is that of the weights' bytes, so each processor has one block, and most of its shared memory is a ring of copies in
flight. The matrix unit takes longer to begin a step of K than to do it: the warpgroups of a block take turns along K, each
adding to sums of its own. Where the tiles are at most half as many as the processors, two blocks of a cluster share K as well,
and each gives the other half of its sums. What a product reads below the rows of a is the next stage's, or nobody's: those
rows are not stored.

Floor on an H200: (M + N) K / 4.25e12 s, 7.0 us for 16x4096x7168; see docs/performance.md.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.formats import FP8_BLOCK
from tilelang_ext.kernels.scaled_mm.problem import Problem
from tilelang_ext.kernels.scaled_mm.sm90_persistent import (
    BAND,
    BLOCK_K,
    WARPGROUP,
    compile_hopper,
    fits_hopper,
    num_processors,
    scale_type,
)

MAX_M = 128
CLUSTERS = "cluster_dims" in inspect.signature(T.Kernel).parameters  # not in tilelang 0.1.14
_SHARED_BYTES = 225 * 1024  # of the 227 KB that a block may have; barriers take some
_MAX_STAGES = 32


@dataclass(frozen=True)
class Config:
    """Rows of a, columns of a block, blocks and warpgroups that share K, stages of the ring."""

    block_M: int
    block_N: int
    num_splits: int
    warpgroups: int
    num_stages: int


def pick_config(problem: Problem) -> Config | None:
    """Return the narrowest tile that gives no processor two; None if the widest does."""
    block_M, num_blocks, steps = problem.max_M, num_processors(), -(-problem.K // BLOCK_K)
    table = [
        # (block_N, warpgroups for up to 64 rows, for more): as many as the registers allow
        (32, 4, 2),
        (64, 4, 2),
        (128, 2, None),
    ]
    for block_N, few, many in table:
        tiles, warpgroups = -(-problem.N // block_N), few if block_M <= BAND else many
        if tiles <= num_blocks and warpgroups is not None:
            num_splits = 2 if CLUSTERS and 2 * tiles <= num_blocks and steps > 1 else 1
            steps_of_block = -(-steps // num_splits)
            warpgroups = min(warpgroups, 1 << (steps_of_block.bit_length() - 1))
            config = Config(block_M, block_N, num_splits, warpgroups, 0)
            fitting = (_SHARED_BYTES - _fixed_bytes(problem, config)) // ((block_M + block_N) * BLOCK_K)
            # Powers of two: k % num_stages is cheap, and a stage is one warpgroup's, or is used once. Were it another's before,
            # a warpgroup could take the phase before its own for its own.
            needed = 1 << (steps_of_block - 1).bit_length()
            return replace(config, num_stages=min(needed, 1 << (fitting.bit_length() - 1), _MAX_STAGES))
    return None


def _fixed_bytes(problem: Problem, config: Config) -> int:
    """Shared memory beside the ring: sums, also those of the other block; rows below those of a; factors of the groups."""
    sums = config.warpgroups * config.block_M * config.block_N * 4
    received = sums // 2 if config.num_splits > 1 else 0
    below = max(BAND - config.block_M, 0) * BLOCK_K
    steps = -(-problem.K // (BLOCK_K * config.num_splits))
    return sums + received + below + (steps * config.block_M * 4 if problem.layout_a.k is not None else 0)


def scaled_matmul(problem: Problem, config: Config):
    """The prim_func: (a, scale_a, b, scale_b, out), with bias before out where the problem has one."""
    N, K, layout_a, layout_b = problem.N, problem.K, problem.layout_a, problem.layout_b
    block_M, block_N, num_stages = config.block_M, config.block_N, config.num_stages
    num_splits, warpgroups = config.num_splits, config.warpgroups
    M = T.dynamic("M")
    a_type, b_type = T.Tensor((M, K), problem.a_dtype), T.Tensor((N, K), problem.b_dtype)
    scale_a_type = scale_type(problem, layout_a, M, "scale_a")
    scale_b_type = scale_type(problem, layout_b, N, "scale_b")
    out_type = T.Tensor((M, N), problem.out_dtype)
    grouped = layout_a.k is not None
    band_M = max(block_M, BAND)  # rows of a product
    computing = warpgroups * WARPGROUP  # threads; a warp loads
    all_steps = -(-K // BLOCK_K)
    steps = -(-all_steps // num_splits)  # of a block
    part_N = block_N // num_splits  # columns that a block of a cluster finishes
    in_clusters = {"cluster_dims": (num_splits, 1, 1)} if num_splits > 1 else {}
    each_warpgroup = range(warpgroups)  # not within the kernel, where tilelang 0.1.14 takes it for a loop of the kernel

    @T.macro
    def load(a, b, A_s, B_s, full, empty, column0, first_step, count):
        for k in T.serial(count):
            stage, at = k % num_stages, (first_step + k) * BLOCK_K
            T.barrier_wait(empty[stage], ((k // num_stages) & 1) ^ 1)
            T.tma_copy(b[column0 : column0 + block_N, at : at + BLOCK_K], B_s[stage, :, :], barrier=full[stage])
            T.tma_copy(a[0:block_M, at : at + BLOCK_K], A_s[stage * block_M : (stage + 1) * block_M, :], barrier=full[stage])
            T.barrier_arrive(full[stage])

    def computer(warpgroup: int):
        """The work of a computing warpgroup, as a macro: its steps of K, then its sums to shared memory."""
        turns = -(-(steps - warpgroup) // warpgroups)

        def keep(sums, sums_s):
            for split in range(num_splits):

                @T.macro
                def emit():
                    for i, j in T.Parallel(band_M, part_N):
                        if i < block_M:
                            sums_s[split, warpgroup, i, j] = sums[i, split * part_N + j]

                emit()

        @T.macro
        def compute(A_s, B_s, factors_s, sums_s, full, empty, count, tx, sums, partial):
            factors_f = T.alloc_fragment((band_M,), "float32")
            T.clear(sums)
            # Not a loop to T.ceildiv(count - warpgroup, warpgroups): of one turn at most, upstream runs it always.
            for turn in T.serial(turns):
                k = turn * warpgroups + warpgroup
                if all_steps % num_splits == 0 or k < count:
                    stage = k % num_stages
                    T.barrier_wait(full[stage], (k // num_stages) & 1)
                    T.wgmma_gemm(
                        A_s[stage * block_M : stage * block_M + band_M, :],
                        B_s[stage, :, :],
                        partial,
                        transpose_B=True,
                        policy=T.GemmWarpPolicy.FullRow,
                        clear_accum=True,
                    )
                    if grouped:
                        for i in T.Parallel(band_M):
                            factors_f[i] = factors_s[k, T.min(i, block_M - 1)]
                    T.wait_wgmma(0)
                    if tx % 32 == 0:
                        T.mbarrier_arrive(empty[stage])
                    for i, j in T.Parallel(band_M, block_N):
                        sums[i, j] += partial[i, j] * factors_f[i] if grouped else partial[i, j]
            keep(sums, sums_s)

        return compute

    computers = [computer(warpgroup) for warpgroup in range(warpgroups)]

    def compute(arguments, tx, sums, partials, warpgroup=0):
        """Take every computing thread to the macro of its warpgroup."""
        if warpgroup == warpgroups - 1:
            computers[warpgroup](*arguments, tx, sums[warpgroup], partials[warpgroup])
            return

        @T.macro
        def choose():
            if tx < WARPGROUP * (warpgroup + 1):
                computers[warpgroup](*arguments, tx, sums[warpgroup], partials[warpgroup])
            else:
                compute(arguments, tx, sums, partials, warpgroup + 1)

        choose()

    def finished(sum, scale_a, scale_b, bias, row, column):
        """A sum times what scales all of K, plus the bias."""
        if not grouped:
            sum = sum * (scale_a[0 if layout_a.rows is None else row, 0] * scale_b[0 if layout_b.rows is None else column, 0])
        return sum if bias is None else sum + T.cast(bias[column], "float32")

    @T.macro
    def matmul(a, scale_a, b, scale_b, bias, out):
        with T.Kernel(num_splits, T.ceildiv(N, block_N), threads=computing + 32, **in_clusters) as (rank, bx):
            A_s = T.alloc_shared((num_stages * block_M + band_M - block_M, BLOCK_K), problem.a_dtype)
            B_s = T.alloc_shared((num_stages, block_N, BLOCK_K), problem.b_dtype)
            factors_s = T.alloc_shared((steps if grouped else 1, block_M), "float32")
            sums_s = T.alloc_shared((num_splits, warpgroups, block_M, part_N), "float32")
            sums = [T.alloc_fragment((band_M, block_N), "float32") for _ in each_warpgroup]
            partials = [T.alloc_fragment((band_M, block_N), "float32") for _ in each_warpgroup]
            out_f = T.alloc_fragment((block_M, part_N), "float32")
            T.annotate_layout({tile: make_swizzled_layout(tile) for tile in (A_s, B_s)})
            full = T.alloc_barrier([32] * num_stages)
            empty = T.alloc_barrier([WARPGROUP // 32] * num_stages)
            if num_splits > 1:
                received_s = T.alloc_shared((warpgroups, block_M, part_N), "float32")
                arrived = T.alloc_cluster_barrier([1])
            tx = T.get_thread_binding()
            column0, first_step = bx * block_N, rank * steps
            count = T.min(steps, all_steps - first_step)
            if tx >= computing:
                load(a, b, A_s, B_s, full, empty, column0, first_step, count)
            else:
                if grouped:
                    for k, i in T.Parallel(steps, block_M):
                        group = T.min(first_step + k, all_steps - 1)
                        factors_s[k, i] = scale_a[T.min(i, M - 1), group] * scale_b[column0 // FP8_BLOCK, group]
                    T.sync_threads(barrier_id=1, arrive_count=computing)
                compute((A_s, B_s, factors_s, sums_s, full, empty, count), tx, sums, partials)
                if num_splits > 1:
                    T.fence_proxy_async()
            if num_splits > 1:
                # Both blocks are done with their rings, in whose memory the compiler may place what they receive.
                T.cluster_sync()
                T.copy_cluster(sums_s[1 - rank, :, :, :], received_s, dst_block=1 - rank, remote_barrier=arrived[0])
                T.barrier_wait(arrived[0], 0)
            else:
                T.sync_threads()
            if tx < computing:
                T.clear(out_f)
                for warpgroup in T.unroll(warpgroups):
                    for i, j in T.Parallel(block_M, part_N):
                        out_f[i, j] += sums_s[rank, warpgroup, i, j]
                if num_splits > 1:
                    for warpgroup in T.unroll(warpgroups):
                        for i, j in T.Parallel(block_M, part_N):
                            out_f[i, j] += received_s[warpgroup, i, j]
                column1 = column0 + rank * part_N
                for i, j in T.Parallel(block_M, part_N):
                    if i < M and column1 + j < N:
                        out[i, column1 + j] = T.cast(
                            finished(out_f[i, j], scale_a, scale_b, bias, i, column1 + j), problem.out_dtype
                        )
            if num_splits > 1:
                T.cluster_sync()  # what was sent has been read

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
    """What `sm90_persistent` takes, where the rows of a fit one tile and the tiles fit the processors once."""
    return fits_hopper(problem) and problem.max_M <= MAX_M and pick_config(problem) is not None


def compile_kernel(problem: Problem) -> Callable:
    """Return run(a, scale_a, b, scale_b, bias, out)."""
    return _compile(problem, pick_config(problem))


@cache
def _compile(problem: Problem, config: Config) -> Callable:
    return compile_hopper(problem, scaled_matmul(problem, config))

"""Scaled matmul on Hopper for up to 128 rows: split-K over the consumers of a block, and over a cluster of two blocks.

out[i, j] = sum over groups g of scale_a[i, g] * scale_b[j, g] * (a[i, g] . b[j, g]) + bias[j]

The time is that of the weights' bytes: every block streams its own rows of B once, and most of the SM's shared memory is stages
of TMA loads in flight. A warpgroup needs longer to begin the MMA of a K block than the MMA takes, so the consumers of a block
take turns along K, each with an accumulator of its own. Where there are at most half as many tiles as SMs, the two blocks of a
cluster split K as well.

Warp roles, one block per SM:

| warps | role |
| --- | --- |
| 4 each, of 1 to 4 consumers | consumer warpgroup w: K blocks w, w + consumers, ... of the block; then the epilogue, together |
| 1, the last | producer: TMA loads of A and B |

Pipelines, producer role -> consumer role:

| pipeline | carries | full | empty |
| --- | --- | --- | --- |
| producer -> the consumer whose K block it is | A and B of a K block of 128 | 32 threads, the bytes | 4 warps |
| block -> the other block of the cluster | accumulators of half of the columns, once | the bytes | the whole cluster |

Steady state:

    producer    acquire | TMA B, TMA A | commit
    consumer w  wait | MMA of its next K block, complete: release | promote: add the partial accumulator, times the row scales
    at the end  accumulators to shared memory | exchange in the cluster | add, scale, add the bias, store

An MMA has 64 rows. Where A has fewer, the MMA reads the next stage or padding below them, and those rows of the accumulator
are discarded.

Takes what `sm90_persistent` takes. Floor on an H200: (M + N) K / 4.25e12 s, 7.0 us for 16x4096x7168
(docs/design/performance.md).
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.formats import FP8_BLOCK
from tilelang_ext.kernels.scaled_mm.problem import Problem
from tilelang_ext.kernels.scaled_mm.sm90_block import BLOCK_K, WGMMA_M, Operands, scale_row, scale_type
from tilelang_ext.kernels.sm90.pipeline import Pipeline, alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, dispatch

# As sm90_persistent has it; upstream adds the barriers, since it may place the accumulators in the memory of the stages.
PASS_CONFIGS = {"tl.disable_warp_specialized": True, "tl.disable_safe_memory_legalize": True}
MAX_M = 128
CLUSTERS = "cluster_dims" in inspect.signature(T.Kernel).parameters  # not in tilelang 0.1.14
_SHARED_BYTES = 225 * 1024  # of the 227 KB that a block may have; barriers take some
_MAX_STAGES = 32
_CONSUMERS_BARRIER = 1  # a named barrier of all consumer threads


@dataclass(frozen=True)
class Config:
    """Tile of a block, blocks and consumer warpgroups that split K, stages of the pipeline."""

    block_M: int
    block_N: int
    num_splits: int
    num_consumers: int
    num_stages: int


def configs(problem: Problem) -> Iterator[Config]:
    """Yield the configurations that give no SM two tiles."""
    k_blocks = -(-problem.K // BLOCK_K)
    block_M = max(16, 1 << (problem.max_M - 1).bit_length())
    if block_M > MAX_M:
        return
    table = [
        # (block_N, consumers for up to 64 rows, for more): as many as the registers allow
        (32, 4, 2),
        (64, 4, 2),
        (128, 2, None),
    ]
    for block_N, for_one_mma, for_two in table:
        tiles, num_consumers = -(-problem.N // block_N), for_one_mma if block_M <= WGMMA_M else for_two
        if tiles > problem.num_sms or num_consumers is None:
            continue
        for num_splits in (1, 2) if CLUSTERS and 2 * tiles <= problem.num_sms and k_blocks > 1 else (1,):
            k_blocks_of_block = -(-k_blocks // num_splits)
            consumers = min(num_consumers, 1 << (k_blocks_of_block.bit_length() - 1))
            config = Config(block_M, block_N, num_splits, consumers, 0)
            fitting = (_SHARED_BYTES - _fixed_bytes(problem, config)) // ((block_M + block_N) * BLOCK_K)
            # Powers of two: k % num_stages is cheap, and a stage has one consumer, or is used once. If two consumers used it in
            # turn, one could take the phase of the other's K block for the phase that it waits for.
            needed = 1 << (k_blocks_of_block - 1).bit_length()
            if fitting >= consumers:
                yield replace(config, num_stages=min(needed, 1 << (fitting.bit_length() - 1), _MAX_STAGES))


def _fixed_bytes(problem: Problem, config: Config) -> int:
    """Shared memory beside the stages: accumulators, also those of the other block; padding below A; blockwise row scales."""
    accumulators = config.num_consumers * config.block_M * config.block_N * 4
    received = accumulators // 2 if config.num_splits > 1 else 0
    padding = max(WGMMA_M - config.block_M, 0) * BLOCK_K
    k_blocks = -(-problem.K // (BLOCK_K * config.num_splits))
    return accumulators + received + padding + (k_blocks * config.block_M * 4 if problem.layout_a.k is not None else 0)


# --- what a kernel is made of ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Traits:
    """The host's constants of one kernel, and M."""

    problem: Problem
    config: Config
    M: Any

    @property
    def blockwise(self) -> bool:
        return self.problem.layout_a.k is not None

    @property
    def all_k_blocks(self) -> int:
        return -(-self.problem.K // BLOCK_K)

    @property
    def k_blocks(self) -> int:
        """K blocks of a block; the last one of the cluster may have fewer."""
        return -(-self.all_k_blocks // self.config.num_splits)

    @property
    def mma_M(self) -> int:
        """Rows of the accumulators: those of the tile, or of one MMA."""
        return max(self.config.block_M, WGMMA_M)

    @property
    def split_N(self) -> int:
        """Columns that a block of a cluster finishes."""
        return self.config.block_N // self.config.num_splits

    @property
    def consumer_threads(self) -> int:
        return self.config.num_consumers * WARPGROUP

    @property
    def cluster(self) -> dict:
        """Arguments of T.Kernel."""
        return {"cluster_dims": (self.config.num_splits, 1, 1)} if self.config.num_splits > 1 else {}


@dataclass(frozen=True, eq=False)
class _Block:
    """What the roles of a block share."""

    A_s: Any  # (num_stages * block_M and padding, BLOCK_K)
    B_s: Any  # (num_stages, block_N, BLOCK_K)
    row_scales_s: Any  # (k_blocks, block_M), a's scale times b's; unused unless blockwise
    accumulators_s: Any  # (num_splits, num_consumers, block_M, split_N)
    pipeline: Pipeline
    rank: Any  # of the block in its cluster
    column: Any  # the first of the tile
    first_k: Any  # K block
    num_k: Any  # K blocks
    thread: Any


@dataclass(frozen=True, eq=False)
class _Exchange:
    """How a block of a cluster gets the other one's accumulators."""

    received_s: Any  # (num_consumers, block_M, split_N)
    arrived: Any  # a cluster barrier


def scaled_matmul(problem: Problem, config: Config):
    """The prim_func: (a, scale_a, b, scale_b, out), with bias before out where the problem has one."""
    M, N, K = T.dynamic("M"), problem.N, problem.K
    traits = _Traits(problem, config, M)
    a_type, b_type = T.Tensor((M, K), problem.a_dtype), T.Tensor((N, K), problem.b_dtype)
    scale_a_type = scale_type(problem, problem.layout_a, M, "scale_a")
    scale_b_type = scale_type(problem, problem.layout_b, N, "scale_b")
    out_type = T.Tensor((M, N), problem.out_dtype)

    if problem.bias_dtype is None:

        @T.prim_func
        def scaled_matmul(a: a_type, scale_a: scale_a_type, b: b_type, scale_b: scale_b_type, out: out_type):
            _matmul(traits, Operands(a, scale_a, b, scale_b, None, out))
    else:
        bias_type = T.Tensor((N,), problem.bias_dtype)

        @T.prim_func
        def scaled_matmul(a: a_type, scale_a: scale_a_type, b: b_type, scale_b: scale_b_type, bias: bias_type, out: out_type):
            _matmul(traits, Operands(a, scale_a, b, scale_b, bias, out))

    return scaled_matmul


# --- block: shared memory, barriers, roles ---------------------------------------------------------------------------


@T.macro
def _matmul(traits, operands):
    block_M, block_N, num_stages = traits.config.block_M, traits.config.block_N, traits.config.num_stages
    num_splits, num_consumers = traits.config.num_splits, traits.config.num_consumers
    threads = traits.consumer_threads + WARP
    with T.Kernel(num_splits, T.ceildiv(traits.problem.N, block_N), threads=threads, **traits.cluster) as (rank, tile):
        A_s = T.alloc_shared((num_stages * block_M + traits.mma_M - block_M, BLOCK_K), traits.problem.a_dtype)
        B_s = T.alloc_shared((num_stages, block_N, BLOCK_K), traits.problem.b_dtype)
        row_scales_s = T.alloc_shared((traits.k_blocks if traits.blockwise else 1, block_M), "float32")
        accumulators_s = T.alloc_shared((num_splits, num_consumers, block_M, traits.split_N), "float32")
        accumulators, partials = _alloc_accumulators(traits), _alloc_accumulators(traits)
        out_f = T.alloc_fragment((block_M, traits.split_N), "float32")
        pipeline = alloc_pipeline(num_stages, WARP, WARPGROUP // WARP)
        exchange = _alloc_exchange(traits)
        thread = T.get_thread_binding()
        column, first_k = tile * block_N, rank * traits.k_blocks
        num_k = T.min(traits.k_blocks, traits.all_k_blocks - first_k)
        block = _Block(A_s, B_s, row_scales_s, accumulators_s, pipeline, rank, column, first_k, num_k, thread)
        if thread >= traits.consumer_threads:
            _produce(traits, operands, block)
        else:
            _multiply(traits, operands, block, accumulators, partials)
        _exchange_accumulators(block, exchange)
        if thread < traits.consumer_threads:
            _store_tile(traits, operands, block, exchange, out_f)
        if exchange is not None:
            T.cluster_sync()  # no block may end while the other one still receives from its shared memory


def _alloc_accumulators(traits: _Traits) -> list:
    shape = (traits.mma_M, traits.config.block_N)
    return [T.alloc_fragment(shape, "float32") for _ in range(traits.config.num_consumers)]


def _alloc_exchange(traits: _Traits) -> _Exchange | None:
    if traits.config.num_splits == 1:
        return None
    shape = (traits.config.num_consumers, traits.config.block_M, traits.split_N)
    return _Exchange(T.alloc_shared(shape, "float32"), T.alloc_cluster_barrier([1]))


# --- producer --------------------------------------------------------------------------------------------------------


@T.macro
def _produce(traits, operands, block):
    """Load every K block of the block."""
    block_M, block_N, pipeline = traits.config.block_M, traits.config.block_N, block.pipeline
    for k in T.serial(block.num_k):
        stage, at = pipeline.stage(k), (block.first_k + k) * BLOCK_K
        rows = slice(block.column, block.column + block_N)
        pipeline.acquire(stage, pipeline.empty_phase(k))
        T.tma_copy(operands.b[rows, at : at + BLOCK_K], block.B_s[stage, :, :], barrier=pipeline.full[stage])
        T.tma_copy(
            operands.a[0:block_M, at : at + BLOCK_K],
            block.A_s[stage * block_M : (stage + 1) * block_M, :],
            barrier=pipeline.full[stage],
        )
        pipeline.commit(stage)


# --- consumers -------------------------------------------------------------------------------------------------------


@T.macro
def _multiply(traits, operands, block, accumulators, partials):
    """Leave the accumulators of all consumers in shared memory."""
    if traits.blockwise:
        _load_row_scales(traits, operands, block)
        T.sync_threads(barrier_id=_CONSUMERS_BARRIER, arrive_count=traits.consumer_threads)
    _dispatch_consumers(traits, block, accumulators, partials)
    if traits.config.num_splits > 1:
        T.fence_proxy_async()


@T.macro
def _load_row_scales(traits, operands, block):
    """Write the row scales of every K block of the block: a's scale times b's."""
    for k, i in T.Parallel(traits.k_blocks, traits.config.block_M):
        group = T.min(block.first_k + k, traits.all_k_blocks - 1)
        block.row_scales_s[k, i] = (
            operands.scale_a[T.min(i, traits.M - 1), group] * operands.scale_b[block.column // FP8_BLOCK, group]
        )


def _dispatch_consumers(traits: _Traits, block: _Block, accumulators: list, partials: list) -> None:
    consumers = [
        (WARPGROUP, functools.partial(_consume, traits, block, consumer, accumulators[consumer], partials[consumer]))
        for consumer in range(traits.config.num_consumers)
    ]
    dispatch(block.thread, *consumers)


def _consume(traits: _Traits, block: _Block, consumer: int, accumulator, partial) -> None:
    """Multiply the K blocks of one consumer, then write its accumulator to shared memory."""
    num_consumers, all_k_blocks, pipeline = traits.config.num_consumers, traits.all_k_blocks, block.pipeline
    block_M, block_N, mma_M = traits.config.block_M, traits.config.block_N, traits.mma_M
    iterations = -(-(traits.k_blocks - consumer) // num_consumers)
    is_even_split = all_k_blocks % traits.config.num_splits == 0

    @T.macro
    def emit():
        row_scales = T.alloc_fragment((mma_M,), "float32")
        T.clear(accumulator)
        # Not a loop to T.ceildiv(num_k - consumer, num_consumers): of one iteration at most, upstream runs it always.
        for iteration in T.serial(iterations):
            k = iteration * num_consumers + consumer
            if is_even_split or k < block.num_k:
                stage = pipeline.stage(k)
                pipeline.wait(stage, pipeline.full_phase(k))
                T.wgmma_gemm(
                    block.A_s[stage * block_M : stage * block_M + mma_M, :],
                    block.B_s[stage, :, :],
                    partial,
                    transpose_B=True,
                    policy=T.GemmWarpPolicy.FullRow,
                    clear_accum=True,
                )
                if traits.blockwise:
                    for i in T.Parallel(mma_M):
                        row_scales[i] = block.row_scales_s[k, T.min(i, block_M - 1)]
                T.wait_wgmma(0)
                pipeline.release(stage, block.thread % WARP)
                for i, j in T.Parallel(mma_M, block_N):
                    accumulator[i, j] += partial[i, j] * row_scales[i] if traits.blockwise else partial[i, j]

    emit()
    for split in range(traits.config.num_splits):
        _write_accumulator(traits, block, consumer, accumulator, split)


def _write_accumulator(traits: _Traits, block: _Block, consumer: int, accumulator, split: int) -> None:
    """Write the columns that one block of the cluster finishes."""
    accumulators_s, block_M, split_N = block.accumulators_s, traits.config.block_M, traits.split_N

    @T.macro
    def emit():
        for i, j in T.Parallel(traits.mma_M, split_N):
            if i < block_M:
                accumulators_s[split, consumer, i, j] = accumulator[i, split * split_N + j]

    emit()


# --- epilogue --------------------------------------------------------------------------------------------------------


@T.macro
def _exchange_accumulators(block, exchange):
    """Wait until the accumulators of all consumers are in shared memory, those of the other block of the cluster too."""
    if exchange is not None:
        # Both blocks have read their stages: the compiler may place `received_s` in the same memory.
        T.cluster_sync()
        other = 1 - block.rank
        T.copy_cluster(
            block.accumulators_s[other, :, :, :], exchange.received_s, dst_block=other, remote_barrier=exchange.arrived[0]
        )
        T.barrier_wait(exchange.arrived[0], 0)
    else:
        T.sync_threads()


@T.macro
def _store_tile(traits, operands, block, exchange, out_f):
    """Add the accumulators, scale them, add the bias and store the columns that this block finishes."""
    block_M, split_N = traits.config.block_M, traits.split_N
    T.clear(out_f)
    for consumer in T.unroll(traits.config.num_consumers):
        for i, j in T.Parallel(block_M, split_N):
            out_f[i, j] += block.accumulators_s[block.rank, consumer, i, j]
    if exchange is not None:
        for consumer in T.unroll(traits.config.num_consumers):
            for i, j in T.Parallel(block_M, split_N):
                out_f[i, j] += exchange.received_s[consumer, i, j]
    column = block.column + block.rank * split_N
    for i, j in T.Parallel(block_M, split_N):
        if i < traits.M and column + j < traits.problem.N:
            operands.out[i, column + j] = T.cast(
                _finished(traits, operands, out_f[i, j], i, column + j), traits.problem.out_dtype
            )


def _finished(traits: _Traits, operands: Operands, value, row, column):
    """Return an element of the result: its sum times the scales that cover all of K, plus the bias."""
    problem, scale_a, scale_b = traits.problem, operands.scale_a, operands.scale_b
    if not traits.blockwise:
        value = value * (scale_a[scale_row(problem.layout_a, row), 0] * scale_b[scale_row(problem.layout_b, column), 0])
    return value if operands.bias is None else value + T.cast(operands.bias[column], "float32")


# --- host ------------------------------------------------------------------------------------------------------------


def compile_kernel(problem: Problem, config: Config, compile: Callable) -> Callable:
    """Return the compiled kernel."""
    return compile(scaled_matmul, replace(problem, max_M=config.block_M), config, pass_configs=PASS_CONFIGS)

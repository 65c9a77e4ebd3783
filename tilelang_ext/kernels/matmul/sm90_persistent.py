"""Matmul on Hopper: a warp-specialized persistent kernel, with K split over its units of work where tiles are few.

out[i, j] = activation(row_scale[i] * column_scale[j] * (a[i] . b[:, j]) + bias[j]) + residual[i, j]

Warp roles, one block per SM:

| warpgroup | role | registers |
| --- | --- | --- |
| 0 | producer: TMA loads of A and B | 40 |
| 1, and 2 if there are two | consumers: each has a part of the tile's rows, its MMAs and its epilogue | 232 |

Pipelines, producer role -> consumer role:

| pipeline | carries | full | empty |
| --- | --- | --- | --- |
| producer -> all consumers | A and B of a K block of 64 | one thread, the bytes | 4 warps of each consumer |
| consumer -> its TMA stores | subtiles of the result, two buffers per consumer | a named barrier of 128 threads | one thread |

Steady state:

    producer   acquire | TMA A, TMA B | commit ; on to the next unit
    consumers  wait | issue the MMAs of K block k | those of k - 1 are complete: release | a deferred subtile of the unit before
               after the last K block: the epilogue, round | store most subtiles, defer the others

A unit is a tile and one of `splits` ranges of K. With one range a unit ends with the epilogue. With more, it writes its float32
accumulators to `partial` (splits, M, N), and `sum_splits` adds them and does the epilogue: that kernel starts while the
last units run (PDL). Or, where config.adds, the block that has a tile's last range waits for the accumulators of the others
(`SplitTiles`), adds them and finishes the tile. Or, where config.joined, the ranges are those of the blocks of a cluster, each
of which sums a part of the tile (`ClusterSum`). Where config.streams, every block has an equal part of the K blocks of all
tiles instead (`EqualParts`). Always, the order of additions is the same in every call.

Blocks of a cluster share loads by multicast: two below each other those of B, two beside each other those of A, and four, as
a square, both: each loads half of its part of A and half of its part of B.

An MMA has 64 rows and any multiple of 8 columns. With `is_swapped`, columns of out are its rows and rows of out its columns, so
that few rows, or such as fill no multiple of 64, take no more time than they need: the kernel then multiplies b^T by a^T, and
subtiles are stored transposed.

Sizes are no constants of the kernel: a new M, N or K compiles nothing. TMA takes rows of multiples of 16 bytes: operands with
others are copied first (`pad`), and such rows of out are stored by threads.
Floors on an H200: 2 M N K / 9.9e14 s, and the bytes of a, b and out at 4.25e12 bytes/s (docs/log/matmul.md).
"""

import functools
from collections.abc import Callable
from dataclasses import replace

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.pad import after_pad, is_padded
from tilelang_ext.kernels.matmul.problem import TMA_ALIGNMENT, Epilogue, Operands, Problem
from tilelang_ext.kernels.matmul.sm90_block import WGMMA_M, Block, Traits
from tilelang_ext.kernels.matmul.sm90_config import BLOCK_K, Config, is_turned, pick_config, rows_alike, rows_of_choice
from tilelang_ext.kernels.matmul.sm90_load import produce
from tilelang_ext.kernels.matmul.sm90_multiply import consume
from tilelang_ext.kernels.matmul.sum_splits import before_sum
from tilelang_ext.kernels.matmul.turn import after_turn
from tilelang_ext.kernels.sm90 import cluster_sum, pdl, split_tiles
from tilelang_ext.kernels.sm90.cluster_sum import ClusterSum
from tilelang_ext.kernels.sm90.epilogue import (
    alloc_stores,
)
from tilelang_ext.kernels.sm90.pipeline import alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARPGROUP, dispatch
from tilelang_ext.kernels.sm90.scheduler import EqualParts, GroupedTiles, PersistentScheduler, equal_parts
from tilelang_ext.kernels.sm90.split_tiles import SplitTiles

ARCH = "sm_90a"
# TMA clips what lies past the end of a matrix, and all other indices are clamped here. Every barrier is explicit: upstream's
# search for places that lack one is up to half of the time that a kernel takes to lower.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}


def matmul(problem: Problem, config: Config):
    """The prim_func (a, b, row_scale, column_scale, bias, residual, out)."""
    M, N, K = _sizes(problem)
    traits = _traits(problem, config, M, N, K, 1)
    types = _types(problem, M, N, K)
    a_type, b_type, row_scale_type, column_scale_type, bias_type, residual_type, out_type = types

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
        _matmul(traits, _in_order(config, Operands(a, b, row_scale, column_scale, bias, residual, out)))

    return matmul


def partial_matmul(problem: Problem, config: Config):
    """The prim_func (a, b, partial): accumulators of each range of K, float32 (splits, M, N), or longer rows."""
    M, N, K = _sizes(problem)
    splits = T.dynamic("splits")
    a_type, b_type, *_ = _types(problem, M, N, K)
    row = T.dynamic("groups") * TMA_ALIGNMENT if problem.N else N
    traits = _traits(problem, config, M, row, K, splits)

    @T.prim_func
    def partial_matmul(a: a_type, b: b_type, partial: T.Tensor((splits, M, row), "float32")):
        _matmul(traits, _in_order(config, Operands(a, b, None, None, None, None, partial)))

    return partial_matmul


def added_matmul(problem: Problem, config: Config):
    """The prim_func (a, b, row_scale, column_scale, bias, residual, partial, given, out): one block adds those of each tile.

    partial (splits, tiles, elements of a tile), float32, and given (splits, tiles, consumers), int64: see `SplitTiles`.
    """
    M, N, K = _sizes(problem)
    splits, tiles = T.dynamic("splits"), T.dynamic("tiles")
    traits = _traits(problem, config, M, N, K, splits)
    types = _types(problem, M, N, K)
    a_type, b_type, row_scale_type, column_scale_type, bias_type, residual_type, out_type = types

    @T.prim_func
    def added_matmul(
        a: a_type,
        b: b_type,
        row_scale: row_scale_type,
        column_scale: column_scale_type,
        bias: bias_type,
        residual: residual_type,
        partial: T.Tensor((splits, tiles, config.block_M * config.block_N), "float32"),
        given: T.Tensor((splits, tiles, config.num_consumers), "int64"),
        out: out_type,
    ):
        operands = Operands(a, b, row_scale, column_scale, bias, residual, out, SplitTiles(partial, given))
        _matmul(traits, _in_order(config, operands))

    return added_matmul


def streamed_matmul(problem: Problem, config: Config):
    """The prim_func (a, b, row_scale, column_scale, bias, residual, partial, given, out): K blocks of all tiles in equal parts.

    partial (blocks, elements of a tile), float32, and given (blocks, consumers), int64: see `SplitTiles`.
    """
    M, N, K = _sizes(problem)
    traits = _traits(problem, config, M, N, K, 1)
    types = _types(problem, M, N, K)
    a_type, b_type, row_scale_type, column_scale_type, bias_type, residual_type, out_type = types

    @T.prim_func
    def streamed_matmul(
        a: a_type,
        b: b_type,
        row_scale: row_scale_type,
        column_scale: column_scale_type,
        bias: bias_type,
        residual: residual_type,
        partial: T.Tensor((config.num_blocks, config.block_M * config.block_N), "float32"),
        given: T.Tensor((config.num_blocks, config.num_consumers), "int64"),
        out: out_type,
    ):
        operands = Operands(a, b, row_scale, column_scale, bias, residual, out, SplitTiles(partial, given))
        _matmul(traits, _in_order(config, operands))

    return streamed_matmul


# A kernel's problem has 0 in place of each size, or 1 where that size is no multiple of 16 bytes but rows in memory would be
# that long: the rows of operands are copies then, longer by zeros, and those of out are stored without TMA.


def _any_sizes(problem: Problem) -> Problem:
    """Return the problem of a kernel for all sizes."""
    is_mixed = problem.a_is_k_major != problem.b_is_k_major
    return replace(
        problem,
        M=int(not problem.a_is_k_major and is_padded(problem.M)),
        N=int(is_padded(problem.N)),
        K=int(is_mixed and is_padded(problem.K)),  # else the K of both operands is what rows, or no rows, have
    )


def _sizes(problem: Problem) -> tuple:
    """Return symbols of M, N and K: what is contiguous in memory is known to be a multiple of 16 bytes."""
    M = T.dynamic("M") if problem.a_is_k_major or problem.M else T.dynamic("M_in_8") * TMA_ALIGNMENT
    N = T.dynamic("N") if problem.N else T.dynamic("N_in_8") * TMA_ALIGNMENT
    has_k_rows = problem.a_is_k_major or problem.b_is_k_major
    return M, N, T.dynamic("K_in_8") * TMA_ALIGNMENT if has_k_rows else T.dynamic("K")


def _types(problem: Problem, M, N, K) -> tuple:
    """Return the types of a prim_func's parameters."""
    k_rows = T.dynamic("K") if problem.K else K  # of the operand that is not K-major
    a_row = T.dynamic("a_row_in_8") * TMA_ALIGNMENT if problem.M else M
    b_row = T.dynamic("b_row_in_8") * TMA_ALIGNMENT if problem.N else N
    return problem.types_of(
        M, N, (M, K) if problem.a_is_k_major else (k_rows, a_row), (N, K) if problem.b_is_k_major else (k_rows, b_row)
    )


def _traits(problem: Problem, config: Config, M, N, K, splits) -> Traits:
    stores_by_tma = not problem.N
    if config.is_swapped:
        return Traits(problem.swapped(), config, N, M, K, splits, stores_by_tma)
    return Traits(problem, config, M, N, K, splits, stores_by_tma)


def _in_order(config: Config, operands: Operands) -> Operands:
    """Return the operands with that first whose rows are rows of the MMAs."""
    return replace(operands, a=operands.b, b=operands.a) if config.is_swapped else operands


# --- block: shared memory, barriers, scheduler, roles ----------------------------------------------------------------


@T.macro
def _matmul(traits, operands):
    cluster = traits.config.cluster_blocks
    with T.Kernel(traits.config.num_blocks, threads=traits.roles.threads, **traits.cluster_dims) as block:
        if traits.config.adds or traits.config.streams:
            split_tiles.declare()
        if traits.config.joined > 1:
            cluster_sum.declare()
        A_s = T.alloc_shared(traits.shape_a, traits.problem.dtype)
        B_s = T.alloc_shared(traits.shape_b, traits.problem.dtype)
        stores = _alloc_stores(traits, operands)
        accumulators = _alloc_accumulators(traits)
        _swizzle(stores)
        pipeline = alloc_pipeline(traits.config.num_stages, 1, traits.roles.consumer_warps, traits.config.cluster)
        # The blocks of a cluster have tiles below or beside each other.
        tile_rows = T.ceildiv(traits.M, traits.config.block_M * traits.tiles_below)
        tile_columns = T.ceildiv(traits.N, traits.config.block_N * traits.tiles_beside)
        tiles = GroupedTiles(traits.config.group_rows // traits.tiles_below, tile_columns, tile_rows)
        clusters = traits.config.num_blocks // cluster
        scheduler = _scheduler(traits, clusters, block // cluster, tiles.num_tiles)
        thread = T.get_thread_binding()
        pdl.trigger()
        pdl.wait()
        _dispatch_roles(
            traits,
            operands,
            Block(A_s, B_s, pipeline, tiles, scheduler, block % cluster, thread, _sums(traits, A_s, B_s)),
            accumulators,
            stores,
        )
        if traits.config.cluster > 1:
            T.cluster_sync()  # no block may end while the other one still arrives at its barriers


def _sums(traits: Traits, A_s, B_s) -> ClusterSum | None:
    config = traits.config
    if config.joined == 1:
        return None
    memory = A_s if config.a_rows > config.block_N else B_s
    return ClusterSum(memory, config.block_M if config.is_swapped else config.block_N, config.joined)


def _scheduler(traits: Traits, clusters: int, number, num_tiles) -> PersistentScheduler | EqualParts:
    if traits.config.streams:
        return equal_parts(clusters, number, num_tiles, T.ceildiv(traits.K, BLOCK_K))
    return PersistentScheduler(clusters, number, num_tiles * traits.splits)


def _alloc_stores(traits: Traits, operands: Operands) -> list:
    if traits.leaves_sum or traits.config.joined > 1:
        return [None] * traits.config.num_consumers
    rows, columns = WGMMA_M, traits.config.subtile_N
    if traits.config.is_swapped:
        rows, columns = columns, rows
    return alloc_stores(operands.out, traits.config.num_consumers, rows, columns, traits.stores_by_tma)


def _alloc_accumulators(traits: Traits) -> list[list]:
    def alloc():
        return T.alloc_fragment((WGMMA_M, traits.config.block_N), "float32")

    return [[alloc() for _ in range(traits.mma_tiles)] for _ in range(traits.config.num_consumers)]


def _swizzle(stores: list) -> None:
    """Lay the buffers of TMA stores out without bank conflicts; those of operands are laid out by `T.wgmma_gemm`."""
    buffers = [buffer for of_consumer in stores if of_consumer for buffer in of_consumer.buffers]
    T.annotate_layout({buffer: make_swizzled_layout(buffer) for buffer in buffers})


def _dispatch_roles(traits: Traits, operands: Operands, block: Block, accumulators: list, stores: list) -> None:
    consumers = [
        (WARPGROUP, functools.partial(consume, traits, operands, block, number, *of_consumer))
        for number, of_consumer in enumerate(zip(accumulators, stores, strict=True))
    ]
    dispatch(block.thread, (WARPGROUP, functools.partial(produce, traits, operands, block)), *consumers)


# --- host ------------------------------------------------------------------------------------------------------------


def takes(problem: Problem) -> bool:
    """Hopper."""
    return problem.arch == ARCH


def sizes_served(problem: Problem) -> tuple[int, int]:
    """Return the fewest and the most rows that have the kernels of the problem."""
    (first, last), (first_alike, last_alike) = rows_of_choice(problem), rows_alike(problem.M)
    return max(first, first_alike), min(last, last_alike)


def compile_kernel(problem: Problem, device) -> Callable:
    """Return a function of tensors that launches the kernel, copies ahead of it, and the sum over splits behind it."""
    if is_turned(problem):
        multiply = _compile_product(replace(problem, a_is_k_major=True), device)
        return after_turn(problem, device, multiply, PASS_CONFIGS)
    multiply = _compile_product(problem, device)
    if is_padded(problem.a_row) or is_padded(problem.b_row):
        return after_pad(problem, device, multiply, PASS_CONFIGS)
    return multiply


def _compile_product(problem: Problem, device) -> Callable:
    config, splits = pick_config(problem)
    general = _any_sizes(problem)
    if config.streams:
        multiply = device.compile(streamed_matmul, general, config, pass_configs=PASS_CONFIGS)
        return _with_memory_of_parts(config, device, multiply)
    if splits == 1 or config.joined > 1:
        return device.compile(matmul, general, config, pass_configs=PASS_CONFIGS)
    if config.adds:
        multiply = device.compile(added_matmul, general, config, pass_configs=PASS_CONFIGS)
        return _with_memory(problem, config, splits, device, multiply)
    of_operands = replace(general, out_dtype="float32", epilogue=Epilogue())  # all that this kernel depends on
    multiply = device.compile(partial_matmul, of_operands, config, pass_configs=PASS_CONFIGS)
    return before_sum(general, splits, device, multiply, PASS_CONFIGS)


def _with_memory(problem: Problem, config: Config, splits: int, device, multiply: Callable) -> Callable:
    """Return a function of the problem's tensors that launches `multiply` with the memory of `SplitTiles`."""
    elements = config.block_M * config.block_N

    def run(*tensors):
        *inputs, out = tensors
        M, N = out.shape if not config.is_swapped else reversed(out.shape)
        below, beside = config.tiles_below, config.tiles_beside
        tiles = _ceildiv(M, config.block_M * below) * _ceildiv(N, config.block_N * beside) * config.cluster
        partial = device.empty(splits, tiles, elements, dtype="float32")
        multiply(*inputs, partial, device.empty(splits, tiles, config.num_consumers, dtype="int64"), out)

    return run


def _with_memory_of_parts(config: Config, device, multiply: Callable) -> Callable:
    """Return a function of the problem's tensors that launches `multiply` with the memory of `SplitTiles`."""

    def run(*tensors):
        *inputs, out = tensors
        partial = device.empty(config.num_blocks, config.block_M * config.block_N, dtype="float32")
        multiply(*inputs, partial, device.empty(config.num_blocks, config.num_consumers, dtype="int64"), out)

    return run


def _ceildiv(value, divisor: int):
    return -(-value // divisor)

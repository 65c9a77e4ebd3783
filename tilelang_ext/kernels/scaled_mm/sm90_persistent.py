"""Scaled matmul on Hopper: a warp-specialized persistent kernel, for many rows, and for few by swapped operands.

out[i, j] = sum over groups g of scale_a[i, g] * scale_b[j, g] * (a[i, g] . b[j, g]) + bias[j]

Warp roles, one block per SM:

| warpgroup | role | registers |
| --- | --- | --- |
| 0 | producer: TMA loads of A and B, and the scales | 40; with blockwise scales 56 where accumulators leave them |
| 1, and 2 if there are two | consumers: each has a part of the MMAs' rows and its epilogue | 232, then 224 |

Pipelines, producer role -> consumer role:

| pipeline | carries | full | empty |
| --- | --- | --- | --- |
| producer -> consumers | A and B of a K block of 128, its blockwise scales | the bytes and the producer | 4 warps of each |
| consumer -> its TMA stores | subtiles of the result, two buffers per consumer | a named barrier of 128 threads | one thread |

Steady state:

    producer   acquire | TMA A, TMA B | commit ; on to the next tile
    its other warps, for blockwise scales: acquire | copies of the scales, asynchronous | commit when they are done
    consumers  wait | issue the MMA of K block k | MMA k - 1 is complete: release | a deferred subtile of the tile before
               after the last K block: scale, add the bias, round | store most subtiles, defer the others

That is the timeline of `fast_accum`, where the accumulator stays in the tensor core. Otherwise every K block has an MMA of its
own, whose partial accumulator is promoted: the warpgroup adds it, times the scales if they are blockwise, to a float32
accumulator in registers, while the other consumer's MMA runs. Errors of the tensor core's narrower sums then do not add up.

An MMA has 64 rows and any multiple of 8 columns. With `is_swapped`, columns of out are its rows and rows of out its columns, so
that few rows, or such as fill no multiple of 64, take no more time than they need; subtiles are then stored transposed.

N and K may be arguments of the kernel, which sizes share then, where K has more blocks than the pipeline has stages
(`compile_kernel` says where). Where accumulators are promoted, an iteration of the main loop has several K blocks; those that
are left of a tile, or of a part of one, come behind it, and the stages of that iteration that stay empty are passed on.

With `divides_k` all blocks share the last tiles, each an equal number of their iterations (stream-K: `StreamKScheduler`,
`SplitTiles`): for products whose tiles do not fill the last wave. Where each row of tiles has more blocks than tiles, each row
has as many blocks as the others, which walk in step; otherwise all tiles lie in one line.

A tile of 64 rows whose operands are not swapped has one consumer, and any multiple of 16 as columns: as many tiles as there are
SMs stream b without an exchange.

Takes scales that cover all of K, or 1x128 beside 128x128. Floor on an H200: 2 M N K / 1.98e15 s, and the bytes of a, b and out
at 4.25e12 bytes/s (docs/design/performance.md). `sm90_config` picks the configuration; `sm90_block` has what the roles share,
`sm90_load` the producer, `sm90_multiply` and `sm90_store` the consumers.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.kernels.scaled_mm.problem import Problem
from tilelang_ext.kernels.scaled_mm.sm90_block import (
    BLOCK_K,
    WGMMA_M,
    Accumulators,
    Block,
    Config,
    Operands,
    Traits,
    is_bound_by_loads,
    promotes,
    scale_type,
)
from tilelang_ext.kernels.scaled_mm.sm90_load import produce
from tilelang_ext.kernels.scaled_mm.sm90_multiply import consume
from tilelang_ext.kernels.sm90 import split_tiles
from tilelang_ext.kernels.sm90.epilogue import SubtileStores, alloc_stores
from tilelang_ext.kernels.sm90.pipeline import alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARPGROUP, dispatch
from tilelang_ext.kernels.sm90.scheduler import GroupedTiles, PersistentScheduler
from tilelang_ext.kernels.sm90.split_tiles import SplitTiles

# TMA clips what lies past the end of a matrix, and all other indices are clamped here. Every barrier is explicit: upstream's
# search for places that lack one is up to half of the time that a kernel takes to lower.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}
_GROUP_ROWS = 8  # rows of tiles that are walked together


def scaled_matmul(problem: Problem, config: Config):
    """The prim_func: (a, scale_a, b, scale_b, out), before out bias where the problem has one, then the two tensors of
    `memory_of` where blocks share tiles.

    A problem whose N and K are 0 leaves them to the arguments.
    """
    M, N, K = T.dynamic("M"), problem.N, problem.K
    if not K:
        per_16_bytes = 128 // T.dtype(problem.out_dtype).bits
        N, K = T.dynamic(f"N_in_{per_16_bytes}") * per_16_bytes, T.dynamic("K_in_16") * 16
    traits = Traits(problem, config, M, N, K)
    a_type, b_type = T.Tensor((M, K), problem.a_dtype), T.Tensor((N, K), problem.b_dtype)
    scale_a_type = scale_type(problem, problem.layout_a, M, "scale_a", K)
    scale_b_type = scale_type(problem, problem.layout_b, N, "scale_b", K)
    out_type = T.Tensor((M, N), problem.out_dtype)

    bias_type = None if problem.bias_dtype is None else T.Tensor((N,), problem.bias_dtype)
    split_types = [T.Tensor(shape, dtype) for shape, dtype in memory_of(config)]
    return _prim_func(traits, a_type, scale_a_type, b_type, scale_b_type, bias_type, split_types, out_type)


def _prim_func(traits, a_type, scale_a_type, b_type, scale_b_type, bias_type, split_types, out_type):
    """Return the prim_func of one of four lists of parameters."""
    if split_types:
        partial_type, given_type = split_types
    if bias_type is None and not split_types:

        @T.prim_func
        def scaled_matmul(a: a_type, scale_a: scale_a_type, b: b_type, scale_b: scale_b_type, out: out_type):
            _matmul(traits, Operands(a, scale_a, b, scale_b, None, out))
    elif not split_types:

        @T.prim_func
        def scaled_matmul(a: a_type, scale_a: scale_a_type, b: b_type, scale_b: scale_b_type, bias: bias_type, out: out_type):
            _matmul(traits, Operands(a, scale_a, b, scale_b, bias, out))
    elif bias_type is None:

        @T.prim_func
        def scaled_matmul(
            a: a_type,
            scale_a: scale_a_type,
            b: b_type,
            scale_b: scale_b_type,
            partial: partial_type,
            given: given_type,
            out: out_type,
        ):
            _matmul(traits, Operands(a, scale_a, b, scale_b, None, out, SplitTiles(partial, given)))
    else:

        @T.prim_func
        def scaled_matmul(
            a: a_type,
            scale_a: scale_a_type,
            b: b_type,
            scale_b: scale_b_type,
            bias: bias_type,
            partial: partial_type,
            given: given_type,
            out: out_type,
        ):
            _matmul(traits, Operands(a, scale_a, b, scale_b, bias, out, SplitTiles(partial, given)))

    return scaled_matmul


# --- block: shared memory, barriers, scheduler, roles ----------------------------------------------------------------


@T.macro
def _matmul(traits, operands):
    with T.Kernel(traits.config.num_blocks, threads=traits.roles.threads) as block:
        if traits.config.divides_k:
            split_tiles.declare()
        A_s = T.alloc_shared((traits.config.num_stages, traits.config.block_M, BLOCK_K), traits.problem.a_dtype)
        B_s = T.alloc_shared((traits.config.num_stages, traits.config.block_N, BLOCK_K), traits.problem.b_dtype)
        scales_s = T.alloc_shared(traits.shared_scales, "float32")
        stores = _alloc_stores(traits, operands)
        accumulators = _alloc_accumulators(traits)
        _swizzle(stores)
        pipeline = alloc_pipeline(traits.config.num_stages, traits.producer_arrivals, traits.roles.consumer_warps)
        tile_rows = T.ceildiv(traits.M, traits.config.block_M)
        tiles = GroupedTiles(_GROUP_ROWS, traits.tile_columns, tile_rows)
        scheduler = PersistentScheduler(traits.config.num_blocks, block, tiles.num_tiles)
        thread = T.get_thread_binding()
        _dispatch_roles(traits, operands, Block(A_s, B_s, scales_s, pipeline, tiles, scheduler, thread), accumulators, stores)


def _alloc_stores(traits: Traits, operands: Operands) -> list[SubtileStores]:
    config = traits.config
    rows, columns = (config.subtile, WGMMA_M) if config.is_swapped else (WGMMA_M, config.subtile)
    return alloc_stores(operands.out, config.num_consumers, rows, columns)


def _alloc_accumulators(traits: Traits) -> list[Accumulators]:
    def alloc():
        return T.alloc_fragment((WGMMA_M, traits.mma_N), "float32")

    of_tiles = [[alloc() for _ in range(traits.mma_tiles)] for _ in range(traits.config.num_consumers)]
    return [Accumulators(tiles, alloc()) for tiles in of_tiles]


def _swizzle(stores: list[SubtileStores]) -> None:
    """Lay the buffers of TMA stores out without bank conflicts; those of operands are laid out by `T.wgmma_gemm`."""
    buffers = [buffer for of_consumer in stores for buffer in of_consumer.buffers]
    T.annotate_layout({buffer: make_swizzled_layout(buffer) for buffer in buffers})


def _dispatch_roles(traits: Traits, operands: Operands, block: Block, accumulators: list, stores: list) -> None:
    consumers = [
        (WARPGROUP, functools.partial(consume, traits, operands, block, *of_consumer))
        for of_consumer in zip(accumulators, stores, strict=True)
    ]
    dispatch(block.thread, (WARPGROUP, functools.partial(produce, traits, operands, block)), *consumers)


# --- host ------------------------------------------------------------------------------------------------------------


def memory_of(config: Config) -> tuple[tuple[tuple[int, ...], str], ...]:
    """Return shapes and dtypes of the memory through which blocks give accumulators to others: `SplitTiles`."""
    if not config.divides_k:
        return ()
    elements = config.block_M * config.block_N
    return ((config.num_blocks, elements), "float32"), ((config.num_blocks, config.num_consumers), "int64")


def compile_kernel(problem: Problem, config: Config, compile: Callable) -> Callable:
    """Return the compiled kernel; N and K are its constants where it has few K blocks, or promotes at the speed of its MMAs.

    Its producer then needs fewer registers, and the consumers get them.
    """
    general = replace(problem, max_M=0)
    if config.num_stages < -(-problem.K // BLOCK_K) and (not promotes(problem) or is_bound_by_loads(problem, config)):
        general = replace(general, N=0, K=0)
    return compile(scaled_matmul, general, config, pass_configs=PASS_CONFIGS)

"""Attention on Hopper for head_dim above 256: scores and values by different warpgroups, P between them in shared memory.

    S = q k^T;  m' = max(m, rows of S);  P = 2^(scale (S - m'));  l = a l + rows of P;  O = a O + P v,  a = 2^(scale (m - m'))

O of 64 queries fills the registers of two warpgroups, so a third one computes S and its softmax. The two blocks of a cluster
have neighbouring tiles of 64 queries and share the loads of k and v: each loads one half, and both receive both.

Warp roles, one block per SM:

| warpgroup | role | registers |
| --- | --- | --- |
| 0 | producers, a warp each: TMA loads of q and k; of one half of the columns of v; of the other | 24 |
| 1 | scores: S, its softmax, P to shared memory | 168 |
| 2, 3 | values: one half of the columns of O each | 160 |

Pipelines, producer role -> consumer role:

| pipeline | carries | full | empty |
| --- | --- | --- | --- |
| q | the queries of a tile, one stage | one thread, the bytes | 4 warps |
| k | 64 channels of a block of 96 keys | one thread, the bytes of both blocks | 4 warps of each block |
| v | 32 rows of one half of the columns of a block | the same | the same |
| scores -> values | P of a block, and the factor of each row | 4 warps | 8 warps |
| scores -> values | by what the rows of O are divided | 128 threads | 8 warps |

Steady state, for key blocks from the last to the first:

    producers  64 channels of k of block n - 1 | the next channels | ...;  32 rows of v of block n | ...
    scores     issue S = q k[n - 1]^T, 64 channels at a time; between them the softmax of block n, by quarters, and P to p_s
    values     P of block n is there: scale O | issue O += P v[n], 32 rows at a time

So there are always MMAs of S or of O to run. A block reads each key and value once for 64 queries, 256 KB of shared memory
written and 350 KB read for 128 keys, which bounds it at 84% of the tensor cores' rate (docs/log/attention.md).
"""

import functools
import inspect
from collections.abc import Callable

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import Operands, Problem
from tilelang_ext.kernels.attention.sm90_block import ARCH, PASS_CONFIGS
from tilelang_ext.kernels.attention.sm90_softmax import SOURCE
from tilelang_ext.kernels.attention.sm90_wide_block import (
    BLOCK_N,
    CLUSTER,
    P_PANELS,
    P_STAGES,
    ROWS,
    STAGES,
    V_ROWS,
    WARPS,
    Block,
    Traits,
)
from tilelang_ext.kernels.attention.sm90_wide_load import produce
from tilelang_ext.kernels.attention.sm90_wide_scores import compute_scores
from tilelang_ext.kernels.attention.sm90_wide_values import compute_values
from tilelang_ext.kernels.attention.tiles import PANEL, TileOrder, prim_func
from tilelang_ext.kernels.sm90 import pdl
from tilelang_ext.kernels.sm90.pipeline import alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARPGROUP, dispatch

CLUSTERS = "cluster_dims" in inspect.signature(T.Kernel).parameters  # not in tilelang 0.1.14


def attention(problem: Problem):
    """The prim_func of `tiles.prim_func`."""
    traits = Traits(problem)
    return prim_func(problem, lambda operands: _attention(traits, operands))


@T.macro
def _attention(traits, operands):
    with T.Kernel(traits.problem.num_sms // CLUSTER * CLUSTER, threads=4 * WARPGROUP, cluster_dims=(CLUSTER, 1, 1)) as block:
        T.import_source(SOURCE)
        q_s = T.alloc_shared((traits.panels, ROWS, PANEL), traits.problem.dtype)
        k_s = T.alloc_shared((STAGES, BLOCK_N, PANEL), traits.problem.dtype)
        v_s = T.alloc_shared((STAGES, traits.half, V_ROWS, PANEL), traits.problem.dtype)
        p_s = T.alloc_shared((P_STAGES, P_PANELS, ROWS, PANEL), traits.problem.dtype)
        factor_s = T.alloc_shared((P_STAGES, ROWS), "float32")
        inverse_s = T.alloc_shared((ROWS,), "float32")
        T.annotate_layout({buffer: make_swizzled_layout(buffer) for buffer in (q_s, k_s, v_s, p_s)})
        q_pipeline = alloc_pipeline(1, 1, WARPS)
        k_pipeline = alloc_pipeline(STAGES, 1, WARPS, CLUSTER)
        v_pipelines = _alloc_v_pipelines()
        p_pipeline = alloc_pipeline(P_STAGES, WARPS, 2 * WARPS)
        result = alloc_pipeline(1, WARPGROUP, 2 * WARPS)
        clusters = traits.problem.num_sms // CLUSTER
        order = TileOrder(traits.problem, operands, ROWS * CLUSTER, clusters, block // CLUSTER)
        thread = T.get_thread_binding()
        pdl.trigger()
        pdl.wait()
        _dispatch_roles(
            traits,
            operands,
            Block(
                q_s, k_s, v_s, p_s, factor_s, inverse_s, q_pipeline, k_pipeline, v_pipelines, p_pipeline, result, order,
                block % CLUSTER, thread,
            ),
        )  # fmt: skip
        T.cluster_sync()  # no block may end while the other one still writes to it


def _alloc_v_pipelines() -> list:
    return [alloc_pipeline(STAGES // 2, 1, WARPS, CLUSTER) for _ in range(2)]


def _dispatch_roles(traits: Traits, operands: Operands, block: Block) -> None:
    roles = (
        functools.partial(produce, traits, operands, block),
        functools.partial(compute_scores, traits, operands, block),
        functools.partial(compute_values, traits, operands, block, 0),
        functools.partial(compute_values, traits, operands, block, 1),
    )
    dispatch(block.thread, *((WARPGROUP, role) for role in roles))


def takes(problem: Problem) -> bool:
    """Hopper, head_dim above 256, 16 bits."""
    return CLUSTERS and problem.arch == ARCH and problem.head_dim > 256 and not problem.is_fp8


def compile_kernel(problem: Problem, device) -> Callable:
    """Return the compiled kernel."""
    return device.compile(attention, problem, pass_configs=PASS_CONFIGS)

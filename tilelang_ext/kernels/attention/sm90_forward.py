"""Attention on Hopper for head_dim up to 256: a warp-specialized persistent kernel, with its softmax between WGMMAs.

    S = q k^T;  m' = max(m, rows of S);  P = 2^(scale (S - m'));  l = a l + rows of P;  O = a O + P v,  a = 2^(scale (m - m'))

Warp roles, one block per SM, which takes a tile of 64 rows per consumer after the other:

| warpgroup | role | registers with 2 and with 3 consumers |
| --- | --- | --- |
| 0 | producer: TMA loads of q, k and v | 24, 32 |
| 1, 2, and 3 if there are three | consumers: 64 rows each, their MMAs, softmax and epilogue | 240, 160 |

Pipelines, producer role -> consumer role:

| pipeline | carries | full | empty |
| --- | --- | --- | --- |
| q | the queries of a tile | one thread, the bytes | 4 warps of each consumer |
| k, and v | a block of keys, of values | the same | the same |
| consumer -> next consumer | the turn to issue MMAs | a named barrier of 256 threads | |

Steady state, for key blocks from the last to the first:

    producer   q of the tile | k of block n | v of block n + 1 | k of block n - 1 | ...
    consumers  issue S = q k[n]^T | issue O += P v[n + 1] | S is complete: release k, mask, P' = softmax of S | O is complete:
               release v, scale O, P = P'

So the tensor cores multiply P of one block while the softmax of the next is computed, and the other consumers' MMAs run
meanwhile. Full tiles that do not fill a wave of SMs are divided: each SM gets a range of their key blocks, and `sm90_parts`
sums what comes of them. P never leaves the registers (`probabilities`). Rows past the end of q, k and v are zeros, by TMA.

Floor on an H200: 4 S_q S_k head_dim heads batch / 9.9e14 s, half of it if causal (docs/log/attention.md).
"""

import functools
from collections.abc import Callable

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.kernels.attention import sm90_parts, sm90_transpose
from tilelang_ext.kernels.attention.probabilities import KEY_UNIT
from tilelang_ext.kernels.attention.problem import Operands, Problem
from tilelang_ext.kernels.attention.sm90_block import ARCH, PASS_CONFIGS, SIMPLE_CONFIGS, Block, Traits
from tilelang_ext.kernels.attention.sm90_config import Config, pick_config
from tilelang_ext.kernels.attention.sm90_load import produce
from tilelang_ext.kernels.attention.sm90_multiply import consume
from tilelang_ext.kernels.attention.sm90_softmax import SOURCE
from tilelang_ext.kernels.attention.tiles import PANEL, PARTS, TileOrder, prim_func
from tilelang_ext.kernels.sm90 import pdl
from tilelang_ext.kernels.sm90.pipeline import alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARPGROUP, dispatch

PACK_SOURCE = r"""
__device__ __forceinline__ unsigned tilelang_ext_e4m3x4(float x, float y, float z, float w) {
  unsigned codes;
  asm("{.reg .b16 lo, hi;\n"
      "cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n"
      "mov.b32 %0, {lo, hi};}" : "=r"(codes) : "f"(x), "f"(y), "f"(z), "f"(w));
  return codes;
}
"""  # of a kernel that rounds P to 8 bits


def attention(problem: Problem, config: Config):
    """The prim_func of `tiles.prim_func`: with partial and partial_lse where tiles are divided, and transposed codes of v."""
    traits = Traits(problem, config)
    part = traits.part if traits.divides else None
    return prim_func(problem, lambda operands: _attention(traits, operands), part, problem.is_fp8)


# --- block: shared memory, barriers, roles ---------------------------------------------------------------------------


@T.macro
def _attention(traits, operands):
    with T.Kernel(traits.problem.num_sms, threads=traits.roles.threads) as block:
        T.import_source(SOURCE + (PACK_SOURCE if traits.problem.is_fp8 else ""))
        q_s = T.alloc_shared((traits.config.q_stages, traits.panels, traits.config.block_M, traits.panel), traits.problem.dtype)
        k_s = T.alloc_shared(
            (traits.config.num_stages, traits.panels, traits.config.block_N, traits.panel), traits.problem.dtype
        )
        v_s = T.alloc_shared((traits.config.num_stages, *traits.v_shape), traits.problem.dtype)
        out_s = _alloc_results(traits, q_s)
        T.annotate_layout({buffer: make_swizzled_layout(buffer) for buffer in dict.fromkeys((q_s, k_s, v_s, out_s))})
        q_pipeline = alloc_pipeline(traits.config.q_stages, 1, traits.roles.consumer_warps)
        k_pipeline = alloc_pipeline(traits.config.num_stages, 1, traits.roles.consumer_warps)
        v_pipeline = alloc_pipeline(traits.config.num_stages, 1, traits.roles.consumer_warps)
        order = _order(traits, operands, block)
        thread = T.get_thread_binding()
        pdl.trigger()
        pdl.wait()
        _dispatch_roles(traits, operands, Block(q_s, k_s, v_s, out_s, q_pipeline, k_pipeline, v_pipeline, order, thread))


def _alloc_results(traits: Traits, q_s):
    if traits.keeps_q or not traits.stores_by_tma:
        return q_s
    return T.alloc_shared((1, traits.channels // PANEL, traits.config.block_M, PANEL), traits.problem.result)


def _order(traits: Traits, operands: Operands, block) -> TileOrder:
    order = TileOrder(traits.problem, operands, traits.config.block_M, traits.problem.num_sms, block)
    return order.with_parts(traits.config.block_N) if traits.divides else order


def _dispatch_roles(traits: Traits, operands: Operands, block: Block) -> None:
    consumers = [
        (WARPGROUP, functools.partial(consume, traits, operands, block, number))
        for number in range(traits.config.num_consumers)
    ]
    dispatch(block.thread, (WARPGROUP, functools.partial(produce, traits, operands, block)), *consumers)


# --- host ------------------------------------------------------------------------------------------------------------


def takes(problem: Problem) -> bool:
    """Hopper, head_dim up to 256; of 8 bits rows of 16 bytes, and sequences of one length."""
    if problem.arch != ARCH or problem.head_dim > 256:
        return False
    return not problem.is_fp8 or (problem.head_dim % 16 == 0 and not problem.has_lengths)


def compile_kernel(problem: Problem, device) -> Callable:
    """Return the compiled kernel, and what comes before and after it, as one function."""
    config, configs = pick_config(problem), PASS_CONFIGS
    traits = Traits(problem, config)
    attend = device.compile(attention, problem, config, pass_configs=configs)
    transpose = device.compile(sm90_transpose.transpose, problem, pass_configs=SIMPLE_CONFIGS) if problem.is_fp8 else None
    total = None
    if traits.divides:
        total = device.compile(sm90_parts.sum_parts, problem, traits.part, config.block_N, pass_configs=SIMPLE_CONFIGS)

    def run(q, k, v, sinks, cu_q, cu_k, q_scale, k_scale, v_scale, out, lse) -> None:
        if transpose is not None:
            batch, keys, kv_heads, head_dim = v.shape
            units = (keys + (KEY_UNIT - 1)) // KEY_UNIT
            transposed = device.empty(batch, kv_heads, head_dim, units, KEY_UNIT, dtype=problem.dtype)
            transpose(v, transposed)
            v = transposed.flatten(3)
        parameters = (q, k, v, sinks, cu_q, cu_k, q_scale, k_scale, v_scale, out, lse)
        if total is None:
            attend(*parameters)
            return
        parts = PARTS * problem.num_sms
        partial = device.empty(parts, *traits.part, dtype="float32")
        partial_lse = device.empty(parts, config.block_M, dtype="float32")
        attend(*parameters, partial, partial_lse)
        total(partial, partial_lse, k, sinks, out, lse)

    return run

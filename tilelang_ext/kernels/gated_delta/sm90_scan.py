"""From chunk to chunk on Hopper: results and states of the gated delta rule, with the state in registers.

Everything is transposed, so that whatever an MMA reads from the left is an accumulator of the MMA before, rounded (PTX ISA
9.7.15: what a thread has of an accumulator are the elements that it holds of a left operand of 16 bits). Of a chunk, for 64
rows of V:

    P = S K^T;  X = V^T - P diag(p);  R = X T^T                                p = factors[0]
    O = S Q^T diag(o) + R A^T                                                  o = factors[2]
    S = s S + R diag(u) K                                                      u = factors[1], s = factors[3]

Warp roles, one block per sequence, head and slice of 64 rows of V per consumer:

| warpgroup | role | registers |
| --- | --- | --- |
| 0 | producer: TMA loads of k, q, v, T, A and the factors of a chunk | 24 |
| 1, and 2 if there are two | consumers: 64 rows of V each, their MMAs and results | 240 |

Pipeline, producer role -> consumer role: a stage is a chunk; full: 128 threads and the bytes, empty: 4 warps of each consumer.

Steady state of a consumer:

    issue R | issue S Q^T | scale S | R is complete: round it twice | the next chunk has landed | issue S |
    S Q^T is complete: scale it | issue O | S is complete: round it, issue the next chunk's P |
    O is complete: store it through the stage's v, release the stage | P is complete: the next chunk's X

The wait for the next chunk stands where no accumulator that is read before the next wait for MMAs is in flight: its loop would
make ptxas serialize the MMAs.

Rows past the end of a tensor are zeros, by TMA. Those of another sequence are cleared where they would be multiplied by 0.

Floor on an H200, K and V of 128: the MMAs of a chunk and 64 rows take 1,024 cycles, one after the other; both kernels move 2 KB
per token and head, at 4.25 TB/s (docs/log/gated_delta.md).
"""

import functools
from collections.abc import Callable

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.kernels.gated_delta.prefill_problem import (
    FACTORS,
    HOPPER,
    MAX_SEQUENCES,
    PrefillProblem,
    alloc_span,
    find_sequence,
)
from tilelang_ext.kernels.gated_delta.sm90_block import Block, Operands, Traits
from tilelang_ext.kernels.gated_delta.sm90_config import PANEL, WGMMA_M, Config, pick_config, sequences_of_one_wave
from tilelang_ext.kernels.gated_delta.sm90_load import produce
from tilelang_ext.kernels.gated_delta.sm90_multiply import consume
from tilelang_ext.kernels.sm90 import pdl
from tilelang_ext.kernels.sm90.pipeline import alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARPGROUP, dispatch

# The kernel's own barriers order everything here; TMA clips what lies past the end, and stores are guarded.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}


def scan_chunks(problem: PrefillProblem, config: Config):
    """The prim_func (q, k, v, solution, scores, factors, cu_seqlens, initial, out, final)."""
    traits, types = Traits(problem, config), problem.types()

    @T.prim_func
    def scan_chunks(
        q: types.q,
        k: types.k,
        v: types.v,
        solution: types.solution,
        scores: types.scores,
        factors: types.factors,
        cu_seqlens: types.cu_seqlens,
        initial: types.initial,
        out: types.out,
        final: types.final,
    ):
        _scan(traits, Operands(q, k, v, solution, scores, factors, cu_seqlens, initial, out, final))

    return scan_chunks


@T.macro
def _scan(traits, operands):
    with T.Kernel(
        operands.final.shape[0] * traits.problem.heads * traits.slices, threads=traits.config.roles.threads
    ) as number:
        stages, C, dtype = traits.config.num_stages, traits.problem.chunk, traits.problem.dtype
        q_s = T.alloc_shared((stages, traits.panels, C, PANEL), dtype)
        k_s = T.alloc_shared((stages, traits.panels, C, PANEL), dtype)
        v_s = T.alloc_shared((stages, traits.config.num_consumers, C, PANEL), dtype)
        solution_s = T.alloc_shared((stages, C, PANEL), dtype)
        scores_s = T.alloc_shared((stages, C, PANEL), dtype)
        factors_s = T.alloc_shared((stages, FACTORS, C), "float32")
        T.annotate_layout({buffer: make_swizzled_layout(buffer) for buffer in (q_s, k_s, v_s, solution_s, scores_s)})
        pipeline = alloc_pipeline(stages, WARPGROUP, traits.config.roles.consumer_warps)
        span, thread = alloc_span(), T.get_thread_binding()
        head, sequence = number // traits.slices % traits.problem.heads, number // (traits.slices * traits.problem.heads)
        row = number % traits.slices * (WGMMA_M * traits.config.num_consumers)
        pdl.trigger()
        pdl.wait()
        find_sequence(traits.problem, operands.q, operands.cu_seqlens, sequence, span)
        _dispatch_roles(
            traits,
            operands,
            Block(q_s, k_s, v_s, solution_s, scores_s, factors_s, pipeline, span, sequence, head, row, thread),
        )


def _dispatch_roles(traits: Traits, operands: Operands, block: Block) -> None:
    consumers = [
        (WARPGROUP, functools.partial(consume, traits, operands, block, number))
        for number in range(traits.config.num_consumers)
    ]
    dispatch(block.thread, (WARPGROUP, functools.partial(produce, traits, operands, block)), *consumers)


def takes(problem: PrefillProblem) -> bool:
    """Hopper, K of 64 or 128 and V of whole tiles."""
    return problem.arch == HOPPER and problem.K in (PANEL, 2 * PANEL) and problem.V % WGMMA_M == 0


def sequences_served(problem: PrefillProblem, sequences: int) -> tuple[int, int]:
    """Return the fewest and the most sequences that have the configuration of this number."""
    most = sequences_of_one_wave(problem)
    return (1, most) if sequences <= most else (most + 1, MAX_SEQUENCES)


def compile_kernel(problem: PrefillProblem, sequences: int, device) -> Callable:
    """Return the compiled kernel for numbers of sequences that have the configuration of this one."""
    return device.compile(scan_chunks, problem, pick_config(problem, sequences), pass_configs=PASS_CONFIGS)

"""The producer of the scan on Hopper: TMA loads of k, q, v, T, A and the factors, chunk after chunk."""

from tilelang_ext import language as T
from tilelang_ext.kernels.gated_delta.prefill_problem import FACTORS
from tilelang_ext.kernels.gated_delta.sm90_block import Block, Operands, Traits
from tilelang_ext.kernels.gated_delta.sm90_config import PANEL
from tilelang_ext.kernels.sm90.roles import WARPGROUP

_FLOAT_BYTES = 4


@T.macro
def produce(traits, operands, block):
    """Keep the pipeline filled, chunk after chunk."""
    traits.config.roles.begin_producer()
    for chunk in T.serial(block.num_chunks):
        stage = block.pipeline.stage(chunk)
        block.pipeline.acquire(stage, block.pipeline.empty_phase(chunk))
        _load(traits, operands, block, chunk, stage)
        block.pipeline.commit(stage)


def _load(traits: Traits, operands: Operands, block: Block, chunk, stage) -> None:
    """Issue the loads of a chunk, in the order in which consumers need them."""
    problem, span, full = traits.problem, block.span, block.pipeline.full[stage]
    C, first = problem.chunk, span.first + chunk * problem.chunk
    tile, qk_head = (span.slot + chunk) * problem.heads + block.head, block.head // (problem.heads // problem.qk_heads)

    def load_panels(source, head, column: int, shared, panels: int) -> None:
        for panel in range(panels):
            at = column + panel * PANEL
            T.evaluate(
                T.tma_copy(
                    source[span.batch, first : first + C, head, at : at + PANEL], shared[stage, panel, :, :], barrier=full
                )
            )

    @T.macro
    def load_factors():
        if T.shuffle_elect(WARPGROUP):
            T.mbarrier_expect_tx(full, FACTORS * C * _FLOAT_BYTES)
            T.tma_load(
                T.address_of(block.factors_s[stage, 0, 0]), T.address_of(operands.factors[tile, 0, 0]), full,
                FACTORS * C * _FLOAT_BYTES, 0,
            )  # fmt: skip

    load_panels(operands.k, qk_head, 0, block.k_s, traits.panels)
    load_factors()
    load_panels(operands.v, block.head, block.row, block.v_s, traits.config.num_consumers)
    T.evaluate(T.tma_copy(operands.solution[tile, 0:C, 0:C], block.solution_s[stage, :, :], barrier=full))
    load_panels(operands.q, qk_head, 0, block.q_s, traits.panels)
    T.evaluate(T.tma_copy(operands.scores[tile, 0:C, 0:C], block.scores_s[stage, :, :], barrier=full))

"""What the roles of a block of the scan on Hopper share: constants, parameters, shared memory and barriers."""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.gated_delta.prefill_problem import PrefillProblem, Span
from tilelang_ext.kernels.gated_delta.sm90_config import PANEL, ROW_BYTES, WGMMA_M, Config
from tilelang_ext.kernels.sm90.pipeline import Pipeline


@dataclass(frozen=True, eq=False)
class Traits:
    """The host's constants of one kernel."""

    problem: PrefillProblem
    config: Config

    @property
    def slices(self) -> int:
        """Blocks of a head."""
        return self.problem.V // (WGMMA_M * self.config.num_consumers)

    @property
    def panels(self) -> int:
        """Panels of 64 channels."""
        return self.problem.K // PANEL

    @property
    def panel_bytes(self) -> int:
        return self.problem.chunk * ROW_BYTES

    @property
    def states(self) -> int:
        """Registers of S of a thread."""
        return self.problem.K // 2

    @property
    def tokens(self) -> int:
        """Registers of P, X, R and O of a thread."""
        return self.problem.chunk // 2


@dataclass(frozen=True, eq=False)
class Operands:
    """The parameters of the prim_func, in order."""

    q: Any
    k: Any
    v: Any
    solution: Any
    scores: Any
    factors: Any
    cu_seqlens: Any
    initial: Any
    out: Any
    final: Any


@dataclass(frozen=True, eq=False)
class Block:
    """What the roles of a block share."""

    q_s: Any  # (num_stages, panels, C, 64)
    k_s: Any
    v_s: Any  # (num_stages, num_consumers, C, 64)
    solution_s: Any  # (num_stages, C, 64)
    scores_s: Any
    factors_s: Any  # (num_stages, FACTORS, C)
    pipeline: Pipeline
    span: Span
    sequence: Any
    head: Any
    row: Any  # of V, the block's first
    thread: Any

    @property
    def num_chunks(self):
        return T.ceildiv(self.span.tokens, PANEL)

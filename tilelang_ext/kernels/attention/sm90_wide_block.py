"""What the warpgroups of attention above head_dim 256 on Hopper share: sizes, shared memory, barriers."""

from dataclasses import dataclass
from typing import Any

from tilelang_ext.kernels.attention.problem import Problem
from tilelang_ext.kernels.attention.tiles import PANEL, TileOrder
from tilelang_ext.kernels.sm90 import multicast
from tilelang_ext.kernels.sm90.pipeline import Pipeline
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP

CLUSTER = multicast.BLOCKS
ROWS = 64  # queries of a block
BLOCK_N = 96  # keys: two S of them fit in the registers of one warpgroup
V_ROWS = 32  # of a stage of v
V_STEPS = BLOCK_N // V_ROWS
P_PANELS = -(-BLOCK_N // PANEL)
STAGES = 4  # of k, and of v: two for each half of the columns
P_STAGES = 2
_MMA_PANELS = 2  # of values, side by side in an MMA
SCORES_ROLE = 1  # number of its warpgroup
PRODUCER_REGISTERS, SCORES_REGISTERS, VALUES_REGISTERS = 24, 168, 160
WARPS = WARPGROUP // WARP
ROW_BYTES, UNIT = 128, 16  # of a row of shared memory; of a descriptor


@dataclass(frozen=True, eq=False)
class Traits:
    """The host's constants of one kernel."""

    problem: Problem

    @property
    def panels(self) -> int:
        """Panels of 64 channels."""
        return -(-self.problem.head_dim // PANEL)

    @property
    def half(self) -> int:
        """Panels of one half of the columns of O; the last one of the second half may lie outside."""
        return -(-self.panels // 2)

    @property
    def parts(self) -> tuple:
        """First panel and panels of the MMAs that make one half: wider ones need more registers than a thread starts with."""
        return ((0, _MMA_PANELS), (_MMA_PANELS, self.half - _MMA_PANELS))


@dataclass(frozen=True, eq=False)
class Block:
    """What the roles of a block share."""

    q_s: Any  # (panels, 64, 64)
    k_s: Any  # (stages, 128, 64)
    v_s: Any  # (stages, panels of a half, 32, 64)
    p_s: Any  # (2, 2 panels of 64 keys, 64, 64)
    factor_s: Any  # (2, 64)
    inverse_s: Any  # (64,)
    q_pipeline: Pipeline
    k_pipeline: Pipeline
    v_pipelines: list  # of each half
    p_pipeline: Pipeline
    result: Pipeline
    order: TileOrder
    rank: Any  # of the block in its cluster
    thread: Any

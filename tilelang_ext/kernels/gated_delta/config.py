"""How the kernels of the gated delta rule are divided among warps and blocks, by what was measured.

Few lanes per row mean few shuffles: with 8 lanes a warp adds up four rows in three steps, with 32 one row in five. But a lane
then needs more registers for q and k. With 4 it holds what an MMA takes of a state of 16 bits.

PDL lets the blocks of the next launches in before they may read what the one ahead writes. Until then they can ask for their
rows in L2, which helps where there are few. Where there are many, L2 looks for each line twice and is the busiest unit: `ncu`
has it at 72% of its throughput in a replay of 256 sequences.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from tilelang_ext.kernels.gated_delta.problem import WARP, Problem

MMA_LANES = 4  # per row, as the MMA of 16x8x16 divides its operands: m16n8k16 in the PTX ISA, 9.7.14
MAX_WEIGHED = 16  # entries of a window whose weights a warp computes together


@dataclass(frozen=True)
class Config:
    """A block has `warps` warps, each with `rows` rows of a head's state at a time, in groups of `lanes` lanes per row.

    In the replay kernel a warp has as many rows again in each of `turns` turns; with MMA_LANES lanes, MMAs compute its
    products. On CUDA registers suffice for `min_blocks_per_sm` blocks, and shared memory for at most `max_blocks_per_sm`; 0
    leaves either open. The first `asking_blocks` blocks, or with None all, ask for their rows in L2 before they may load them.
    """

    warps: int
    rows: int
    lanes: int = 8
    turns: int = 1
    min_blocks_per_sm: int = 0
    max_blocks_per_sm: int = 0
    asking_blocks: int | None = None

    @property
    def groups(self) -> int:
        """Rows that a warp loads at a time."""
        return WARP // self.lanes

    @property
    def rows_per_lane(self) -> int:
        return self.rows // self.groups


class _Choice(NamedTuple):
    rows: int  # of a warp at a time
    warps: int
    channels: int  # of a lane
    turns: int = 1
    min_blocks_per_sm: int = 0
    max_blocks_per_sm: int = 0
    asking_per_sm: int | None = None  # blocks, of a launch that asks for no more


_TABLES = {
    # rows of the state per SM up to here; measured on an H200, 8 heads of 128 x 128
    "float32": [
        # PDL lets blocks of several launches in, which ask for rows long before they may use them
        (48, _Choice(8, 2, 8, max_blocks_per_sm=6)),
        (96, _Choice(8, 4, 8)),
        (280, _Choice(4, 8, 8, asking_per_sm=2)),  # smaller shares, which end together
        (400, _Choice(8, 4, 8, asking_per_sm=0)),
        (float("inf"), _Choice(8, 4, 8, asking_per_sm=4)),
    ],
    "float32, in place": [
        (16, _Choice(8, 2, 8)),  # one sequence: a block per SM
        (48, _Choice(4, 4, 8)),  # smaller blocks spread more evenly
        (180, _Choice(8, 2, 8)),
        (float("inf"), _Choice(8, 4, 8, asking_per_sm=0)),
    ],
    "bfloat16": [
        (96, _Choice(8, 2, 8)),
        (180, _Choice(16, 2, 16)),  # as many bytes in flight as in float32
        (float("inf"), _Choice(8, 4, 8, asking_per_sm=4)),
    ],
    "replay": [
        (96, _Choice(8, 2, 8, min_blocks_per_sm=12)),
        (350, _Choice(8, 4, 8, turns=2, min_blocks_per_sm=4)),  # weights serve two turns; four leave SMs idle
        (float("inf"), _Choice(8, 4, 8, turns=4, min_blocks_per_sm=4, asking_per_sm=0)),
    ],
    "replay by MMA": [
        (48, _Choice(8, 2, 8, min_blocks_per_sm=12)),
        (float("inf"), _Choice(16, 4, 32, min_blocks_per_sm=4, asking_per_sm=4)),
    ],
}


def _table_of(problem: Problem) -> list:
    if problem.limit:
        of_16_bits = problem.uses_pdl and problem.tokens == 1 and problem.state_dtype == problem.dtype
        by_mma = of_16_bits and not problem.per_channel and problem.K <= 128 and problem.V % (WARP // MMA_LANES) == 0
        return _TABLES["replay by MMA" if by_mma else "replay"]
    in_place = problem.in_place and problem.state_dtype == "float32"
    return _TABLES["float32, in place" if in_place else problem.state_dtype]


def regime_of(problem: Problem, batch: int) -> int:
    """Return the row of the table that a batch has; a larger batch has the same or a later one."""
    rows_per_sm = batch * problem.heads * problem.V / max(problem.num_sms, 1)
    return next(i for i, (limit, _) in enumerate(_table_of(problem)) if rows_per_sm <= limit)


def pick_config(problem: Problem, batch: int) -> Config:
    """Return how many rows of the state a warp and a block have."""
    _, choice = _table_of(problem)[regime_of(problem, batch)]
    rows, warps, turns = choice.rows, choice.warps, choice.turns
    lanes = MMA_LANES if choice.channels > 16 else min(max(8, problem.K // choice.channels), WARP)
    groups = WARP // lanes
    if problem.tokens > 2:
        rows = min(rows, 4)  # registers hold the tokens' q, k and v too
    few_registers = not problem.per_channel and problem.K <= 128
    if problem.tokens > 1 or problem.limit > min(lanes, MAX_WEIGHED) or not few_registers:
        turns = 1  # there are no weights, or more than a lane keeps; or two turns take 225 registers and more
    rows = max(rows, groups)
    while problem.V % (warps * rows * turns):
        if turns > 1:
            turns //= 2
        else:
            rows, warps = (rows // 2, warps) if rows > groups else (groups, warps // 2)
    config = Config(warps, rows, lanes, turns)
    if not problem.uses_pdl:
        return config
    if problem.tokens > 1 or (rows, warps) != (choice.rows, choice.warps):
        return config  # not as it was measured
    return replace(
        config,
        min_blocks_per_sm=choice.min_blocks_per_sm if few_registers else 0,
        max_blocks_per_sm=choice.max_blocks_per_sm,
        asking_blocks=None if choice.asking_per_sm is None else choice.asking_per_sm * problem.num_sms,
    )

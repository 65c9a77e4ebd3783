"""What the warps of decode over 8-bit caches on Hopper share: sizes, shared memory, and the registers of a lane."""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import DecodeProblem
from tilelang_ext.kernels.attention.sm90_decode_load import MAX_COLUMNS, Range
from tilelang_ext.kernels.sm90.pipeline import Pipeline
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, Roles

ROWS = 8  # columns of an MMA
KEYS = 16  # of an MMA of k q^T
PIECE = 16  # codes of one load of a lane, four words
WORDS = 4
CONSUMERS_MEET = 8  # number of a named barrier
NOTHING = -T.infinity("float32")


@dataclass(frozen=True)
class Config:
    """Keys of a block, stages of the pipeline, and consumer warps.

    The stages are a multiple of the warps, so that one warp has all blocks of a stage. Of another warp's block in its stage,
    which is loaded late, a warp would not know: two phases look alike.
    """

    block_N: int
    num_stages: int
    warps: int
    columns: int = MAX_COLUMNS  # value columns of a thread block, for the number of ranges
    block_M: int = ROWS
    ranges: int = 1
    parts: int = 1
    blocks_per_sm: int = 1
    min_blocks: int = 4  # of keys in a range

    def __post_init__(self):
        assert self.num_stages % self.warps == 0


def panel_width(problem: DecodeProblem) -> int:
    """Return the channels of a panel, which is one TMA load."""
    return 64 if problem.head_dim <= 64 else 128


@dataclass(frozen=True, eq=False)
class Traits:
    """The host's constants of one kernel."""

    problem: DecodeProblem
    config: Config

    @property
    def roles(self) -> Roles:
        return Roles(self.config.warps * WARP // WARPGROUP, 24, 240)

    @property
    def width(self) -> int:
        return panel_width(self.problem)

    @property
    def panels(self) -> int:
        return -(-self.problem.head_dim // self.width)

    @property
    def channels(self) -> int:
        """Channels with those past head_dim, which are zeros."""
        return self.panels * self.width

    @property
    def pieces(self) -> int:
        """Loads of a lane for a key of k."""
        return self.channels // (4 * PIECE)

    @property
    def words(self) -> int:
        """Words of a lane's channels of v in a panel."""
        return self.width // 32

    @property
    def tiles(self) -> int:
        """MMAs beside each other for all keys of a block."""
        return self.config.block_N // KEYS

    @property
    def box(self) -> int:
        """Keys of one TMA load: those of a block, or of a page."""
        return self.config.block_N if not self.problem.page_size else min(self.config.block_N, self.problem.page_size)


@dataclass(frozen=True, eq=False)
class Block:
    """What the roles of a block share."""

    k_s: Any  # (num_stages, panels, block_N, width) codes
    v_s: Any  # the same
    O_s: Any  # (warps, ROWS, channels) float32
    q: Any  # registers of a lane: row g of q
    peak_s: Any  # (warps, ROWS) float32: of exponents of 2
    total_s: Any  # the same
    scales: Any  # k_scale and v_scale
    pipeline: Pipeline
    page_table: Any
    keys: Range
    batch: Any
    kv_head: Any
    split: Any
    thread: Any


@dataclass(frozen=True, eq=False)
class Consumer:
    """The registers of a lane; of two, for columns 2 t and 2 t + 1 of the MMA."""

    Q: Any  # uint32 (channels / 8,): the right operand of k q^T
    S: Any  # float32 (tiles * 4,): keys g and g + 8 of a tile, in each columns 2 t and 2 t + 1
    P: Any  # uint32 (tiles * 2,): the right operand of v^T P^T
    O: Any  # float32 (channels / 4,)
    A: Any  # uint32 (4,): a left operand
    maximum: Any  # float32 (2,), of k . q
    shift: Any  # the maximum times the scale; 0 while no key was seen
    total: Any  # of this lane's keys
    factor: Any
    scale: Any  # of k . q, in the units of exponents of 2
    warp: Any
    g: Any
    t: Any
    lane: Any

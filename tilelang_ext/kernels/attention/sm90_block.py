"""What the roles of `sm90_forward` share: constants, shared memory and barriers; its siblings use the constants too."""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import FP8, Problem
from tilelang_ext.kernels.attention.sm90_config import Config
from tilelang_ext.kernels.attention.sm90_softmax import Softmax
from tilelang_ext.kernels.attention.tiles import PANEL, TileOrder
from tilelang_ext.kernels.sm90.pipeline import Pipeline
from tilelang_ext.kernels.sm90.roles import WARP, Roles

ARCH = "sm_90a"
# The kernel's own barriers order everything here; TMA clips what lies past the end, and stores are guarded.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}
SIMPLE_CONFIGS = {  # of what goes before and after
    "tl.disable_warp_specialized": True,
    "tl.disable_tma_lower": True,
    "tl.disable_safe_memory_legalize": True,
}
PTX_TYPES = {"bfloat16": "bf16", "float16": "fp16", FP8: "e4m3"}
_ROLES = {2: Roles(2, 24, 240), 3: Roles(3, 32, 160)}
SWIZZLE_128B, SWIZZLE_ATOM = 1, 1024 // 16  # of a descriptor: its mode, and the stride between eight rows of 128 bytes
ROW_BYTES = 128  # of a row of shared memory


def uniform(stage):
    """Return a value that all threads have: from a shuffle the compiler sees it, and keeps descriptors in uniform registers."""
    return T.call_pure_extern("int32", "__shfl_sync", T.uint32(0xFFFFFFFF), stage, 0)


@dataclass(frozen=True, eq=False)
class Traits:
    """The host's constants of one kernel."""

    problem: Problem
    config: Config

    @property
    def roles(self) -> Roles:
        return _ROLES[self.config.num_consumers]

    @property
    def divides(self) -> bool:
        """Whether the tiles that do not fill a wave are divided: all tiles have equally many key blocks."""
        return not (self.problem.is_causal or self.problem.has_lengths)

    @property
    def stores_by_tma(self) -> bool:
        """Whether O goes through shared memory to TMA stores, which clip rows at the end of out, not of a sequence."""
        return not self.problem.has_lengths and self.problem.pack == 1

    @property
    def keeps_q(self) -> bool:
        """Whether O goes through the stage of q, which is as large: it is then released late."""
        return self.stores_by_tma and not self.problem.is_fp8

    @property
    def part(self) -> tuple[int, int]:
        """Rows and channels of a part of a divided tile."""
        return self.config.block_M, self.channels

    @property
    def element_bytes(self) -> int:
        return 1 if self.problem.is_fp8 else 2

    @property
    def panel(self) -> int:
        """Channels of a panel of q and k: a swizzled row of 128 bytes."""
        return ROW_BYTES // self.element_bytes

    @property
    def panels(self) -> int:
        """Panels of q and k."""
        return -(-self.problem.head_dim // self.panel)

    @property
    def channels(self) -> int:
        """Channels of O: what lies past head_dim is zero."""
        return -(-self.problem.head_dim // PANEL) * PANEL

    @property
    def v_shape(self) -> tuple:
        """Panels, rows and columns of a block of values: of 16 bits as of keys, of codes channels by keys."""
        if self.problem.is_fp8:
            return self.config.block_N // ROW_BYTES, self.channels, ROW_BYTES
        return self.panels, self.config.block_N, PANEL

    @property
    def v_panel_bytes(self) -> int:
        return self.v_shape[1] * ROW_BYTES

    @property
    def v_stage_bytes(self) -> int:
        return self.v_shape[0] * self.v_panel_bytes

    @property
    def probabilities(self) -> int:
        """Registers of P of a thread."""
        return self.scores * self.element_bytes // 4

    @property
    def scores(self) -> int:
        """Registers of S of a thread."""
        return self.config.block_N // 2

    @property
    def outputs(self) -> int:
        """Registers of O of a thread."""
        return self.channels // 2

    @property
    def k_panel_bytes(self) -> int:
        return self.config.block_N * ROW_BYTES

    @property
    def k_stage_bytes(self) -> int:
        return self.panels * self.k_panel_bytes


@dataclass(frozen=True, eq=False)
class Block:
    """What the roles of a block share."""

    q_s: Any  # (q_stages, panels, block_M, 64), of codes 128
    k_s: Any  # (num_stages, panels, block_N, 64), of codes 128
    v_s: Any  # the same; of codes (num_stages, block_N / 128, channels, 128)
    out_s: Any  # (stages, panels, block_M, 64) of results: q_s, or of one stage beside codes
    q_pipeline: Pipeline
    k_pipeline: Pipeline
    v_pipeline: Pipeline
    order: TileOrder
    thread: Any


@dataclass(frozen=True, eq=False)
class Consumer:
    """The registers of a thread of a consumer, laid out as `sm90_softmax` describes."""

    number: int
    S: Any
    P: Any  # of 16 bits, in the order of S; of codes four in a word
    O: Any
    softmax: Softmax
    q_descriptor: Any
    k_descriptor: Any
    v_descriptor: Any
    scale: Any  # of codes: float32 (1,), that of q . k of the tile
    stored: Any  # int32 (1,): the stage whose store may still read it, or -1
    thread: Any  # of the warpgroup

    @property
    def lane(self):
        return self.thread % WARP

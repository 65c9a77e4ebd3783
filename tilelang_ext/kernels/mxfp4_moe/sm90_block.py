"""What the roles of the WGMMA kernels share: traits, tensors, shared memory and registers."""

import itertools
from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.formats import MX_GROUP
from tilelang_ext.kernels.mxfp4_moe.sm90_config import Config
from tilelang_ext.kernels.mxfp4_moe.sm90_tiles import BFLOAT16, TileFormat
from tilelang_ext.kernels.sm90.pipeline import Pipeline, PipelineState
from tilelang_ext.kernels.sm90.roles import WARP
from tilelang_ext.kernels.sm90.scheduler import PersistentScheduler


@dataclass(frozen=True, eq=False)
class Traits:
    """What the host knows of one kernel."""

    config: Config
    num_blocks: int
    tile_format: TileFormat

    @property
    def is_scaled(self) -> bool:
        """Whether accumulators are multiplied by scales of rows and tokens."""
        return self.tile_format != BFLOAT16

    @property
    def tile_accumulators(self) -> int:
        """Accumulator registers of a thread for one tile of weights."""
        return self.config.block_M // 2

    @property
    def lane_scale_words(self) -> int:
        """Words of scales that one lane decodes with, for rows g and g + 8 of a tile."""
        return self.tile_format.K // MX_GROUP // 2


@dataclass(frozen=True, eq=False)
class Operands:
    """Tensors of a GEMM in global memory, and how many tiles and steps there are."""

    activations: Any  # (blocks * block_M, K), in sorted order
    tiles: Any  # uint32 (experts, row_tiles, steps, words)
    token_ids: Any  # (blocks * block_M,)
    expert_ids: Any  # (blocks,)
    num_valid: Any  # (1,)
    row_tiles: Any  # tiles of weights of one expert
    steps: Any  # of K
    tile_columns: Any  # tiles of the result for the same tokens


@dataclass(frozen=True, eq=False)
class EpilogueTensors:
    """Tensors in global memory that an epilogue reads or writes, and the extents of the result."""

    bias: Any  # (experts, row_tiles * 64) float32
    row_scale: Any  # likewise, for E4M3
    token_scale: Any  # (blocks * block_M,) float32, for E4M3
    out: Any  # hidden or y
    columns: Any  # of hidden or y
    tokens: Any = None  # of y
    token_ids: Any = None  # (blocks * block_M,) int32, for y
    token_weights: Any = None  # (blocks * block_M,) float32, for y


@dataclass(frozen=True, eq=False)
class EpilogueArgs:
    """What an epilogue works on beside the accumulators: tensors, two buffers of vectors in shared memory, and registers."""

    tensors: EpilogueTensors
    out_s: Any  # (consumers, subtile_M, columns and padding) bfloat16, a subtile of each consumer
    bias_s: Any  # (2, rows)
    row_scale_s: Any  # (2, rows)
    token_scale_s: Any  # (2, block_M)
    token_ids_s: Any  # (2, block_M), for y
    token_weights_s: Any  # (2, block_M), for y
    row_bias_r: Any  # (2,), of rows g and g + 8
    row_scale_r: Any  # (2,), of rows g and g + 8
    token_scale_r: Any  # of the tokens whose results are ready together
    token_weights_r: Any
    values_r: Any  # their results


@dataclass(frozen=True, eq=False)
class Block:
    """What the roles of a block share."""

    X_s: Any  # (num_stages, block_M, K)
    W_s: Any  # (num_stages, block_tiles, words)
    pipeline: Pipeline
    aux: Pipeline  # of the epilogue's two buffers; the first stage of a tile completes one, so it has no full barriers
    scheduler: PersistentScheduler
    tile_columns: Any  # tiles of the result for the same tokens
    thread: Any

    def tile_row(self, wave):
        """Return which block of tokens the tile of a wave has."""
        return T.truncdiv(self.scheduler.tile(wave), self.tile_columns)

    def tile_column(self, wave, tile_row):
        """Return which rows of weights the tile of a wave has, counted in tiles of the result."""
        return self.scheduler.tile(wave) - tile_row * self.tile_columns


@dataclass(frozen=True, eq=False)
class Consumer:
    """The registers of a thread of a consumer, and which thread it is; with g = lane / 4 and t = lane % 4.

    The accumulators of tile m of weights begin at m * tile_accumulators. For each group n of eight tokens they are row g of
    tokens 8 n + 2 t and 8 n + 2 t + 1, then row g + 8 of the same tokens.
    """

    A_r: Any  # decoded weights, two buffers of a group of tiles: one is multiplied while the other is written
    accumulators: Any
    codes: Any  # of one tile, before they are decoded; allocated outside all loops, or the compiler's passes take long
    scales: Any
    descriptor: Any  # of the activations in shared memory
    state: PipelineState
    warpgroup: Any  # 0 or 1
    thread: Any  # of the warpgroup

    @property
    def warp(self):
        """The warp of the warpgroup."""
        return self.thread // WARP

    @property
    def lane(self):
        return self.thread % WARP


@dataclass(frozen=True, eq=False)
class Tile:
    """A consumer's part of a tile of the result."""

    token: Any  # the first, in sorted order
    row_tile: Any  # the first tile of weights
    buffer: Any  # of the vectors that the epilogue reads
    used: Any  # its number of tokens: block_M, or a narrower width


def used_tokens(traits: Traits, operands: Operands, by):
    """Return how many tokens of a tile are computed: the least width that holds those which the block of tokens has."""
    config, token_ids = traits.config, operands.token_ids
    first, widths = by * config.block_M, config.widths
    # Padding is last and has one id, and other ids differ. All ids are loaded together.
    padding = token_ids[first + config.block_M - 1]
    used = sum(
        (
            T.cast(token_ids[first + narrow] != padding, "int32") * (wide - narrow)
            for narrow, wide in itertools.pairwise(widths)
        ),
        T.int32(widths[0]),
    )

    @T.macro
    def emit():
        return T.alloc_var("int32", used)

    return emit() if config.narrower else config.block_M

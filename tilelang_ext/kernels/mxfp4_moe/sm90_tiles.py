"""Sizes of the tiles of MXFP4 weights on Hopper (`sm90_decode` describes their bits)."""

from typing import NamedTuple

TILE = 64  # rows of a tile


class TileFormat(NamedTuple):
    """What the GEMMs take activations in, and how large the tiles of weights for it are."""

    dtype: str  # of activations
    ptx: str  # its name in PTX
    K: int  # of a tile
    lane_words: int  # words of codes that one lane decodes

    @property
    def tile_words(self) -> int:
        """Words of a tile: the codes of 128 lanes, and a sixteenth of that for the scales."""
        return self.lane_words * 136


BFLOAT16 = TileFormat("bfloat16", "bf16", 64, 4)
E4M3 = TileFormat("float8_e4m3fn", "e4m3", 128, 8)
TILE_FORMATS = {"bfloat16": BFLOAT16, "fp8": E4M3}  # by the format of activations

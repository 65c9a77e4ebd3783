"""Packing MXFP4 weights into the tiles that `sm90_decode` describes, in torch, once when weights are loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tilelang_ext.formats import MX_GROUP
from tilelang_ext.kernels.mxfp4_moe.sm90_tiles import BFLOAT16, E4M3, TILE, TileFormat

_MAX_SCALE = 128  # with bfloat16: E8M0 + 126 is at most 254, the largest finite exponent
_SCALE_BIAS = 126


class ScaleError(ValueError):
    """Scales that tiles cannot hold exactly."""


def pack_for_bfloat16(codes: Tensor, scale: Tensor) -> Tensor:
    """Return tiles for bfloat16 activations, uint32 (E, rows / 64, K / 64, 544).

    `codes` (E, rows, K / 2) has the even k in the low nibble, `scale` (E, rows, K / 32) is E8M0. Rows and K that do not fill a
    tile are padded with zeros. Raises ScaleError for scales above 2^1 and NaN.
    """
    if (scale > _MAX_SCALE).any():
        raise ScaleError(
            f"tile_for_hopper: E8M0 scales for bfloat16 must be at most 128, 2^1; got {int(scale.max())}; "
            "use the weights as they are"
        )
    device = codes.device
    lane = torch.arange(32, device=device)
    g, t = lane // 4, lane % 4
    row_of = torch.stack([g, g + 8, g, g + 8], -1)[..., None].expand(32, 4, 2)  # lane, pair, half
    k_of = torch.stack([2 * t, 2 * t, 2 * t + 8, 2 * t + 8], -1)[..., None] + torch.arange(2, device=device)

    def words(nibbles: Tensor) -> Tensor:
        pairs = nibbles.unflatten(-1, (4, 16)).transpose(-3, -2)[..., row_of, k_of]  # ..., 16 of K, lane, pair, half
        sign, magnitude = pairs >> 3, pairs & 7
        fields = torch.zeros_like(pairs[..., 0, :])
        for pair, shift in enumerate((0, 3, 6)):
            fields |= (sign[..., pair, :] << (15 - shift)) | (magnitude[..., pair, :] << (6 - shift))
        last = magnitude[..., 3, :]
        fields |= (sign[..., 3, :] << 14) | ((last >> 1) << 10) | ((last & 1) << 13)
        return fields[..., 0] | (fields[..., 1] << 16)  # ..., words of a lane, lane

    def scale_bytes(expert: int) -> Tensor:
        return scale[expert].int() + _SCALE_BIAS

    return _tiles(codes, words, scale_bytes, _SCALE_BIAS, BFLOAT16)


def pack_for_fp8(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return tiles for E4M3 activations, uint32 (E, rows / 64, K / 128, 1088), and one power of two per row, float32 (E, rows).

    The arguments are those of `pack_for_bfloat16`. Raises ScaleError for a row whose scales lie more than 2^11 apart, and for
    NaN.
    """
    device = codes.device
    lane = torch.arange(32, device=device)
    g, t = lane // 4, lane % 4
    row_of = torch.stack([g, g + 8], -1)[..., None].expand(32, 2, 8)  # lane, word, code
    code = torch.arange(8, device=device)
    k_of = (4 * t[:, None] + code + code // 4 * 12)[:, None].expand(32, 2, 8)
    sign_bit = torch.where(code < 4, 8 * code + 7, 8 * (code - 4) + 3)

    def words(nibbles: Tensor) -> Tensor:
        each = nibbles.unflatten(-1, (4, 32)).transpose(-3, -2)[..., row_of, k_of]  # ..., 32 of K, lane, word, code
        bits = ((each & 7) << (4 * code)) | ((each >> 3) << sign_bit)
        return bits.sum(-1).transpose(-2, -1).flatten(-3, -2)  # ..., words of a lane, lane

    shifts, powers = [], []
    for expert in range(codes.shape[0]):
        shift, power = _shifts(codes[expert], scale[expert])
        shifts.append(shift)
        powers.append(power)
    return _tiles(codes, words, shifts.__getitem__, 0, E4M3), torch.stack(powers)


# For each of the eight magnitudes, the least and the largest power of two by which E4M3 holds it as a normal number. Zero fits
# with any.
_LEAST = torch.tensor([-999, -5, -6, -6, -6, -6, -6, -6])
_MOST = torch.tensor([999, 9, 8, 8, 7, 7, 6, 6])
_SHIFT_BIAS = 6  # a shift of 0 stands for 2^-6


def fits(a_format: str, codes: Tensor, scale: Tensor) -> Tensor:
    """Return for which experts tiles for a_format hold the scales exactly, bool (E,)."""
    if a_format != "fp8":
        return (scale <= _MAX_SCALE).flatten(1).all(1)
    return torch.stack([~_range_of_rows(*one)[-1].any() for one in zip(codes, scale, strict=True)])


def _range_of_rows(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return magnitudes by group, exponents of the scales, the least power of two for each row, and which rows have none."""
    least, most = (table.to(codes.device, torch.int16) for table in (_LEAST, _MOST))
    groups = codes.unflatten(-1, (-1, MX_GROUP // 2))
    pairs = torch.stack([groups & 7, groups >> 4 & 7], -1).flatten(-2).int()
    exponent = scale.int() - 127
    # The row's own exponent must lie between what its groups allow, and be that of a normal float32.
    low = (exponent - most[pairs].amin(-1)).amax(-1)
    high = (exponent - least[pairs].amax(-1)).amin(-1)
    low = low.clamp(min=-126)
    return pairs, exponent, low, (low > high) | (scale == 255).any(-1)


def _shifts(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shift of each group, (rows, K / 32), and the power of two that remains for each row, (rows,)."""
    pairs, exponent, low, has_none = _range_of_rows(codes, scale)
    bad = has_none.nonzero()
    if len(bad):
        got = scale[bad[0, 0]]
        raise ScaleError(
            "tile_for_hopper: E8M0 scales of a row must lie within 2^11 of each other to be exact in E4M3; got "
            f"{int(got.min())} to {int(got.max())} in one; use the weights as they are"
        )
    shift = exponent - low[:, None] + _SHIFT_BIAS
    return torch.where(pairs.any(-1), shift, 0), torch.ldexp(torch.ones_like(low, dtype=torch.float32), low)


def _tiles(codes: Tensor, words: Callable, scale_bytes: Callable, empty: int, tile_format: TileFormat) -> Tensor:
    """Return the tiles of all experts.

    `words(blocks)` orders the codes of blocks of 16 rows as the words of lanes. `scale_bytes(expert)` returns the bytes of an
    expert's scales, (rows, K / 32), and `empty` is the byte where there is no row or group.
    """
    E, rows, half = codes.shape
    K = tile_format.K
    row_tiles, steps, groups = -(-rows // TILE), -(-half * 2 // K), K // MX_GROUP
    tiles = torch.empty(E, row_tiles, steps, tile_format.tile_words, dtype=torch.int32, device=codes.device)
    for expert in range(E):  # one at a time, since this takes eight bytes per code
        nibbles = torch.zeros(row_tiles * TILE, steps * K, dtype=torch.int64, device=codes.device)
        nibbles[:rows, : half * 2] = torch.stack([codes[expert] & 15, codes[expert] >> 4], -1).flatten(1)
        blocks = nibbles.view(row_tiles, 4, 16, steps, K).permute(0, 3, 1, 2, 4)  # row tile, step, warp, row, k
        found = scale_bytes(expert)
        scales = torch.full((row_tiles * TILE, steps * groups), empty, dtype=torch.int64, device=codes.device)
        scales[:rows, : found.shape[1]] = found
        # row tile, step, warp, g, row g or g + 8, group: one word in all for bfloat16, one for each of g and g + 8 for E4M3
        scales = scales.view(row_tiles, 4, 2, 8, steps, groups).permute(0, 4, 1, 3, 2, 5)
        scales = scales.reshape(row_tiles, steps, -1, 4) << torch.arange(0, 32, 8, device=codes.device)
        # Four words of every lane, then the next four: a warp loads these without bank conflicts.
        by_four = words(blocks).unflatten(-2, (-1, 4)).transpose(-2, -1)
        parts = [by_four.reshape(row_tiles, steps, -1), scales.sum(-1)]
        tiles[expert] = torch.cat(parts, -1).to(torch.int32)
    return tiles.view(torch.uint32)


def interleave_gate_and_up(rows: Tensor) -> Tensor:
    """Return (E, 2 I, ...), gate above up, as eight gate rows, the eight up rows of the same features, and so on.

    A lane, which has rows g and g + 8 of sixteen, then has gate and up of one feature.
    """
    E, both = rows.shape[:2]
    return rows.view(E, 2, both // 16, 8, *rows.shape[2:]).transpose(1, 2).reshape(rows.shape)


def even_rows_first(rows: Tensor) -> Tensor:
    """Return (E, N, ...) with the eight even rows of each sixteen before the eight odd ones.

    A lane, which has rows g and g + 8 of sixteen, then has two neighbouring columns of the result and stores them at once.
    """
    E, count = rows.shape[:2]
    return rows.view(E, count // 16, 8, 2, *rows.shape[2:]).transpose(2, 3).reshape(rows.shape)

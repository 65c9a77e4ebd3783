"""Expert weights in MXFP4 as the kernels read them, from the layouts of checkpoints.

    w13: gate rows above up rows, (E, 2I, H)        w2: (E, H, I)

`prepare_mxfp4_weights` returns `MXFP4Weights`, the one layout for every target. Hopper's kernels read tiles instead:
`tile_for_hopper` returns `HopperWeights`, made once when weights are loaded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tilelang_ext import checkpoints
from tilelang_ext.formats import CODES_PER_BYTE, MX_GROUP
from tilelang_ext.kernels.mxfp4_moe import sm90_packing
from tilelang_ext.kernels.mxfp4_moe.problem import GENERAL_LAYOUT, HOPPER_LAYOUTS
from tilelang_ext.kernels.mxfp4_moe.sm90_tiles import TILE


class MXFP4Weights(NamedTuple):
    """Weights of E experts row by row, returned by `prepare_mxfp4_weights`.

    The kernels never compute with what lies past `rows` and `k`.
    """

    codes: Tensor  # uint8 (E, stored rows, stored K / 2), low nibble = even k
    scale: Tensor  # uint8 E8M0 (E, stored rows, stored K / 32)
    bias: Tensor  # float32 (E, stored rows)
    rows: int  # of w13 2I: I gate rows from row 0 on, I up rows from the middle row on; of w2 H
    k: int  # of w13 H, of w2 I: a multiple of 32
    gated: bool  # whether these are gate and up (w13)

    @property
    def layout(self) -> str:
        return GENERAL_LAYOUT

    @property
    def num_experts(self) -> int:
        return self.codes.shape[0]


class HopperWeights(NamedTuple):
    """Weights of E experts in the tiles that the kernels for NVIDIA Hopper read, returned by `tile_for_hopper`.

    A tile is 64 rows by the K that 128 bytes of `a_format` hold: 64 of bfloat16, 128 of fp8. It has the codes in the order in
    which the lanes of a warp decode them, then the scales; `sm90_decode` describes each word. Rows are permuted: of w13 eight
    gate rows, then the eight up rows of the same features, and so on; of w2 the eight even rows of sixteen, then the odd ones.
    Rows and K that do not fill a tile are zeros.
    """

    tiles: Tensor  # uint32 (E, row tiles, steps of K, 544 words for bfloat16, 1088 for fp8)
    row_scale: Tensor  # float32 (E, row tiles * 64), the power of two that multiplies a row; for bfloat16 empty, (0, 0)
    bias: Tensor  # float32 (E, row tiles * 64), in the order of the tiles' rows
    rows: int  # of w13 2I, of w2 H, without those that fill a tile
    k: int  # of w13 H, of w2 I
    a_format: str  # the activations that these tiles are for: "bfloat16" or "fp8"
    gated: bool  # whether these are gate and up (w13)

    @property
    def layout(self) -> str:
        return HOPPER_LAYOUTS[self.a_format]

    @property
    def num_experts(self) -> int:
        return self.tiles.shape[0]


def to_arguments(weights: MXFP4Weights | HopperWeights) -> tuple[Tensor, Tensor, Tensor, int, int, str]:
    """Return weights as the torch operator takes them: three tensors, rows, k and the name of the layout."""
    return (*weights[:5], weights.layout)


def from_arguments(
    codes: Tensor, scale: Tensor, bias: Tensor, rows: int, k: int, layout: str, *, gated: bool
) -> MXFP4Weights | HopperWeights:
    """Return the weights whose `to_arguments` these are. Raises ValueError for a layout that does not exist."""
    if layout == GENERAL_LAYOUT:
        return MXFP4Weights(codes, scale, bias, rows, k, gated)
    for a_format, name in HOPPER_LAYOUTS.items():
        if layout == name:
            return HopperWeights(codes, scale, bias, rows, k, a_format, gated)
    layouts = ", ".join([GENERAL_LAYOUT, *HOPPER_LAYOUTS.values()])
    raise ValueError(f"mxfp4_moe: layout of weights must be one of {layouts}; got {layout!r}; call mxfp4_moe, which passes it")


_SOURCES = ("gpt_oss", "mlx", "plain")


def prepare_mxfp4_weights(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    source: str = "plain",
    gate: str | None = None,
    rows: int | None = None,
    k: int | None = None,
) -> MXFP4Weights:
    """Return expert weights as `mxfp4_moe` takes them.

    | source | weight | scale |
    | --- | --- | --- |
    | gpt_oss | uint8 (E, N, K / 32, 16): `*_blocks` of HF checkpoints | uint8 (E, N, K / 32) |
    | mlx | uint32 (E, N, K / 8), mode mxfp4 | uint8 (E, N, K / 32) |
    | plain | uint8 or float4_e2m1fn_x2 (E, N, K / 2), low nibble = even k | uint8 or float8_e8m0fnu (E, N, K / 32) |

    `bias` (E, N) has any float dtype; None means zeros. `gate` is, for w13, "interleaved" (gpt-oss: gate rows ::2, up rows
    1::2) or "separated" (gate rows in the first half), and None for w2; `mxfp4_moe` refuses
    one in the place of the other. `rows` and `k` are the sizes without padding where N and K are padded; for w13 `rows` counts
    both halves. Padding may hold anything, NaN too. Only what must be reordered is copied; all else is views of the arguments.

    Raises TypeError for dtypes, ValueError for shapes.
    """
    if source not in _SOURCES:
        raise ValueError(
            f"prepare_mxfp4_weights: source must be one of {', '.join(_SOURCES)}; got {source!r}; convert it to plain"
        )
    if source == "gpt_oss":
        codes, scale = checkpoints.from_gpt_oss(weight, scale)
    elif source == "mlx":
        codes, scale = checkpoints.from_mlx(weight, scale, "mxfp4")
    else:
        codes, scale = checkpoints.from_deepseek_mxfp4(weight, scale)
    if codes.ndim != 3:
        raise ValueError(
            f"prepare_mxfp4_weights: weight must have shape (experts, N, K); got {tuple(weight.shape)}; stack the experts"
        )
    stored_rows, stored_k = codes.shape[1], codes.shape[2] * CODES_PER_BYTE
    if bias is None:
        bias = torch.zeros(codes.shape[:2], device=codes.device)
    elif bias.shape != codes.shape[:2]:
        raise ValueError(
            f"prepare_mxfp4_weights: bias must have shape {tuple(codes.shape[:2])}; got {tuple(bias.shape)}; pass its own"
        )
    elif not bias.dtype.is_floating_point:
        raise TypeError(f"prepare_mxfp4_weights: bias must be a float tensor; got {bias.dtype}; convert it")
    if gate not in (None, "interleaved", "separated"):
        raise ValueError(
            f"prepare_mxfp4_weights: gate must be 'interleaved', 'separated' or None; got {gate!r}; gpt-oss is interleaved"
        )
    if gate is not None and stored_rows % 2:
        raise ValueError(f"prepare_mxfp4_weights: N of gate and up must be even; got {stored_rows}; pass both")
    if gate == "interleaved":
        codes, scale = (torch.cat(checkpoints.split_gate_up(each), 1) for each in (codes, scale))
        bias = torch.cat(checkpoints.split_gate_up(bias, -1), 1)
    rows, k = stored_rows if rows is None else rows, stored_k if k is None else k
    if not 0 < rows <= stored_rows or (gate is not None and rows % 2):
        raise ValueError(
            f"prepare_mxfp4_weights: rows must be in [1, {stored_rows}], even with a gate; got {rows}; leave it out"
        )
    if not 0 < k <= stored_k or k % MX_GROUP:
        raise ValueError(
            f"prepare_mxfp4_weights: k must be a multiple of {MX_GROUP} up to {stored_k}; got {k}; leave it out if K is exact"
        )
    return MXFP4Weights(codes.contiguous(), scale.contiguous(), bias.float().contiguous(), rows, k, gate is not None)


def _without_padding(weights: MXFP4Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scale and bias of the rows and the K that count."""
    codes, scale, bias, rows, k, gated = weights
    parts = [slice(0, rows)]
    if gated:
        half = codes.shape[1] // 2
        parts = [slice(0, rows // 2), slice(half, half + rows // 2)]
    codes, scale, bias = (torch.cat([tensor[:, part] for part in parts], 1) for tensor in (codes, scale, bias))
    return codes[..., : k // CODES_PER_BYTE], scale[..., : k // MX_GROUP], bias


def fits_hopper(weights: MXFP4Weights, a_dtype: str) -> Tensor:
    """Return which experts' scales `tile_for_hopper` holds exactly, bool (E,)."""
    codes, scale, _ = _without_padding(weights)
    return sm90_packing.fits(a_dtype, codes, scale)


def of_experts(weights: MXFP4Weights, experts: Tensor) -> MXFP4Weights:
    """Return a copy of the weights of some experts, given as bool (E,)."""
    return MXFP4Weights(*(tensor[experts] for tensor in weights[:3]), *weights[3:])


def tile_for_hopper(weights: MXFP4Weights, *, a_dtype: str = "bfloat16") -> HopperWeights:
    """Return a copy of `weights` in the tiles that the kernels for NVIDIA Hopper read; make it once, when weights are loaded.

    `a_dtype` is what the tiles are to be multiplied with: "bfloat16" or "fp8" activations. Padding is left behind.

    Raises ScaleError where tiles cannot hold the scales exactly: for bfloat16 scales above 2^1, for fp8 scales of one row that
    are more than 2^11 apart, and NaN for both. Raises ValueError for numbers of rows that are no multiple of 32.
    """
    codes, scale, bias, rows, k, gated = weights
    if a_dtype not in HOPPER_LAYOUTS:
        raise ValueError(f"tile_for_hopper: a_dtype must be 'bfloat16' or 'fp8'; got {a_dtype!r}; use the weights as they are")
    if rows % (2 * MX_GROUP if gated else MX_GROUP):
        raise ValueError(
            f"tile_for_hopper: rows of gate, of up and of w2 must be multiples of {MX_GROUP}; got {rows} in all; pad them"
        )
    codes, scale, bias = _without_padding(weights)
    order = sm90_packing.interleave_gate_and_up if gated else sm90_packing.even_rows_first
    codes, scale, bias = (order(tensor) for tensor in (codes, scale, bias))
    if a_dtype == "fp8":
        tiles, row_scale = sm90_packing.pack_for_fp8(codes, scale)
    else:
        tiles, row_scale = sm90_packing.pack_for_bfloat16(codes, scale), bias.new_empty(0, 0)
    missing = tiles.shape[1] * TILE - rows
    row_scale, bias = (F.pad(each, (0, missing)) if each.numel() else each for each in (row_scale, bias))
    return HopperWeights(tiles, row_scale, bias.contiguous(), rows, k, a_dtype, gated)

"""Expert weights in MXFP4 as the kernels read them, from the layouts of checkpoints.

    w13: gate rows above up rows, (E, 2I, H)        w2: (E, H, I)

One layout for every target: codes and scales row by row, as `quantize` describes them, gate and up apart. Hopper's kernels want
tiles instead, which `tile_for_hopper` makes of them, once, when weights are loaded; the rank of the codes tells them apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tilelang_ext import quantization
from tilelang_ext.formats import CODES_PER_BYTE, MX_GROUP
from tilelang_ext.kernels.mxfp4_moe import sm90_packing


class MXFP4Weights(NamedTuple):
    """Weights of E experts, made by `prepare_mxfp4_weights`. What lies past `rows` and `k` is never computed with."""

    codes: Tensor  # uint8 (E, stored rows, stored K / 2), low nibble = even k
    scale: Tensor  # uint8 E8M0 (E, stored rows, stored K / 32)
    bias: Tensor  # float32 (E, stored rows)
    rows: int  # of w13 2I: I gate rows from row 0 on, I up rows from the middle on; of w2 H
    k: int  # of w13 H, of w2 I: a multiple of 32


def is_tiled(weights: MXFP4Weights) -> bool:
    """Whether weights are of `tile_for_hopper`."""
    return weights.codes.ndim == 4


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

    `bias` (E, N) of any float dtype; none is zeros. `gate` of w13: "interleaved" (gpt-oss: gate rows ::2, up rows 1::2) or
    "separated" (gate rows in the first half); of w2 None. `rows` and `k` are the sizes that count where N and K are padded, of
    w13 both halves together; padding may hold anything, NaN too. Copies what must be reordered; else these are views.

    Raises TypeError for dtypes, ValueError for shapes.
    """
    if source not in _SOURCES:
        raise ValueError(
            f"prepare_mxfp4_weights: source must be one of {', '.join(_SOURCES)}; got {source!r}; convert it to plain"
        )
    if source == "gpt_oss":
        codes, scale = quantization.from_gpt_oss(weight, scale)
    elif source == "mlx":
        codes, scale = quantization.from_mlx(weight, scale, "mxfp4")
    else:
        codes, scale = quantization.from_deepseek_mxfp4(weight, scale)
    if codes.ndim != 3:
        raise ValueError(
            f"prepare_mxfp4_weights: weight must be of (experts, N, K); got shape {tuple(weight.shape)}; stack the experts"
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
        codes, scale = (torch.cat(quantization.split_gate_up(each), 1) for each in (codes, scale))
        bias = torch.cat(quantization.split_gate_up(bias, -1), 1)
    rows, k = stored_rows if rows is None else rows, stored_k if k is None else k
    if not 0 < rows <= stored_rows or (gate is not None and rows % 2):
        raise ValueError(
            f"prepare_mxfp4_weights: rows must be in [1, {stored_rows}], even with a gate; got {rows}; leave it out"
        )
    if not 0 < k <= stored_k or k % MX_GROUP:
        raise ValueError(
            f"prepare_mxfp4_weights: k must be a multiple of {MX_GROUP} up to {stored_k}; got {k}; leave it out if K is exact"
        )
    return MXFP4Weights(codes.contiguous(), scale.contiguous(), bias.float().contiguous(), rows, k)


def tile_for_hopper(weights: MXFP4Weights, *, gate: bool, a_dtype: str = "bfloat16") -> MXFP4Weights:
    """Return `weights` as the kernels for NVIDIA Hopper read them, with activations of `a_dtype`: one copy, made once.

    `gate` says whether these are w13, gate above up; `a_dtype` is "bfloat16" or "fp8". The result's codes are uint32
    (E, row tiles, steps, words) with the scales in them, its scale (of fp8, else empty) the powers of two of rows, float32,
    its bias has rows in the order of the tiles. Padding is left behind.

    Raises ScaleError where scales cannot be held: for bfloat16 above 2^1, for fp8 more than 2^11 apart in a row, NaN; and
    ValueError for sizes that are no multiple of 32.
    """
    codes, scale, bias, rows, k = weights
    if a_dtype not in sm90_packing.OPERANDS:
        raise ValueError(f"tile_for_hopper: a_dtype must be 'bfloat16' or 'fp8'; got {a_dtype!r}; use the weights as they are")
    if rows % (2 * MX_GROUP if gate else MX_GROUP):
        raise ValueError(f"tile_for_hopper: rows must be a multiple of {MX_GROUP}, of gate and of up; got {rows}; pad them")
    parts = [slice(0, rows)]
    if gate:
        half = codes.shape[1] // 2
        parts = [slice(0, rows // 2), slice(half, half + rows // 2)]
    codes, scale, bias = (torch.cat([tensor[:, part] for part in parts], 1) for tensor in (codes, scale, bias))
    codes, scale = codes[..., : k // CODES_PER_BYTE], scale[..., : k // MX_GROUP]
    order = sm90_packing.gate_beside_up if gate else sm90_packing.neighbours
    codes, scale, bias = (order(tensor) for tensor in (codes, scale, bias))
    if a_dtype == "fp8":
        tiles, power = sm90_packing.pack_e4m3(codes, scale)
    else:
        tiles, power = sm90_packing.pack(codes, scale), bias.new_empty(0, 0)
    missing = tiles.shape[1] * sm90_packing.TILE - rows
    power, bias = (F.pad(each, (0, missing)) if each.numel() else each for each in (power, bias))
    return MXFP4Weights(tiles, power, bias.contiguous(), rows, k)

"""Layouts of weights in checkpoints to and from the layout that the kernels read: gpt-oss, MLX and DeepSeek.

Every conversion is lossless; most return views of the same bytes. What the kernels read is documented in `quantization`.
"""

from __future__ import annotations

import torch

from tilelang_ext import formats
from tilelang_ext.formats import E2M1, E4M3, BlockScaledLayout, FloatFormat
from tilelang_ext.quantization import raw_codes

Tensor = torch.Tensor


def from_gpt_oss(blocks: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes, scale) of gpt-oss's `*_blocks` uint8 (..., N, K/32, 16) and `*_scales` uint8 (..., N, K/32)."""
    if blocks.shape[-1] != formats.MX_GROUP // formats.CODES_PER_BYTE:
        raise ValueError(f"blocks: the last dimension must be 16 bytes; got {blocks.shape[-1]}; pass *_blocks as loaded")
    return _checked(blocks.flatten(-2), scales, *formats.MLX_MODES["mxfp4"])


def to_gpt_oss(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return (blocks, scales): the inverse of `from_gpt_oss`."""
    codes, scale = _checked(codes, scale, *formats.MLX_MODES["mxfp4"])
    return codes.unflatten(-1, (-1, formats.MX_GROUP // formats.CODES_PER_BYTE)), scale


def split_gate_up(gate_up: Tensor, dim: int = -2) -> tuple[Tensor, Tensor]:
    """Return (gate, up) of gpt-oss's interleaved rows: rows ::2 and rows 1::2 of codes or scales, or (dim=-1) of biases."""
    if gate_up.shape[dim] % 2:
        raise ValueError(f"gate_up: dimension {dim} must be even; got {gate_up.shape[dim]}; pass gate and up together")
    dim %= gate_up.ndim
    gate, up = gate_up.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return gate.contiguous(), up.contiguous()


def interleave_gate_up(gate: Tensor, up: Tensor, dim: int = -2) -> Tensor:
    """Return gate and up as interleaved rows: the inverse of `split_gate_up`."""
    if gate.shape != up.shape:
        raise ValueError(f"gate, up: must have equal shapes; got {tuple(gate.shape)}, {tuple(up.shape)}; check the pair")
    dim %= gate.ndim
    return torch.stack([gate, up], dim=dim + 1).flatten(dim, dim + 1)


def from_mlx(words: Tensor, scales: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Return (codes, scale) of MLX's words uint32 (..., N, K * bits / 32), lowest bits first, and its scales uint8.

    `mode` is mxfp4 (K/8 words, E8M0 per 32), mxfp8 (K/4 words of E4M3, E8M0 per 32), nvfp4 (K/8 words, E4M3 per 16).
    """
    format, layout = _mlx_mode(mode)
    if words.dtype != torch.uint32:
        raise TypeError(f"words: must be uint32; got {words.dtype}; pass MLX's weights as they are")
    return _checked(words.contiguous().view(torch.uint8), scales, format, layout)


def to_mlx(codes: Tensor, scale: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Return (words, scales): the inverse of `from_mlx`."""
    codes, scale = _checked(codes, scale, *_mlx_mode(mode))
    return codes.contiguous().view(torch.uint8).view(torch.uint32), scale


def _mlx_mode(mode: str) -> tuple[FloatFormat, BlockScaledLayout]:
    if mode not in formats.MLX_MODES:
        raise ValueError(f"mode: must be one of {', '.join(formats.MLX_MODES)}; got {mode!r}; dequantise other modes")
    return formats.MLX_MODES[mode]


def from_deepseek_mxfp4(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes, scale), as views, of DeepSeek's MXFP4: weight (..., N, K/2), one byte each, scale E8M0 (..., N, K/32)."""
    if weight.dtype == torch.int8:
        weight = weight.view(torch.uint8)
    return _checked(weight, scale, *formats.MLX_MODES["mxfp4"])


def to_deepseek_mxfp4(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return (weight uint8, scale torch.float8_e8m0fnu): the inverse of `from_deepseek_mxfp4`."""
    codes, scale = _checked(codes, scale, *formats.MLX_MODES["mxfp4"])
    return codes, scale.view(torch.float8_e8m0fnu)


def from_deepseek_fp8(weight: Tensor, weight_scale_inv: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes, scale) of DeepSeek's FP8: weight E4M3 (N, K), `weight_scale_inv` float32 (ceil(N/128), ceil(K/128)).

    The scale is a factor of the weight, in spite of its name: it is the inverse of what the quantiser multiplied by. Both
    tensors are returned unchanged, so this function is its own inverse.
    """
    if weight_scale_inv.dtype != torch.float32:
        raise TypeError(f"weight_scale_inv: must be float32; got {weight_scale_inv.dtype}; convert it")
    return _checked(weight, weight_scale_inv, E4M3, BlockScaledLayout.block(formats.FP8_BLOCK, formats.FP8_BLOCK))


def _checked(codes: Tensor, scale: Tensor, format: FloatFormat, layout: BlockScaledLayout) -> tuple[Tensor, Tensor]:
    """Return codes and scale in the dtypes that the kernels read, after checking that their shapes belong together."""
    raw = raw_codes(codes, format)
    if raw.ndim < 2:
        raise ValueError(f"codes: must have rows and K; got shape {tuple(raw.shape)}; reshape to (1, K)")
    *lead, rows, k = raw.shape
    expected = (*lead, *layout.scale_shape(rows, k * formats.CODES_PER_BYTE if format is E2M1 else k))
    if tuple(scale.shape) != expected:
        raise ValueError(f"scale: must have shape {expected}; got {tuple(scale.shape)}; pass the scale of these codes")
    if layout.scale_format is not None:
        scale = raw_codes(scale, layout.scale_format, "scale")
    return (raw if format is E2M1 else raw.view(getattr(torch, format.torch_dtype))), scale

"""Which arguments `mxfp4_moe` takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tilelang_ext.kernels.mxfp4_moe.activation import BUILT_IN, Activation
from tilelang_ext.kernels.mxfp4_moe.problem import EPILOGUES, GENERAL_LAYOUT, HOPPER_LAYOUTS, MAX_TOP_K, TOKEN_BITS
from tilelang_ext.kernels.mxfp4_moe.weights import HopperWeights, MXFP4Weights

_DTYPES = (torch.bfloat16, torch.float16)


class Operands(NamedTuple):
    """The tensors of one call, as `mxfp4_moe` documents them."""

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    w13: MXFP4Weights | HopperWeights
    w2: MXFP4Weights | HopperWeights
    expert_mask: Tensor | None


def check(operands: Operands, activation: Activation, a_format: str, epilogue: str, out: Tensor) -> None:
    """Raise for what no kernel takes; see `mxfp4_moe`."""
    x, topk_ids, topk_weights, w13, w2, expert_mask = operands
    if x.dtype not in _DTYPES:
        raise TypeError(f"mxfp4_moe: x must be bfloat16 or float16; got {x.dtype}; convert it")
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"mxfp4_moe: topk_ids must be int32 or int64; got {topk_ids.dtype}; convert it")
    if topk_weights.dtype not in (torch.float32, *_DTYPES):
        raise TypeError(f"mxfp4_moe: topk_weights must be float32, float16 or bfloat16; got {topk_weights.dtype}; convert it")
    if x.ndim != 2 or x.shape[1] != w13.k or x.shape[1] != w2.rows or w13.rows != 2 * w2.k:
        raise ValueError(
            "mxfp4_moe: x must be (tokens, H), w13 (E, 2I, H), w2 (E, H, I); got "
            f"{tuple(x.shape)}, (.., {w13.rows}, {w13.k}) and (.., {w2.rows}, {w2.k}); check the pair of weights"
        )
    if w13.num_experts != w2.num_experts:
        raise ValueError(
            f"mxfp4_moe: w13 and w2 must have equally many experts; got {w13.num_experts} and {w2.num_experts}; check the pair"
        )
    if topk_ids.ndim != 2 or topk_ids.shape[0] != x.shape[0] or topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"mxfp4_moe: topk_ids and topk_weights must be ({x.shape[0]}, top_k); got {tuple(topk_ids.shape)} and "
            f"{tuple(topk_weights.shape)}; pass one row per token"
        )
    num_experts = w13.num_experts if expert_mask is None else expert_mask.numel()
    if x.shape[0] >= 1 << TOKEN_BITS or topk_ids.shape[1] > min(MAX_TOP_K, num_experts):
        raise ValueError(
            f"mxfp4_moe: there must be fewer than 2^{TOKEN_BITS} tokens and at most {min(MAX_TOP_K, num_experts)} slots per "
            f"token; got {tuple(topk_ids.shape)}; split the batch"
        )
    if expert_mask is not None and (expert_mask.dtype != torch.bool or expert_mask.ndim != 1):
        raise TypeError(f"mxfp4_moe: expert_mask must be bool (num_experts,); got {expert_mask.dtype}; convert it")
    if not activation.is_known:
        raise ValueError(
            f"mxfp4_moe: activation must be one of {', '.join(BUILT_IN)}; got {activation.name!r}; pick one, or call "
            "Activation.custom in this process"
        )
    if epilogue not in EPILOGUES:
        raise ValueError(f"mxfp4_moe: epilogue must be one of {', '.join(EPILOGUES)}; got {epilogue!r}; use the default")
    if out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(
            f"mxfp4_moe: out must be contiguous {x.dtype} of shape {tuple(x.shape)}; got {out.dtype} {tuple(out.shape)}; "
            "pass torch.empty_like(x)"
        )
    if {w13.layout, w2.layout} != {GENERAL_LAYOUT}:
        _check_hopper(x, a_format, w13, w2)
    tensors = {"topk_ids": topk_ids, "topk_weights": topk_weights, "w13": w13[0], "w2": w2[0], "expert_mask": expert_mask}
    for name, tensor in (tensors | {"out": out}).items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"mxfp4_moe: {name} must be on {x.device} as x is; got {tensor.device}; move it")


def _check_hopper(x: Tensor, a_format: str, w13, w2) -> None:
    """Raise for what the kernels for `HopperWeights` do not take."""
    if w13.layout != w2.layout:
        raise ValueError(
            "mxfp4_moe: w13 and w2 must both be returned by tile_for_hopper for one a_dtype, or neither; got layouts "
            f"{w13.layout} and {w2.layout}; tile both alike"
        )
    if x.dtype != torch.bfloat16 or w13.layout != HOPPER_LAYOUTS.get(a_format):
        raise NotImplementedError(
            "mxfp4_moe: weights returned by tile_for_hopper must be used with bfloat16 x and the a_dtype that they were tiled "
            f"for, here {w13.a_format}; got x {x.dtype}, a_dtype {a_format}; use the weights that prepare_mxfp4_weights returns"
        )
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) != (9, 0):
        raise NotImplementedError(
            "mxfp4_moe: weights returned by tile_for_hopper must be used on an NVIDIA GPU of compute capability 9.0; got "
            f"{x.device}; use the weights that prepare_mxfp4_weights returns"
        )


def check_topk_ids(topk_ids: Tensor, num_experts: int) -> None:
    """Raise ValueError unless every id is in [0, num_experts) and each row names distinct experts.

    This is for debugging, since it waits for the device. `mxfp4_moe` itself leaves out ids that are not in range.
    """
    outside = ((topk_ids < 0) | (topk_ids >= num_experts)).nonzero()
    if len(outside):
        at = tuple(outside[0].tolist())
        raise ValueError(f"topk_ids: must be in [0, {num_experts}); got {topk_ids[at].item()} at {at}; check the router")
    ordered = topk_ids.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).nonzero()
    if len(twice):
        token, slot = twice[0].tolist()
        raise ValueError(
            f"topk_ids: must be distinct in a row; got {ordered[token, slot].item()} twice for token {token}; check the router"
        )

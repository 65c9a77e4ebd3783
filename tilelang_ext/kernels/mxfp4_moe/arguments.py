"""Which arguments `mxfp4_moe` takes."""

from __future__ import annotations

import torch
from torch import Tensor

from tilelang_ext.kernels.mxfp4_moe.routing import MAX_TOP_K, TOKEN_BITS
from tilelang_ext.kernels.mxfp4_moe.sm90_launch import check as check_tiled
from tilelang_ext.kernels.mxfp4_moe.weights import MXFP4Weights, is_tiled

_DTYPES = (torch.bfloat16, torch.float16)
_EPILOGUES = ("reduce", "atomic")


def check(x, topk_ids, topk_weights, w13: MXFP4Weights, w2: MXFP4Weights, activation, kind, epilogue, expert_mask, out) -> None:
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
    if w13.codes.shape[0] != w2.codes.shape[0]:
        raise ValueError(
            f"mxfp4_moe: w13 and w2 must have equal experts; got {w13.codes.shape[0]} and {w2.codes.shape[0]}; check the pair"
        )
    if topk_ids.ndim != 2 or topk_ids.shape[0] != x.shape[0] or topk_weights.shape != topk_ids.shape:
        raise ValueError(
            f"mxfp4_moe: topk_ids and topk_weights must be ({x.shape[0]}, top_k); got {tuple(topk_ids.shape)} and "
            f"{tuple(topk_weights.shape)}; one row a token"
        )
    num_experts = w13.codes.shape[0] if expert_mask is None else expert_mask.numel()
    if x.shape[0] >= 1 << TOKEN_BITS or topk_ids.shape[1] > min(MAX_TOP_K, num_experts):
        raise ValueError(
            f"mxfp4_moe: there must be fewer than 2^{TOKEN_BITS} tokens and at most {min(MAX_TOP_K, num_experts)} slots; got "
            f"{tuple(topk_ids.shape)}; split the batch"
        )
    if expert_mask is not None and (expert_mask.dtype != torch.bool or expert_mask.ndim != 1):
        raise TypeError(f"mxfp4_moe: expert_mask must be bool (num_experts,); got {expert_mask.dtype}; convert it")
    if activation not in ("swiglu", "silu"):
        raise ValueError(f"mxfp4_moe: activation must be 'swiglu' or 'silu'; got {activation!r}; pick one")
    if epilogue not in _EPILOGUES:
        raise ValueError(f"mxfp4_moe: epilogue must be one of {', '.join(_EPILOGUES)}; got {epilogue!r}; use the default")
    if out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(
            f"mxfp4_moe: out must be contiguous {x.dtype} of shape {tuple(x.shape)}; got {out.dtype} {tuple(out.shape)}; "
            "pass torch.empty_like(x)"
        )
    if is_tiled(w13) != is_tiled(w2):
        raise ValueError("mxfp4_moe: w13 and w2 must both be of tile_for_hopper or neither; got one; tile both")
    if is_tiled(w13):
        check_tiled(x, kind, w13, w2)
    tensors = {"topk_ids": topk_ids, "topk_weights": topk_weights, "w13": w13.codes, "w2": w2.codes, "expert_mask": expert_mask}
    for name, tensor in (tensors | {"out": out}).items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"mxfp4_moe: {name} must be on {x.device} as x is; got {tensor.device}; move it")


def check_topk_ids(topk_ids: Tensor, num_experts: int) -> None:
    """Raise ValueError unless every id is in [0, num_experts) and no row names an expert twice: for debugging, it waits for the
    device. `mxfp4_moe` itself leaves out ids that are not in range."""
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

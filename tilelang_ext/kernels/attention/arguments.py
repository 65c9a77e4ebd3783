"""The checks of `attention` and `attention_decode`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tilelang_ext.kernels.attention.problem import HEAD_DIM_UNIT, MAX_HEAD_DIM

DTYPES = (torch.bfloat16, torch.float16)
FP8_DTYPE = torch.float8_e4m3fn  # of q, k and v
CACHE_DTYPE = torch.float8_e4m3fn  # beside q's
MAX_BATCH = 65535  # of `attention_decode`, as a grid's third dimension
MAX_TOKENS = 8  # of a sequence in one call of `attention_decode`


class Arguments(NamedTuple):
    """The tensors of a call of `attention`, in the order of the torch operator."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    q_scale: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    out: Tensor
    lse: Tensor


class DecodeArguments(NamedTuple):
    """The tensors of a call of `attention_decode`, in the order of the torch operator."""

    q: Tensor
    cache_k: Tensor
    cache_v: Tensor
    seqlens: Tensor
    page_table: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    sinks: Tensor | None
    out: Tensor
    lse: Tensor


def checked_scale(name: str, softmax_scale: float | None, head_dim: int) -> float:
    """Return the scale, head_dim^-0.5 by default."""
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"{name}: softmax_scale must be positive and finite; got {scale}; scale and negate q instead")
    return scale


def checked_window(name: str, window: int | None) -> int:
    """Return the window, 0 for None."""
    if window is not None and window < 1:
        raise ValueError(f"{name}: window must be at least 1; got {window}; pass None to see all keys")
    return 0 if window is None else int(window)


def check(given: Arguments | DecodeArguments) -> None:
    """Raise TypeError for dtypes, ValueError for shapes, devices and memory that the operator does not take."""
    is_decode = isinstance(given, DecodeArguments)
    try:
        (_check_dtypes_of_decode if is_decode else _check_dtypes)(given)
        (_check_shapes_of_decode if is_decode else _check_shapes)(given)
        _check_memory(given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{'attention_decode' if is_decode else 'attention'}: {error}") from None


def check_heads(q_heads: int, kv_heads: int, head_dim: int) -> None:
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(
            f"heads of q must be a multiple of those of k; got {q_heads} and {kv_heads}; check the dimensions' order"
        )
    if head_dim % HEAD_DIM_UNIT or not HEAD_DIM_UNIT <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim, the last dimension of q, must be a multiple of {HEAD_DIM_UNIT} up to {MAX_HEAD_DIM}; got {head_dim}; "
            "pad it with zeros"
        )


def _check_dtypes(given: Arguments) -> None:
    if given.q.dtype not in (*DTYPES, FP8_DTYPE):
        raise TypeError(f"q must be bfloat16, float16 or float8_e4m3fn; got {given.q.dtype}; cast it")
    if given.q.dtype == FP8_DTYPE and given.out.dtype not in DTYPES:
        raise TypeError(f"out must be bfloat16 or float16 where q is {FP8_DTYPE}; got {given.out.dtype}; pass another")
    wanted = {
        **dict.fromkeys(("k", "v"), given.q.dtype),
        "out": given.out.dtype if given.q.dtype == FP8_DTYPE else given.q.dtype,
        **dict.fromkeys(("sinks", "lse", "q_scale", "k_scale", "v_scale"), torch.float32),
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.int32),
    }
    for name, dtype in wanted.items():
        tensor = getattr(given, name)
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}; got {tensor.dtype}; cast it")


def _check_shapes(given: Arguments) -> None:
    q, k = given.q, given.k
    if (given.cu_seqlens_q is None) != (given.cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together; got one; pass both")
    has_lengths = given.cu_seqlens_q is not None
    dimensions = "(tokens, heads, head_dim)" if has_lengths else "(batch, tokens, heads, head_dim)"
    for name in ("q", "k", "v"):
        tensor = getattr(given, name)
        if tensor.dim() != 4 - has_lengths:
            raise ValueError(f"{name} must have dimensions {dimensions}; got {tuple(tensor.shape)}; reshape it")
    *batch, S_q, heads, D = q.shape
    check_heads(heads, k.shape[-2], D)
    _check_scales(given, heads, k.shape[-2])
    kv_shape = (*batch, k.shape[-3], k.shape[-2], D)
    wanted = {"k": kv_shape, "v": kv_shape, "sinks": (heads,), "out": tuple(q.shape), "lse": (*batch, heads, S_q)}
    for name, shape in wanted.items():
        tensor = getattr(given, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}; sizes follow q and k")
    if has_lengths:
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            cu = getattr(given, name)
            if cu.dim() != 1 or len(cu) < 1 or len(cu) != len(given.cu_seqlens_q):
                raise ValueError(
                    f"{name} must have shape (sequences + 1,), one for both; got {tuple(cu.shape)}; begin it with 0"
                )


def _check_scales(given: Arguments, heads: int, kv_heads: int) -> None:
    for name, number in (("q_scale", heads), ("k_scale", kv_heads), ("v_scale", kv_heads)):
        scale = getattr(given, name)
        if scale is None:
            continue
        if given.q.dtype != FP8_DTYPE:
            raise ValueError(f"{name} must be None where q is {given.q.dtype}; got a tensor; use softmax_scale, or scale v")
        if scale.dim() != 1 or len(scale) not in (1, number):
            raise ValueError(f"{name} must have shape (1,) or ({number},); got {tuple(scale.shape)}; pass one or one per head")


def _check_dtypes_of_decode(given: DecodeArguments) -> None:
    if given.q.dtype not in DTYPES:
        raise TypeError(f"q must be bfloat16 or float16; got {given.q.dtype}; cast it")
    if given.cache_k.dtype not in (given.q.dtype, CACHE_DTYPE):
        raise TypeError(f"cache_k must have the dtype of q or be {CACHE_DTYPE}; got {given.cache_k.dtype}; cast it")
    wanted = {
        "cache_v": given.cache_k.dtype,
        **dict.fromkeys(("seqlens", "page_table"), torch.int32),
        **dict.fromkeys(("k_scale", "v_scale", "sinks", "lse"), torch.float32),
        "out": given.q.dtype,
    }
    for name, dtype in wanted.items():
        tensor = getattr(given, name)
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}; got {tensor.dtype}; cast it")


def _check_shapes_of_decode(given: DecodeArguments) -> None:
    q, cache, paged = given.q, given.cache_k, given.page_table is not None
    if q.dim() != 4:
        raise ValueError(
            f"q must have dimensions (batch, tokens, heads, head_dim); got {tuple(q.shape)}; add the one of tokens"
        )
    if cache.dim() != 4:
        dimensions = "(pages, page_size, kv_heads, head_dim)" if paged else "(batch, keys, kv_heads, head_dim)"
        raise ValueError(f"cache_k must have dimensions {dimensions}; got {tuple(cache.shape)}; reshape it")
    batch, tokens, heads, D = q.shape
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"tokens must be 1 to {MAX_TOKENS}; got {tokens}; call attention for more")
    if batch > MAX_BATCH:
        raise ValueError(f"batch must be at most {MAX_BATCH}; got {batch}; divide it")
    check_heads(heads, cache.shape[2], D)
    pages = cache.shape[0] if paged else batch
    if paged and (given.page_table.dim() != 2 or len(given.page_table) != batch or cache.shape[1] == 0):
        raise ValueError(
            f"page_table must have shape ({batch}, pages of a sequence), and pages a size; got {tuple(given.page_table.shape)} "
            f"and {cache.shape[1]}; pass one row per sequence"
        )
    scale = given.k_scale
    if (scale is None) != (given.v_scale is None):
        raise ValueError("k_scale and v_scale must be given together; got one; pass ones for the other")
    if scale is not None:
        if cache.dtype != CACHE_DTYPE:
            raise ValueError(f"k_scale must be None for a cache of {cache.dtype}; got a tensor; scale q instead")
        of_scale = (pages, cache.shape[2]) if scale.dim() == 2 and paged else (cache.shape[2],)
        for name in ("k_scale", "v_scale"):
            if tuple(getattr(given, name).shape) != of_scale:
                raise ValueError(
                    f"{name} must have shape ({cache.shape[2]},), or with page_table (pages, kv_heads) as k_scale; got "
                    f"{tuple(getattr(given, name).shape)}; expand it"
                )
    kv_shape = (pages, cache.shape[1], cache.shape[2], D)
    wanted = {
        **dict.fromkeys(("cache_k", "cache_v"), kv_shape),
        "seqlens": (batch,),
        "sinks": (heads,),
        "out": tuple(q.shape),
        "lse": (batch, heads, tokens),
    }
    for name, shape in wanted.items():
        tensor = getattr(given, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}; sizes follow q and cache_k")


def _check_memory(given: Arguments | DecodeArguments) -> None:
    for name, tensor in given._asdict().items():
        if tensor is not None and tensor.device != given.q.device:
            raise ValueError(f"{name} must be on the device of q, {given.q.device}; got {tensor.device}; move it")
    for name in ("out", "lse", "cache_k", "cache_v"):  # a cache is too large to be copied
        if not getattr(given, name, given.lse).is_contiguous():
            raise ValueError(
                f"{name} must be contiguous; got strides {getattr(given, name).stride()}; pass a contiguous tensor"
            )

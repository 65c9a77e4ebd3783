"""`attention`, `attention_decode` and `merge_attention`: softmax attention on CUDA, ROCm, the CPU and Metal.

s = softmax_scale * q . k + mask;  lse = ln(sum of e^s);  o = sum of e^(s - lse) v
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilelang_ext import reference
from tilelang_ext.kernels.attention import decode_launch, launch
from tilelang_ext.kernels.attention.arguments import (
    DTYPES,
    FP8_DTYPE,
    Arguments,
    DecodeArguments,
    check,
    checked_scale,
    checked_window,
)
from tilelang_ext.launch.device import is_for_nvidia
from tilelang_ext.launch.gradient import without_gradient

_NAME, _DECODE = "attention", "attention_decode"
_INPUTS = len(Arguments._fields) - 2


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor] | Tensor:
    """Compute softmax(softmax_scale * q k^T + mask) v, and the logarithm of its sums: (o, lse), or o without `return_lse`.

    | tensor | shape | dtype |
    | --- | --- | --- |
    | q | (batch, S_q, heads, head_dim); with cu_seqlens (queries of all sequences, heads, head_dim) | bf16, fp16, e4m3fn |
    | k, v | (batch, S_k, kv_heads, head_dim); with cu_seqlens (keys of all sequences, kv_heads, head_dim) | as q |
    | out | as q | as q; where that has 8 bits bfloat16, or float16 |
    | sinks | (heads,) | float32 |
    | q_scale | (1,) or (heads,), for q of float8_e4m3fn: its values are the codes times the scale; 1 by default | float32 |
    | k_scale, v_scale | (1,) or (kv_heads,), the same | float32 |
    | cu_seqlens_q, cu_seqlens_k | (sequences + 1,): where each sequence begins; the first is 0 | int32 |
    | lse | (batch, heads, S_q); with cu_seqlens (heads, queries of all sequences): natural logarithms | float32 |

    head_dim is a multiple of 8 up to 512; query head h reads key and value head h // (heads / kv_heads). The last query stands
    at the last key: query i at position i + S_k - S_q. `causal` hides keys after that position; `window` keeps the keys with
    0 <= position - key < window, and so hides later keys too. A sink is the logit of one more key, which has no value, of each
    head: o is multiplied by 1 / (1 + e^(sink - lse)), and lse becomes ln(e^lse + e^sink). A query that sees no key gives 0, and
    lse -infinity, or its sink. `softmax_scale` is head_dim^-0.5 by default, and must be positive.

    Scores, sums and results are float32 before one rounding; the probabilities are rounded to q's dtype. Of 8 bits that is so
    on Hopper where head_dim is a multiple of 16 up to 256 and there are no cu_seqlens; elsewhere they are rounded to the
    dtype of out. Tensors with other strides, or that start between multiples of 16 bytes, are copied first; out must be
    contiguous. On a GPU no tensor may have 2^31 elements. With cu_seqlens, rows past the last sequence are neither read for
    results nor written.

    TypeError for dtypes, ValueError for shapes and values; NotImplementedError for devices, and in a backward pass that reaches
    the result.
    """
    scale = checked_scale(_NAME, softmax_scale, q.shape[-1])
    window = checked_window(_NAME, window)
    if out is None:
        out = torch.empty(q.shape, dtype=torch.bfloat16 if q.dtype == FP8_DTYPE else q.dtype, device=q.device)
    lse = torch.empty((*q.shape[:-3], *q.shape[-3:-1][::-1]), dtype=torch.float32, device=q.device)
    scales = q_scale, k_scale, v_scale
    _attention_op(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, *scales, int(causal), window, scale, out, lse)
    inputs = q, k, v, sinks, *scales
    out = without_gradient(_NAME, out, *inputs)
    return (out, without_gradient(_NAME, lse, *inputs)) if return_lse else out


def attention_decode(
    q: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    seqlens: Tensor,
    *,
    page_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor] | Tensor:
    """Compute the attention of each sequence's last tokens over its cache: (o, lse), or o without `return_lse`.

    | tensor | shape | dtype |
    | --- | --- | --- |
    | q, out | (batch, tokens, heads, head_dim), 1 to 8 tokens | bfloat16, float16 |
    | cache_k, cache_v | (batch, keys, kv_heads, head_dim); with pages (pages, page_size, kv_heads, head_dim) | q's, e4m3fn |
    | seqlens | (batch,): keys of each sequence, those of its tokens included | int32 |
    | page_table | (batch, pages of a sequence): the page of each page_size keys | int32 |
    | k_scale, v_scale | (kv_heads,), or with page_table (pages, kv_heads); for float8_e4m3fn, 1 by default | float32 |
    | sinks | (heads,) | float32 |
    | lse | (batch, heads, tokens), natural logarithms | float32 |

    Token t stands at position seqlens - tokens + t and sees the keys up to it, of a `window` the last ones; sinks,
    softmax_scale, head_dim and heads are as in `attention`. A sequence without keys gives 0, and lse -infinity, or its sink.
    What the cache holds past seqlens is not used, whatever it is. Pages that a sequence uses must exist. There are at most
    65535 sequences.

    Caches must be contiguous; other inputs are copied where kernels cannot read them. Several blocks divide the keys of a
    sequence, whose results are summed in one order. TypeError for dtypes, ValueError for shapes and values; NotImplementedError
    for devices, and in a backward pass that reaches the result.
    """
    scale = checked_scale(_DECODE, softmax_scale, q.shape[-1])
    window = checked_window(_DECODE, window)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((*q.shape[:-3], *q.shape[-3:-1][::-1]), dtype=torch.float32, device=q.device)
    _decode_op(q, cache_k, cache_v, seqlens, page_table, k_scale, v_scale, sinks, window, scale, out, lse)
    inputs = q, cache_k, cache_v, k_scale, v_scale, sinks
    out = without_gradient(_DECODE, out, *inputs)
    return (out, without_gradient(_DECODE, lse, *inputs)) if return_lse else out


def merge_attention(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two sets of keys into that over both: (o, lse), from what `attention` returned for each.

    lse' = ln(e^lse + e^other_lse);  o' = e^(lse - lse') o + e^(other_lse - lse') other_o

    o and other_o are (..., S_q, heads, head_dim), bfloat16, float16 or float32; lse and other_lse (..., heads, S_q), float32.
    A part whose lse is -infinity has no weight, whatever its o holds; where both are, o is 0. Only one part may contain the
    sinks. Computed in float32 and rounded once; gradients flow. TypeError for dtypes, ValueError for shapes.
    """
    for name, tensor in (("o", o), ("other_o", other_o)):
        if tensor.dtype not in (*DTYPES, torch.float32) or tensor.dtype != o.dtype:
            raise TypeError(f"merge_attention: {name} must have o's dtype, of 16 bits or float32; got {tensor.dtype}; cast it")
        if tensor.shape != o.shape or tensor.dim() < 3:
            raise ValueError(
                f"merge_attention: {name} must have o's shape, (..., S_q, heads, head_dim); got {tuple(tensor.shape)}; view it"
            )
    wanted = (*o.shape[:-3], o.shape[-2], o.shape[-3])
    for name, tensor in (("lse", lse), ("other_lse", other_lse)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"merge_attention: {name} must be float32; got {tensor.dtype}; cast it")
        if tensor.shape != wanted:
            raise ValueError(f"merge_attention: {name} must have shape {wanted}; got {tuple(tensor.shape)}; transpose it")
    total = torch.logaddexp(lse, other_lse)
    shift = torch.where(total == -torch.inf, torch.zeros_like(total), total)
    result = 0.0
    for part, part_lse in ((o, lse), (other_o, other_lse)):
        weight = torch.exp(part_lse - shift).transpose(-1, -2)[..., None]
        result = result + torch.where(weight > 0, weight * part.float(), torch.zeros_like(weight))
    return result.to(o.dtype), total


# --- operators -------------------------------------------------------------------------------------------------------
# Destination-passing, and defined by their schema: torch.library.custom_op would cost ten times as much per call.

torch.library.define(
    f"tilelang_ext::{_NAME}_out",
    "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? q_scale, "
    "Tensor? k_scale, Tensor? v_scale, int causal, int window, float softmax_scale, Tensor(a!) out, Tensor(b!) lse) -> ()",
)
torch.library.define(
    f"tilelang_ext::{_DECODE}_out",
    "(Tensor q, Tensor cache_k, Tensor cache_v, Tensor seqlens, Tensor? page_table, Tensor? k_scale, Tensor? v_scale, "
    "Tensor? sinks, int window, float softmax_scale, Tensor(a!) out, Tensor(b!) lse) -> ()",
)


def _given(arguments: tuple) -> Arguments:
    return Arguments(*arguments[:_INPUTS], *arguments[-2:])


def _out(*arguments) -> None:
    # The plan checks its arguments too. What it does not take goes the long way, which says why, copies, or compiles.
    if arguments[0].is_cuda and is_for_nvidia():
        try:
            if launch.plan().launch(*arguments):
                return
        except (TypeError, ValueError):
            pass
    given, options = _given(arguments), arguments[_INPUTS:-2]
    check(given)
    if given.out.numel() == 0:
        return
    if given.q.device.type == "cpu":
        _on_cpu(given, *options)
    elif given.k.shape[-3] == 0:
        _without_keys(given)
    else:
        launch.launch(given, *options)


def _fake(*arguments) -> None:
    check(_given(arguments))


def _decode_out(*arguments) -> None:
    if arguments[0].is_cuda and is_for_nvidia():
        try:
            if decode_launch.plan().launch(*arguments):
                return
        except (TypeError, ValueError):
            pass
    given, options = DecodeArguments(*arguments[:8], *arguments[-2:]), arguments[8:10]
    check(given)
    if given.out.numel() == 0:
        return
    if given.q.device.type == "cpu":
        _decode_on_cpu(given, *options)
    elif given.cache_k.numel() == 0 or (given.page_table is not None and given.page_table.numel() == 0):
        _without_keys(given)
    else:
        decode_launch.launch(given, *options)


def _fake_decode(*arguments) -> None:
    check(DecodeArguments(*arguments[:8], *arguments[-2:]))


for _op, _implementation, _of_shape in ((_NAME, _out, _fake), (_DECODE, _decode_out, _fake_decode)):
    torch.library.impl(f"tilelang_ext::{_op}_out", "CompositeExplicitAutograd", _implementation)
    torch.library.register_fake(f"tilelang_ext::{_op}_out", _of_shape)
_attention_op = getattr(torch.ops.tilelang_ext, f"{_NAME}_out").default
_decode_op = getattr(torch.ops.tilelang_ext, f"{_DECODE}_out").default


def _without_keys(given: Arguments | DecodeArguments) -> None:
    given.out.zero_()
    given.lse.fill_(-torch.inf)
    if given.sinks is not None:
        given.lse.copy_(given.sinks[:, None].expand_as(given.lse))


def _on_cpu(given: Arguments, causal: int, window: int, scale: float) -> None:
    """Compute by the reference, sequence by sequence."""

    def compute(q, k, v, out, lse):
        values = [
            x.double() if s is None else x.double() * s.double()[:, None] for x, s in zip((q, k, v), given[6:9], strict=True)
        ]
        result = reference.attention(*values, scale, bool(causal), window or None, given.sinks)
        out.copy_(result[0])
        lse.copy_(result[1])

    if given.cu_seqlens_q is None:
        compute(given.q, given.k, given.v, given.out, given.lse)
        return
    bounds = [cu.tolist() for cu in (given.cu_seqlens_q, given.cu_seqlens_k)]
    for q0, q1, k0, k1 in zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:], strict=False):
        of_q, of_k = slice(q0, q1), slice(k0, k1)
        compute(given.q[None, of_q], given.k[None, of_k], given.v[None, of_k], given.out[None, of_q], given.lse[None, :, of_q])


def _decode_on_cpu(given: DecodeArguments, window: int, scale: float) -> None:
    """Compute by the reference, sequence by sequence."""
    page_size = given.cache_k.shape[1]
    for i, length in enumerate(given.seqlens.tolist()):
        keys = torch.arange(length)
        page = torch.full_like(keys, i) if given.page_table is None else given.page_table[i, keys // page_size].long()
        row = keys if given.page_table is None else keys % page_size
        k, v = (cache[page, row].double() for cache in (given.cache_k, given.cache_v))
        if given.k_scale is not None:
            k, v = (
                x * (s if s.dim() == 1 else s[page]).double()[..., None] for x, s in ((k, given.k_scale), (v, given.v_scale))
            )
        result = reference.attention(given.q[i : i + 1], k[None], v[None], scale, True, window or None, given.sinks)
        given.out[i : i + 1].copy_(result[0])
        given.lse[i : i + 1].copy_(result[1])

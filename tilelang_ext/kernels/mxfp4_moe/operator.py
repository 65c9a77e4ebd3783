"""`mxfp4_moe`: a mixture of experts with MXFP4 weights, as a torch operator.

y[t] = sum over slots s of topk_weights[t, s] * (w2[e] . act(w13[e] . x[t] + bias13[e]) + bias2[e]),  e = topk_ids[t, s]

On a GPU at most seven kernels, beside torch's fills and casts: counts and sort, quantisation of x or its rows in sorted order,
gate and up with the activation, quantisation of what that gives (FP8 on Hopper), down, sum of the slots. Their launches depend
on shapes alone, so they can be captured in a graph. The CPU computes by `reference.moe`, which refuses to quantise what is not
finite; kernels give such a row, or group of 32, NaN.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tilelang_ext import reference
from tilelang_ext.formats import E2M1, BlockScaledLayout
from tilelang_ext.kernels.mxfp4_moe import formats as activations
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.arguments import check
from tilelang_ext.kernels.mxfp4_moe.launch import launch
from tilelang_ext.kernels.mxfp4_moe.weights import MXFP4Weights
from tilelang_ext.launch.device import current

_KINDS = {torch.float8_e4m3fn: "fp8", torch.float4_e2m1fn_x2: "mxfp4", **{kind: kind for kind in ("fp8", "mxfp8", "mxfp4")}}


def mxfp4_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: MXFP4Weights,
    w2: MXFP4Weights,
    *,
    activation: Activation,
    a_dtype: torch.dtype | str | None = None,
    epilogue: str = "reduce",
    expert_mask: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute the experts of every token and add them, weighted.

    | argument | shape | dtype |
    | --- | --- | --- |
    | x | (tokens, H), tokens < 2^24 | bfloat16 or float16 |
    | topk_ids | (tokens, top_k), distinct in a row, top_k <= 127 | int32 or int64 |
    | topk_weights | (tokens, top_k) | float32, float16 or bfloat16 |
    | w13, w2 | of `prepare_mxfp4_weights`, E experts each; w13 with gate and up | |
    | expert_mask | (num_experts,), with E of them true: where expert parallelism keeps them here; None: all are | bool |
    | out | (tokens, H), contiguous | as x |

    `a_dtype` is what the products take activations in; x is quantised on the device, and between the products what they hand
    over, rounded to nearest with the scales of `quantization.quantize`:

    | a_dtype | x | between the products |
    | --- | --- | --- |
    | None or x's dtype (a16w4) | as it is | x's dtype |
    | torch.float8_e4m3fn or "fp8" (a8w4) | E4M3, a float32 scale a row | E4M3, an E8M0 scale per 32 |
    | the same, weights of `tile_for_hopper` | the same | x's dtype, then as x |
    | "mxfp8" (a8w4) | E4M3, an E8M0 scale per 32 | the same |
    | torch.float4_e2m1fn_x2 or "mxfp4" (a4w4) | E2M1, an E8M0 scale per 32 | the same |

    Ids out of range and experts elsewhere add nothing (`check_topk_ids` finds such ids). `reduce` gives the same result each
    time; `atomic` adds in any order, without memory for each slot. Beside float16 activations weights are rounded to float16:
    exact for scale bytes 104 to 140.

    Raises TypeError for dtypes, ValueError for shapes and values, NotImplementedError for devices other than cuda
    (ROCm's too), mps and cpu.
    """
    if a_dtype not in (None, x.dtype, *_KINDS):
        raise TypeError(
            f"mxfp4_moe: a_dtype must be {x.dtype}, torch.float8_e4m3fn, 'mxfp8' or 'mxfp4'; got {a_dtype}; leave it out"
        )
    if not isinstance(activation, Activation):
        raise TypeError(f"mxfp4_moe: activation must be an Activation; got {type(activation).__name__}; pass one")
    inner = (activation.name, activation.alpha, activation.limit)
    kind = _KINDS.get(a_dtype, str(x.dtype).removeprefix("torch."))
    arguments = (x, topk_ids, topk_weights, *w13, *w2, *inner, kind, epilogue, expert_mask)
    if out is None:
        return torch.ops.tilelang_ext.mxfp4_moe(*arguments)
    torch.ops.tilelang_ext.mxfp4_moe_out(*arguments, out)
    return out


# --- operators -------------------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor w13, Tensor scale13, Tensor bias13, int rows13, int k13, "
    "Tensor w2, Tensor scale2, Tensor bias2, int rows2, int k2, str activation, float alpha, float limit, str a_kind, "
    "str epilogue, Tensor? expert_mask"
)
torch.library.define("tilelang_ext::mxfp4_moe", f"({_ARGUMENTS}) -> Tensor")
torch.library.define("tilelang_ext::mxfp4_moe_out", f"({_ARGUMENTS}, Tensor(a!) out) -> ()")


def _mxfp4_moe_out(x, topk_ids, topk_weights, *rest) -> None:
    w13, w2 = MXFP4Weights(*rest[:5]), MXFP4Weights(*rest[5:10])
    activation, alpha, limit, kind, epilogue, expert_mask, out = rest[10:]
    check(x, topk_ids, topk_weights, w13, w2, activation, kind, epilogue, expert_mask, out)
    if not topk_ids.numel():
        out.zero_()
        return
    inner = Activation(activation, alpha, limit)
    run = _by_reference if x.device.type == "cpu" else launch
    with current(x.device):
        run(x, topk_ids, topk_weights, w13, w2, inner, kind, epilogue, expert_mask, out)


def _mxfp4_moe(x, *rest) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _mxfp4_moe_out(x, *rest, out)
    return out


def _fake_out(x, topk_ids, topk_weights, *rest) -> None:
    activation, _, _, kind, epilogue, expert_mask, out = rest[10:]
    w13, w2 = MXFP4Weights(*rest[:5]), MXFP4Weights(*rest[5:10])
    check(x, topk_ids, topk_weights, w13, w2, activation, kind, epilogue, expert_mask, out)


def _fake(x, *rest) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _fake_out(x, *rest, out)
    return out


for _name, _implementation, _shape_of in (("mxfp4_moe", _mxfp4_moe, _fake), ("mxfp4_moe_out", _mxfp4_moe_out, _fake_out)):
    torch.library.impl(f"tilelang_ext::{_name}", "CompositeExplicitAutograd", _implementation)
    torch.library.register_fake(f"tilelang_ext::{_name}", _shape_of)


# --- CPU -------------------------------------------------------------------------------------------------------------


def _by_reference(x, topk_ids, topk_weights, w13, w2, activation, kind, epilogue, expert_mask, out) -> None:
    device = x.device
    mask = torch.ones(w13.codes.shape[0], dtype=torch.bool, device=device) if expert_mask is None else expert_mask
    if mask.sum() != w13.codes.shape[0]:  # a GPU is not waited for: its kernels take no expert past the last
        raise ValueError(
            f"mxfp4_moe: expert_mask must be true for the {w13.codes.shape[0]} experts of w13; got {int(mask.sum())}; check it"
        )
    half, I = w13.codes.shape[1] // 2, w13.rows // 2
    rows13 = torch.cat([torch.arange(I, device=device), half + torch.arange(I, device=device)])
    mx = BlockScaledLayout.e8m0_k32()
    act = {
        "silu": functools.partial(reference.silu_mul, gate="separated"),
        "swiglu": functools.partial(reference.swiglu, alpha=activation.alpha, limit=activation.limit, gate="separated"),
    }[activation.name]
    if kind not in activations.WIDE:
        x = reference.requantize(x, kind)
    y = torch.zeros(out.shape, dtype=torch.float64, device=device)
    # One expert at a time: dequantised, all of a model's would take 16 times their memory.
    for local, expert in enumerate(mask.nonzero().flatten().tolist()):
        if not (topk_ids == expert).any():
            continue
        y += reference.moe(
            x,
            topk_ids,
            topk_weights,
            reference.dequantize(w13.codes[local, rows13], w13.scale[local, rows13], E2M1, mx)[None, :, : w13.k],
            reference.dequantize(w2.codes[local, : w2.rows], w2.scale[local, : w2.rows], E2M1, mx)[None, :, : w2.k],
            activation=act,
            bias13=w13.bias[local, rows13][None],
            bias2=w2.bias[local, : w2.rows][None],
            between=activations.between(kind),
            expert_mask=torch.arange(len(mask), device=device) == expert,
        )
    out.copy_(y)

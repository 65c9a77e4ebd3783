"""`mxfp4_moe`: a mixture of experts with MXFP4 weights, as a torch operator.

y[t] = sum over slots s of topk_weights[t, s] * (w2[e] . act(w13[e] . x[t] + bias13[e]) + bias2[e]),  e = topk_ids[t, s]

On a GPU a call launches at most seven kernels, besides torch's fills and casts: count and sort slots by expert; quantise x, or
put its rows in sorted order; gate and up with the activation; quantise the hidden rows (FP8 on Hopper); down; sum over slots.
The launches depend on shapes alone, so a call can be captured in a graph. The CPU computes by `reference.moe`, which refuses to
quantise numbers that are not finite; the kernels give such a row, or group of 32, the scale NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from tilelang_ext import reference
from tilelang_ext.formats import E2M1, BlockScaledLayout
from tilelang_ext.kernels.mxfp4_moe import launch as launches
from tilelang_ext.kernels.mxfp4_moe.activation import BUILT_IN, Activation
from tilelang_ext.kernels.mxfp4_moe.arguments import Operands, check
from tilelang_ext.kernels.mxfp4_moe.formats import SIXTEEN_BITS, hidden_format
from tilelang_ext.kernels.mxfp4_moe.problem import Problem
from tilelang_ext.kernels.mxfp4_moe.signature import A_FORMATS, options_of, readable, to_plan
from tilelang_ext.kernels.mxfp4_moe.weights import HopperWeights, MXFP4Weights, from_arguments, to_arguments
from tilelang_ext.launch.device import current, is_for_nvidia, target_of
from tilelang_ext.launch.gradient import without_gradient
from tilelang_ext.launch.plan import Plan
from tilelang_ext.launch.prepared import Prepared


def mxfp4_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: MXFP4Weights | HopperWeights,
    w2: MXFP4Weights | HopperWeights,
    *,
    activation: Activation,
    a_dtype: torch.dtype | str | None = None,
    epilogue: str = "reduce",
    expert_mask: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute the experts of every token and add their results, weighted.

    | argument | shape | dtype |
    | --- | --- | --- |
    | x | (tokens, H), tokens < 2^24 | bfloat16 or float16 |
    | topk_ids | (tokens, top_k), distinct in each row, top_k <= 127 | int32 or int64 |
    | topk_weights | (tokens, top_k) | float32, float16 or bfloat16 |
    | w13, w2 | as `prepare_mxfp4_weights` or `tile_for_hopper` returns them, E experts each; w13 has gate and up | |
    | expert_mask | (num_experts,), true for the E experts whose weights are here (expert parallelism); None means all | bool |
    | out | (tokens, H), contiguous | x's dtype |

    `a_dtype` is what the GEMMs take activations in. x and the hidden rows between the GEMMs are quantised on the device,
    rounded to nearest, with the scales of `quantization.quantize`:

    | a_dtype | x | hidden rows |
    | --- | --- | --- |
    | None or x's dtype (a16w4) | as it is | x's dtype |
    | torch.float8_e4m3fn or "fp8" (a8w4) | E4M3, one float32 scale per row | E4M3, one E8M0 scale per 32 |
    | the same, weights returned by `tile_for_hopper` | the same | x's dtype, then E4M3, one float32 scale per row |
    | "mxfp8" (a8w4) | E4M3, one E8M0 scale per 32 | the same |
    | torch.float4_e2m1fn_x2 or "mxfp4" (a4w4) | E2M1, one E8M0 scale per 32 | the same |

    Ids out of range and experts on other ranks add nothing (`check_topk_ids` finds such ids). The epilogue `reduce` stores each
    slot and adds the slots in order, so the result is the same each time; `atomic` adds in any order and needs no memory per
    slot. With float16 activations weights are rounded to float16, which is exact for scale bytes 104 to 140.

    Raises TypeError for dtypes, ValueError for shapes and values, NotImplementedError for devices other than cuda
    (ROCm's too), mps and cpu, and in a backward pass that reaches the result.
    """
    is_plain = type(w13) is type(w2) is HopperWeights and type(activation) is Activation
    if out is not None and is_plain and not is_dynamo_compiling():
        options = *options_of(activation, a_dtype, x), epilogue, expert_mask
        if launches.directly.value(x, topk_ids, topk_weights, *w13, *w2, *options, out):
            return out
    arguments = _arguments_of(x, topk_ids, topk_weights, w13, w2, activation, a_dtype, epilogue, expert_mask)
    if out is None:
        out = torch.ops.tilelang_ext.mxfp4_moe(*arguments)
    else:
        torch.ops.tilelang_ext.mxfp4_moe_out(*arguments, out)
    return without_gradient("mxfp4_moe", out, x, topk_weights)


def _arguments_of(x, topk_ids, topk_weights, w13, w2, activation, a_dtype, epilogue, expert_mask) -> tuple:
    """Return the arguments of the torch operator, but the result, from those of the function."""
    if a_dtype not in (None, x.dtype, *A_FORMATS):
        raise TypeError(
            f"mxfp4_moe: a_dtype must be {x.dtype}, torch.float8_e4m3fn, 'mxfp8' or 'mxfp4'; got {a_dtype}; leave it out"
        )
    if not isinstance(activation, Activation):
        raise TypeError(f"mxfp4_moe: activation must be an Activation; got {type(activation).__name__}; pass one")
    for name, weights in (("w13", w13), ("w2", w2)):
        if not isinstance(weights, MXFP4Weights | HopperWeights):
            raise TypeError(
                f"mxfp4_moe: {name} must be MXFP4Weights or HopperWeights; got {type(weights).__name__}; "
                "call prepare_mxfp4_weights"
            )
    if not w13.gated or w2.gated:
        with_gate = {True: "with gate=", False: "without"}
        got = f"w13 {with_gate[w13.gated]} and w2 {with_gate[w2.gated]}"
        raise ValueError(
            f"mxfp4_moe: w13 must be prepared with gate= and w2 without; got {got}; pass gate='interleaved' (gpt-oss) or "
            "'separated' to prepare_mxfp4_weights for w13 alone"
        )
    a_format = A_FORMATS.get(a_dtype, str(x.dtype).removeprefix("torch."))
    return (
        *(x, topk_ids, topk_weights, *to_arguments(w13), *to_arguments(w2)),
        *(activation.name, activation.alpha, activation.limit, a_format, epilogue, expert_mask),
    )


def prepare(
    w13: MXFP4Weights | HopperWeights,
    w2: MXFP4Weights | HopperWeights,
    *,
    activation: Activation,
    a_dtype: torch.dtype | str | None = None,
    epilogue: str = "reduce",
    expert_mask: Tensor | None = None,
) -> Prepared:
    """Return `mxfp4_moe` with its weights and options fixed, which are described there; it is `mxfp4_moe.prepare`.

    moe = mxfp4_moe.prepare(w13, w2, activation=Activation.swiglu())
    y = moe(x, topk_ids, topk_weights)                      or out=y: checks the tensors, launches
    step = moe.bind(x, topk_ids, topk_weights, out=y)       the tensors fixed too
    step()
    """
    options = {"activation": activation, "a_dtype": a_dtype, "epilogue": epilogue, "expert_mask": expert_mask}

    def bind(x, topk_ids, topk_weights, out):
        return _bind(_arguments_of(x, topk_ids, topk_weights, w13, w2, **options), out)

    return Prepared(functools.partial(mxfp4_moe, w13=w13, w2=w2, **options), bind)


mxfp4_moe.prepare = prepare  # type: ignore[attr-defined]


def _bind(arguments: tuple, out: Tensor) -> Callable[[], None] | None:
    """Return the launch of the torch operator's arguments, None where no plan launches them."""
    operands, *options = _checked(*arguments, out)
    problem = launches.problem_of(operands, *options)
    if not operands.topk_ids.numel() or not launches.has_plan(problem):
        return None
    plan, arguments = launches.plan(), (*arguments[:-1], readable(operands).expert_mask, out)
    try:
        return plan.bind(*to_plan(arguments))
    except LookupError:
        launches.add_variant(plan, arguments, problem, target_of("mxfp4_moe", out.device).arch)
        return plan.bind(*to_plan(arguments))


# --- operators -------------------------------------------------------------------------------------------------------
# Weights are tensors and the name of their layout, see `weights.to_arguments`.

_ARGUMENTS = (
    "Tensor x, Tensor topk_ids, Tensor topk_weights, "
    "Tensor w13, Tensor scale13, Tensor bias13, int rows13, int k13, str layout13, "
    "Tensor w2, Tensor scale2, Tensor bias2, int rows2, int k2, str layout2, "
    "str activation, float alpha, float limit, str a_format, str epilogue, Tensor? expert_mask"
)
torch.library.define("tilelang_ext::mxfp4_moe", f"({_ARGUMENTS}) -> Tensor")
torch.library.define("tilelang_ext::mxfp4_moe_out", f"({_ARGUMENTS}, Tensor(a!) out) -> ()")


def _checked(x, topk_ids, topk_weights, *rest) -> tuple[Operands, Activation, str, str]:
    """Return operands, activation, format of activations and epilogue from the arguments of `mxfp4_moe_out`."""
    activation, alpha, limit, a_format, epilogue, expert_mask, out = rest[12:]
    operands = Operands(
        x, topk_ids, topk_weights, from_arguments(*rest[:6], gated=True), from_arguments(*rest[6:12], gated=False), expert_mask
    )
    options = Activation(activation, alpha, limit), a_format, epilogue
    check(operands, *options, out)
    return operands, *options


def _mxfp4_moe_out(*arguments) -> None:
    # The plan checks its arguments too. What it does not take goes the long way, which says why, copies, or compiles.
    if arguments[0].is_cuda and is_for_nvidia():
        try:
            if launches.plan().launch(*to_plan(arguments)):
                return
        except (TypeError, ValueError):
            pass
    _check_and_launch(*arguments)


def _check_and_launch(*arguments) -> None:
    operands, *options = _checked(*arguments)
    out = arguments[-1]
    if not operands.topk_ids.numel():
        out.zero_()
        return
    problem = launches.problem_of(operands, *options)
    if out.device.type == "cpu":
        _by_reference(problem, operands, out)
    elif not launches.has_plan(problem):
        with current(out.device):
            launches.launch(problem, operands, out)
    else:
        _launch_plan(launches.plan(), problem, operands, arguments)


def _launch_plan(plan: Plan, problem: Problem, operands: Operands, arguments: tuple) -> None:
    """Launch on an NVIDIA GPU; a variant that the plan lacks is compiled first."""
    given, out = readable(operands), arguments[-1]
    arguments = (*given[:3], *arguments[3:-2], given.expert_mask, out)
    in_plan = to_plan(arguments)
    if plan.launch(*in_plan):
        return
    if torch.cuda.is_current_stream_capturing():
        with current(out.device):
            launches.launch(problem, operands, out)
    else:
        launches.add_variant(plan, arguments, problem, target_of("mxfp4_moe", out.device).arch)
        plan(*in_plan)


def _mxfp4_moe(x, *rest) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _mxfp4_moe_out(x, *rest, out)
    return out


def _fake_out(*arguments) -> None:
    _checked(*arguments)


def _fake(x, *rest) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _fake_out(x, *rest, out)
    return out


for _name, _implementation, _shape_of in (("mxfp4_moe", _mxfp4_moe, _fake), ("mxfp4_moe_out", _mxfp4_moe_out, _fake_out)):
    torch.library.impl(f"tilelang_ext::{_name}", "CompositeExplicitAutograd", _implementation)
    torch.library.register_fake(f"tilelang_ext::{_name}", _shape_of)


# --- CPU -------------------------------------------------------------------------------------------------------------


def _reference_of(activation: Activation) -> Callable[[Tensor], Tensor]:
    """Return the function of gate and up, separated, float64."""
    if activation.name in BUILT_IN:
        swiglu = functools.partial(reference.swiglu, alpha=activation.alpha, limit=activation.limit, gate="separated")
        clamped = functools.partial(reference.clamped_silu, limit=activation.limit)
        return {"silu": reference.silu_mul, "swiglu": swiglu, "clamped_silu": clamped}[activation.name]
    if activation.reference is None:
        raise NotImplementedError(
            f"mxfp4_moe: activation must have a function of torch tensors on the CPU; got {activation.name!r} without; pass "
            "Activation.custom(macro, reference=)"
        )
    return functools.partial(reference.custom_activation, function=activation.reference)


def _by_reference(problem: Problem, operands: Operands, out: Tensor) -> None:
    x, topk_ids, topk_weights, w13, w2, expert_mask = operands
    local_experts, device = problem.num_local_experts, x.device
    mask = torch.ones(local_experts, dtype=torch.bool, device=device) if expert_mask is None else expert_mask
    # Only the CPU looks: a GPU would have to be waited for, and its kernels read no expert that is not there.
    if mask.sum() != local_experts:
        raise ValueError(
            f"mxfp4_moe: expert_mask must be true for the {local_experts} experts of w13; got {int(mask.sum())}; check it"
        )
    half, I = w13.codes.shape[1] // 2, problem.intermediate_size
    rows13 = torch.cat([torch.arange(I, device=device), half + torch.arange(I, device=device)])
    mx, act = BlockScaledLayout.e8m0_k32(), _reference_of(problem.activation)
    if problem.a_format not in SIXTEEN_BITS:
        x = reference.requantize(x, problem.a_format)
    y = torch.zeros(out.shape, dtype=torch.float64, device=device)
    # One expert at a time, since the dequantised weights of all of them would take 16 times the memory of the codes.
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
            between=hidden_format(problem.a_format),
            expert_mask=torch.arange(len(mask), device=device) == expert,
        )
    out.copy_(y)

"""`gated_delta_prefill`: whole prompts of the gated delta rule, chunk by chunk, on CUDA, ROCm, the CPU and Metal.

g = exp(-exp(A_log) * softplus(a + dt_bias));  beta = sigmoid(b)
S = g S;  S = S + beta (v - S k) k^T;  out = scale * S q
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tilelang_ext import reference
from tilelang_ext.kernels.gated_delta import prefill_launch
from tilelang_ext.kernels.gated_delta.prefill_arguments import NAME, PrefillArguments, check
from tilelang_ext.launch.device import is_for_nvidia
from tilelang_ext.launch.gradient import without_gradient


def gated_delta_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,
    out: Tensor | None = None,
    final_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute linear attention with the gated delta rule over whole sequences, and the states after them: (out, final_state).

    | tensor | shape | dtype |
    | --- | --- | --- |
    | q, k | (batch, tokens, qk_heads, K); with cu_seqlens (tokens of all sequences, qk_heads, K) | bfloat16 or float16 |
    | v, out | (batch, tokens, heads, V); with cu_seqlens (tokens of all sequences, heads, V) | as q |
    | A_log, dt_bias | (heads,) | float32 |
    | a, b | (batch, tokens, heads); with cu_seqlens (tokens of all sequences, heads) | as q |
    | initial_state, final_state | (sequences, heads, V, K), K last, as `gated_delta_decode` has it | float32 or bfloat16 |
    | cu_seqlens | (sequences + 1,): where each sequence begins; the first is 0 | int32 |

    Any number of tokens; K is 32, 64 or 128, V a multiple of 16; value head h has q and k of head h // (heads / qk_heads).
    `scale` is K^-0.5 by default. With `use_qk_l2norm` q and k are divided by sqrt(their squares' sum + 1e-6) first. A gate per
    channel of K (KDA) is refused.

    Without `initial_state` states begin as zeros. `final_state` may be `initial_state` itself; None: a new tensor, float32
    where there is no initial one. A sequence without tokens keeps its state. With cu_seqlens, tokens past the last sequence are
    neither read for results nor written.

    States and sums are float32; MMAs read the state, and what a chunk of 64 or 32 tokens adds to it, rounded to q's dtype.
    Inputs with other strides, or that start between multiples of 16 bytes, are copied first. On a GPU no tensor may have 2^31
    elements.

    TypeError for dtypes, ValueError for shapes; NotImplementedError for devices, and in a backward pass that reaches the
    result.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if out is None:
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if final_state is None:
        sequences = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
        dtype = torch.float32 if initial_state is None else initial_state.dtype
        final_state = torch.empty((sequences, *v.shape[-2:], q.shape[-1]), dtype=dtype, device=v.device)
    tensors = q, k, v, A_log, dt_bias, a, b
    if final_state is initial_state:
        _in_place_op(*tensors, initial_state, cu_seqlens, scale, int(use_qk_l2norm), out)
    else:
        _out_op(*tensors, initial_state, cu_seqlens, scale, int(use_qk_l2norm), out, final_state)
        final_state = without_gradient(NAME, final_state, *tensors, initial_state)
    return without_gradient(NAME, out, *tensors, initial_state), final_state


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor A_log, Tensor dt_bias, Tensor a, Tensor b"
torch.library.define(
    f"tilelang_ext::{NAME}_out",
    f"({_TENSORS}, Tensor? initial_state, Tensor? cu_seqlens, float scale, int options, Tensor(a!) out, "
    "Tensor(b!) final_state) -> ()",
)
torch.library.define(
    f"tilelang_ext::{NAME}_",
    f"({_TENSORS}, Tensor(a!) state, Tensor? cu_seqlens, float scale, int options, Tensor(b!) out) -> ()",
)


def _out(*arguments) -> None:
    # The plan checks its arguments too. What it does not take goes the long way, which says why, copies, or compiles.
    if arguments[0].is_cuda and is_for_nvidia():
        try:
            if prefill_launch.plan().launch(*arguments):
                return
        except (TypeError, ValueError):
            pass
    given, (scale, options) = _given(arguments), arguments[9:11]
    check(given)
    if given.final.shape[0] == 0:
        return
    if given.out.numel() == 0:
        _without_tokens(given)
    elif given.q.device.type == "cpu":
        _on_cpu(given, scale, bool(options))
    else:
        prefill_launch.launch(given, scale, bool(options))


def _given(arguments: tuple) -> PrefillArguments:
    return PrefillArguments(*arguments[:9], *arguments[11:])


def _in_place(*arguments) -> None:
    _out(*arguments, None)


def _fake(*arguments) -> None:
    check(_given(arguments))


def _fake_in_place(*arguments) -> None:
    _fake(*arguments, None)


for _op, _implementation, _of_shape in ((f"{NAME}_out", _out, _fake), (f"{NAME}_", _in_place, _fake_in_place)):
    torch.library.impl(f"tilelang_ext::{_op}", "CompositeExplicitAutograd", _implementation)
    torch.library.register_fake(f"tilelang_ext::{_op}", _of_shape)
_out_op = getattr(torch.ops.tilelang_ext, f"{NAME}_out").default
_in_place_op = getattr(torch.ops.tilelang_ext, f"{NAME}_").default


def _without_tokens(given: PrefillArguments) -> None:
    if given.final_state is None:
        return
    if given.initial_state is None:
        given.final_state.zero_()
    else:
        given.final_state.copy_(given.initial_state)


def _on_cpu(given: PrefillArguments, scale: float, l2_norm: bool) -> None:
    """Compute by the reference, token by token, sequence by sequence."""

    def compute(q, k, v, a, b, initial, out, final):
        if q.shape[1] == 0:
            final.copy_(initial)
            return
        result, states = reference.gated_delta(q, k, v, initial, given.A_log, given.dt_bias, a, b, scale, l2_norm=l2_norm)
        out.copy_(result)
        final.copy_(states[:, -1])

    initial = torch.zeros_like(given.final) if given.initial_state is None else given.initial_state
    tokens = given.q, given.k, given.v, given.a, given.b
    if given.cu_seqlens is None:
        compute(*tokens, initial, given.out, given.final)
        return
    bounds = given.cu_seqlens.tolist()
    for i, (first, end) in enumerate(itertools.pairwise(bounds)):
        of, at = slice(first, end), slice(i, i + 1)
        compute(*(x[None, of] for x in tokens), initial[at], given.out[None, of], given.final[at])

"""`gated_delta_decode` and `gated_delta_replay`: one to eight tokens of the gated delta rule on CUDA, ROCm, the CPU and Metal.

g = exp(-exp(A_log) * softplus(a + dt_bias));  beta = sigmoid(b)
S = g S;  S = S + beta (v - S k) k^T;  out = scale * S q
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from tilelang_ext import reference
from tilelang_ext.kernels.gated_delta import launch
from tilelang_ext.kernels.gated_delta.arguments import Arguments, ReplayArguments, check
from tilelang_ext.launch.device import is_for_nvidia
from tilelang_ext.launch.gradient import without_gradient

_NAME, _REPLAY = "gated_delta_decode", "gated_delta_replay"


def gated_delta_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    state_indices: Tensor | None = None,
    num_accepted: Tensor | None = None,
    out: Tensor | None = None,
    new_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the next tokens of linear attention with the gated delta rule, and the state after them: (out, new_state).

    | tensor | shape | dtype |
    | --- | --- | --- |
    | q, k | (batch, tokens, qk_heads, K) | bfloat16 or float16 |
    | v, out | (batch, tokens, heads, V) | as q |
    | state | (batch, heads, V, K), K last; with `state_indices` (slots, heads, V, K) | float32 or bfloat16 |
    | A_log | (heads,) | float32 |
    | dt_bias | (heads,); with a gate per channel (heads, K) | float32 |
    | a | (batch, tokens, heads); with a gate per channel (KDA) (batch, tokens, heads, K) | as q |
    | b | (batch, tokens, heads) | as q |
    | state_indices, num_accepted | (batch,) | int32 |

    1 to 8 tokens; K is 32, 64, 128, 256 or 512, V a multiple of 4; value head h has q and k of head h // (heads / qk_heads).
    `scale` is K^-0.5 by default. With `use_qk_l2norm` q and k are divided by sqrt(their squares' sum + 1e-6) first.

    `new_state` decides which states are kept. None: the last one, in a new tensor. `state` itself: the last one, in place. A
    tensor of state's shape: the last one, there. A tensor (batch, tokens, heads, V, K): the state after every token. With
    `num_accepted`, the one after that many tokens of each sequence, as a verify step of speculative decoding keeps it.

    With `state_indices`, sequence i has slot state_indices[i] of a pool, and new_state must be given; no two sequences may
    share a slot. A negative index is no sequence: its out is 0 and no state is touched; an index past the pool gives NaN.
    Sums are in float32, and the state stays float32 between the tokens of a call.

    On CUDA tokens and slots may have any strides; inputs that kernels cannot read are copied. TypeError for dtypes, ValueError
    for shapes; NotImplementedError in a backward pass that reaches the result.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if new_state is None:
        if state_indices is not None:
            raise ValueError(
                f"{_NAME}: new_state must be given with state_indices; got None; pass state to update the pool in place"
            )
        new_state = torch.empty_like(state, memory_format=torch.contiguous_format)
    if out is None:
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    arguments = q, k, v, state, A_log, dt_bias, a, b, state_indices, num_accepted, scale, int(use_qk_l2norm), out
    in_place = new_state is state
    if not is_compiling() and launch.directly(Arguments)(*arguments, None if in_place else new_state):
        return out, new_state  # where the dispatcher would do no more
    if in_place:
        _in_place_op(*arguments)
    else:
        _out_op(*arguments, new_state)
    inputs = q, k, v, A_log, dt_bias, a, b
    if not in_place:
        new_state = without_gradient(_NAME, new_state, state, *inputs)
    return without_gradient(_NAME, out, state, *inputs), new_state


class ReplayCache(NamedTuple):
    """What `gated_delta_replay` keeps of the last tokens of each slot, in rings of entries.

    | tensor | shape | dtype |
    | --- | --- | --- |
    | k | (slots, entries, qk_heads, K) | as q |
    | r | (slots, entries, heads, V) | float32 |
    | decay | (slots, entries, heads), with a gate per channel (slots, entries, heads, K) | float32 |
    """

    k: Tensor
    r: Tensor
    decay: Tensor

    @classmethod
    def empty(cls, state: Tensor, entries: int, qk_heads: int, dtype: torch.dtype, *, per_channel: bool = False) -> ReplayCache:
        """Allocate a cache for a pool of states (slots, heads, V, K), on its device; `dtype` is that of q.

        `entries` is the most tokens that a sequence may have there, those of a call included.
        """
        slots, heads, V, K = state.shape
        return cls(
            state.new_empty((slots, entries, qk_heads, K), dtype=dtype),
            state.new_empty((slots, entries, heads, V), dtype=torch.float32),
            state.new_empty((slots, entries, heads, *([K] if per_channel else [])), dtype=torch.float32),
        )

    def next_windows(self, windows: Tensor, tokens: int, num_accepted: Tensor | None = None) -> Tensor:
        """Return the windows (batch, 2) int32 for the call after one with `tokens` tokens per sequence, on the device.

        All layers of a model share them. `num_accepted` (batch,) says how many of the tokens are kept; None: all.
        """
        entries = self.k.shape[1]
        first, count = windows.unbind(1)
        is_written = count + tokens > entries - tokens
        first = torch.where(is_written, (first + count) % entries, first)
        count = torch.where(is_written, 0, count) + (tokens if num_accepted is None else num_accepted)
        return torch.stack([first, count], 1).int()


def gated_delta_replay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    b: Tensor,
    windows: Tensor,
    cache: ReplayCache,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    state_indices: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute the next tokens as `gated_delta_decode` does, but write the state once in a while; return out.

    Tensors are those of `gated_delta_decode`, with a `cache` for the pool of states. `windows` is (batch, 2) int32: for
    each sequence the first entry of its tokens since its state was written, and their number. It is zeros at first, then
    what `ReplayCache.next_windows` returns. A call that finds more than entries - 2 * tokens tokens there writes the state, in
    place; between such calls it lags behind. Tokens that were not accepted are overwritten by the next call's.

    A call reads the state and writes a small part of it on average. TypeError, ValueError and NotImplementedError as there.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if out is None:
        out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    arguments = q, k, v, state, A_log, dt_bias, a, b, state_indices, windows, *cache, scale, int(use_qk_l2norm), out
    if not is_compiling() and launch.directly(ReplayArguments)(*arguments):
        return out
    _replay_op(*arguments)
    return without_gradient(_REPLAY, out, q, k, v, state, A_log, dt_bias, a, b)


# --- operators -------------------------------------------------------------------------------------------------------
# Destination-passing, and defined by their schema: torch.library.custom_op would cost ten times as much per call.

_GATES = "Tensor A_log, Tensor dt_bias, Tensor a, Tensor b"
_INPUTS = f"{_GATES}, Tensor? state_indices, Tensor? num_accepted, float scale, int options"
torch.library.define(
    f"tilelang_ext::{_NAME}_out",
    f"(Tensor q, Tensor k, Tensor v, Tensor state, {_INPUTS}, Tensor(a!) out, Tensor(b!) new_state) -> ()",
)
torch.library.define(
    f"tilelang_ext::{_NAME}_", f"(Tensor q, Tensor k, Tensor v, Tensor(a!) state, {_INPUTS}, Tensor(b!) out) -> ()"
)


torch.library.define(
    f"tilelang_ext::{_REPLAY}",
    f"(Tensor q, Tensor k, Tensor v, Tensor(a!) state, {_GATES}, Tensor? state_indices, Tensor windows, Tensor(b!) k_ring, "
    "Tensor(c!) r_ring, Tensor(d!) decay_ring, float scale, int options, Tensor(e!) out) -> ()",
)


def _out(*arguments) -> None:
    *tensors, scale, options, out, new_state = arguments
    _run(Arguments(*tensors, out, new_state), scale, options, arguments)


def _in_place(*arguments) -> None:
    _out(*arguments, None)


def _replay(*arguments) -> None:
    *tensors, scale, options, out = arguments
    _run(ReplayArguments(*tensors, out), scale, options, arguments)


def _run(given: Arguments | ReplayArguments, scale: float, options: int, arguments: tuple) -> None:
    if given.q.is_cuda and is_for_nvidia():
        try:
            if launch.plan(type(given)).launch(*arguments):
                return
        except (TypeError, ValueError):
            pass  # what the plan does not take goes the long way, which says why, or copies
    check(given)
    if given.q.shape[0] == 0:
        return
    if given.q.device.type != "cpu":
        launch.launch(given, scale, bool(options))
    elif isinstance(given, Arguments):
        _on_cpu(given, scale, bool(options))
    else:
        _replay_on_cpu(given, scale, bool(options))


def _fake(*arguments) -> None:
    *tensors, _, _, out, new_state = arguments
    check(Arguments(*tensors, out, new_state))


def _fake_in_place(*arguments) -> None:
    _fake(*arguments, None)


def _fake_replay(*arguments) -> None:
    *tensors, _, _, out = arguments
    check(ReplayArguments(*tensors, out))


for _op, _implementation, _of_shape in (
    (f"{_NAME}_out", _out, _fake),
    (f"{_NAME}_", _in_place, _fake_in_place),
    (_REPLAY, _replay, _fake_replay),
):
    torch.library.impl(f"tilelang_ext::{_op}", "CompositeExplicitAutograd", _implementation)
    torch.library.register_fake(f"tilelang_ext::{_op}", _of_shape)

_out_op = getattr(torch.ops.tilelang_ext, f"{_NAME}_out").default
_in_place_op = getattr(torch.ops.tilelang_ext, f"{_NAME}_").default
_replay_op = getattr(torch.ops.tilelang_ext, _REPLAY).default


def _sequences(given: Arguments | ReplayArguments) -> tuple[Tensor, Tensor]:
    """Return the sequences that have a slot, and their slots; write the results of the others."""
    slots = torch.arange(len(given.q)) if given.state_indices is None else given.state_indices.long()
    given.out.zero_()
    given.out[slots >= len(given.state)] = torch.nan
    here = torch.nonzero((slots >= 0) & (slots < len(given.state))).flatten()
    return here, slots[here]


def _on_cpu(given: Arguments, scale: float, l2_norm: bool) -> None:
    """Compute by the reference."""
    target = given.state if given.new_state is None else given.new_state
    here, slots = _sequences(given)
    q, k, v, a, b = (tensor[here] for tensor in (given.q, given.k, given.v, given.a, given.b))
    state = given.state[slots]
    out, states = reference.gated_delta(q, k, v, state, given.A_log, given.dt_bias, a, b, scale, l2_norm=l2_norm)
    given.out[here] = out.to(given.out.dtype)
    if target.dim() == 5:
        target[here] = states.to(target.dtype)
        return
    tokens = q.shape[1]
    kept = torch.full((len(here),), tokens) if given.num_accepted is None else given.num_accepted[here].clamp(0, tokens).long()
    states = torch.cat([state.double()[:, None], states], 1)
    target[slots] = states[torch.arange(len(here)), kept].to(target.dtype)


def _replay_on_cpu(given: ReplayArguments, scale: float, l2_norm: bool) -> None:
    """Compute by the reference from the state as its window restores it, and read r off the states."""
    tokens, entries = given.q.shape[1], given.k_ring.shape[1]
    per_qk = given.v.shape[2] // given.q.shape[2]
    here, slots = _sequences(given)
    for i, slot in zip(here.tolist(), slots.tolist(), strict=True):
        first, count = given.windows[i].tolist()
        window = [(first + n) % entries for n in range(count)]
        decay = given.decay_ring[slot, window].double()
        decay = decay[..., None] if decay.dim() == 2 else decay  # (entries, heads, 1 or K)
        total = decay[-1] if count else torch.zeros_like(given.decay_ring[slot, 0]).double().view(given.v.shape[2], -1)
        keys = given.k_ring[slot, window].double().repeat_interleave(per_qk, 1) * torch.exp(total - decay)
        state = torch.exp(total)[:, None] * given.state[slot].double()
        state = state + torch.einsum("nhv,nhk->hvk", given.r_ring[slot, window].double(), keys)
        if count + tokens > entries - tokens:
            given.state[slot] = state.to(given.state.dtype)
            total = torch.zeros_like(total)
        for t in range(tokens):
            of_token = (tensor[i : i + 1, t] for tensor in (given.q, given.k, given.v, given.a, given.b))
            out, after, added = reference.gated_delta_token(
                *of_token, state[None], given.A_log, given.dt_bias, scale, l2_norm=l2_norm
            )
            state, total = after[0], total + added.log_g[0].view(total.shape)
            given.out[i, t] = out[0].to(given.out.dtype)
            entry = (first + count + t) % entries
            given.k_ring[slot, entry] = added.k[0].to(given.k_ring.dtype)
            given.r_ring[slot, entry] = added.r[0].float()
            given.decay_ring[slot, entry] = total.view(given.decay_ring.shape[2:]).float()

"""The checks of `gated_delta_decode` and `gated_delta_replay`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tilelang_ext.kernels.gated_delta.problem import V_UNIT

MAX_TOKENS = 8  # of a sequence in one call: their q, k and v stay in registers
DTYPES = (torch.bfloat16, torch.float16)
STATE_DTYPES = (torch.float32, torch.bfloat16)
_K_SIZES = (32, 64, 128, 256, 512)  # 1 to 16 neighbouring channels per lane, loaded together


class Arguments(NamedTuple):
    """The tensors of a call, in the order of the torch operator. `new_state` is None where the state is updated in place."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor
    A_log: Tensor
    dt_bias: Tensor
    a: Tensor
    b: Tensor
    state_indices: Tensor | None
    num_accepted: Tensor | None
    out: Tensor
    new_state: Tensor | None


class ReplayArguments(NamedTuple):
    """The tensors of a call of `gated_delta_replay`, in the order of the torch operator."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: Tensor
    A_log: Tensor
    dt_bias: Tensor
    a: Tensor
    b: Tensor
    state_indices: Tensor | None
    windows: Tensor
    k_ring: Tensor
    r_ring: Tensor
    decay_ring: Tensor
    out: Tensor


def check(given: Arguments | ReplayArguments) -> None:
    """Raise TypeError for dtypes, ValueError for shapes, devices and memory that the operator does not take."""
    name_of_operator = "gated_delta_decode" if isinstance(given, Arguments) else "gated_delta_replay"
    try:
        _check_shapes(given)
        _check_dtypes(given)
        _check_memory(given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name_of_operator}: {error}") from None


def _check_memory(given: Arguments | ReplayArguments) -> None:
    for name, tensor in given._asdict().items():
        if tensor is not None and tensor.device != given.q.device:
            raise ValueError(f"{name} must be on the device of q, {given.q.device}; got {tensor.device}; move it")
    for name in ("state", "new_state", "out", "k_ring", "r_ring", "decay_ring"):
        tensor = getattr(given, name, None)
        if tensor is not None and tensor.numel() and not tensor[0].is_contiguous():
            raise ValueError(
                f"{name} must be contiguous but for its first dimension; got strides {tensor.stride()}; "
                "pass a contiguous tensor"
            )


def _check_shapes(given: Arguments | ReplayArguments) -> None:
    q, v, state = given.q, given.v, given.state
    for name, tensor, dimensions in (("q", q, "(batch, tokens, qk_heads, K)"), ("v", v, "(batch, tokens, heads, V)")):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, {dimensions}; got {tuple(tensor.shape)}; add the one of tokens")
    batch, tokens, qk_heads, K = q.shape
    heads, V = v.shape[2:]
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"tokens must be 1 to {MAX_TOKENS}; got {tokens}; call it once for each {MAX_TOKENS}")
    if qk_heads == 0 or heads % qk_heads:
        raise ValueError(
            f"heads of v must be a multiple of those of q; got {heads} and {qk_heads}; check the dimensions' order"
        )
    if K not in _K_SIZES:
        raise ValueError(f"K, the last dimension of q, must be one of {_K_SIZES}; got {K}; pad it with zeros")
    if V == 0 or V % V_UNIT:
        raise ValueError(f"V, the last dimension of v, must be a multiple of {V_UNIT}; got {V}; pad it")
    per_channel = given.a.dim() == 4
    of_gates = (heads, K) if per_channel else (heads,)
    wanted = {
        "k": (batch, tokens, qk_heads, K),
        "v": (batch, tokens, heads, V),
        "a": (batch, tokens, *of_gates),
        "b": (batch, tokens, heads),
        "A_log": (heads,),
        "dt_bias": of_gates,
        "state_indices": (batch,),
        "num_accepted": (batch,),
        "out": (batch, tokens, heads, V),
        "state": (batch if given.state_indices is None else state.shape[0], heads, V, K),
    }
    if isinstance(given, ReplayArguments):
        slots, ring = state.shape[0], given.k_ring.shape[1] if given.k_ring.dim() == 4 else 0
        if ring <= tokens:
            raise ValueError(f"rings must have more entries than there are tokens, {tokens}; got {ring}; make them longer")
        wanted["windows"] = (batch, 2)
        wanted["k_ring"], wanted["r_ring"] = (slots, ring, qk_heads, K), (slots, ring, heads, V)
        wanted["decay_ring"] = (slots, ring, *of_gates)
    new_state = getattr(given, "new_state", None)
    if new_state is not None:
        each_token = new_state.dim() == 5
        wanted["new_state"] = (batch, tokens, heads, V, K) if each_token else tuple(state.shape)
        if each_token and given.num_accepted is not None:
            raise ValueError("num_accepted must be None where new_state keeps every token's state; got both; pass one")
    for name, shape in wanted.items():
        tensor = getattr(given, name, None)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}; heads and sizes follow q and v")


def _check_dtypes(given: Arguments | ReplayArguments) -> None:
    if given.q.dtype not in DTYPES:
        raise TypeError(f"q must be bfloat16 or float16; got {given.q.dtype}; cast it")
    if given.state.dtype not in STATE_DTYPES:
        raise TypeError(f"state must be float32 or bfloat16; got {given.state.dtype}; cast it")
    wanted = {
        **dict.fromkeys(("k", "v", "a", "b", "out", "k_ring"), given.q.dtype),
        **dict.fromkeys(("A_log", "dt_bias", "r_ring", "decay_ring"), torch.float32),
        **dict.fromkeys(("state_indices", "num_accepted", "windows"), torch.int32),
        "new_state": given.state.dtype,
    }
    for name, dtype in wanted.items():
        tensor = getattr(given, name, None)
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}; got {tensor.dtype}; cast it")

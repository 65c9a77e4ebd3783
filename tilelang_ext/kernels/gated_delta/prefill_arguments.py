"""The checks of `gated_delta_prefill`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tilelang_ext.kernels.gated_delta.arguments import DTYPES, STATE_DTYPES

NAME = "gated_delta_prefill"
K_SIZES = (32, 64, 128)  # a chunk's q, k and a slice of the state lie in shared memory
V_UNIT = 16
MAX_EXTENT = 2**31 - 1  # elements of a tensor: kernels count in int32


class PrefillArguments(NamedTuple):
    """The tensors of a call, in the order of the torch operator. `final_state` is None where the state is updated in place."""

    q: Tensor
    k: Tensor
    v: Tensor
    A_log: Tensor
    dt_bias: Tensor
    a: Tensor
    b: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    out: Tensor
    final_state: Tensor | None

    @property
    def final(self) -> Tensor:
        """Where the states after the last tokens go."""
        return self.initial_state if self.final_state is None else self.final_state


def check(given: PrefillArguments) -> None:
    """Raise TypeError for dtypes, ValueError for shapes, devices and memory that the operator does not take."""
    try:
        _check_dtypes(given)
        _check_shapes(given)
        _check_memory(given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{NAME}: {error}") from None


def _check_dtypes(given: PrefillArguments) -> None:
    if given.q.dtype not in DTYPES:
        raise TypeError(f"q must be bfloat16 or float16; got {given.q.dtype}; cast it")
    for name in ("initial_state", "final_state"):
        tensor = getattr(given, name)
        if tensor is not None and tensor.dtype not in STATE_DTYPES:
            raise TypeError(f"{name} must be float32 or bfloat16; got {tensor.dtype}; cast it")
    wanted = {
        **dict.fromkeys(("k", "v", "a", "b", "out"), given.q.dtype),
        **dict.fromkeys(("A_log", "dt_bias"), torch.float32),
        "cu_seqlens": torch.int32,
    }
    if given.initial_state is not None:
        wanted["final_state"] = given.initial_state.dtype
    for name, dtype in wanted.items():
        tensor = getattr(given, name)
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}; got {tensor.dtype}; cast it")


def _check_shapes(given: PrefillArguments) -> None:
    q, v, cu = given.q, given.v, given.cu_seqlens
    leading = "(batch, tokens, " if cu is None else "(tokens, "
    for name, tensor, dimensions in (("q", q, f"{leading}qk_heads, K)"), ("v", v, f"{leading}heads, V)")):
        if tensor.dim() != (4 if cu is None else 3):
            raise ValueError(f"{name} must have dimensions {dimensions}; got {tuple(tensor.shape)}; reshape it")
    if cu is not None and (cu.dim() != 1 or len(cu) < 1):
        raise ValueError(f"cu_seqlens must have shape (sequences + 1,); got {tuple(cu.shape)}; begin it with 0")
    *tokens, qk_heads, K = q.shape
    heads, V = v.shape[-2:]
    if qk_heads == 0 or heads % qk_heads:
        raise ValueError(
            f"heads of v must be a multiple of those of q; got {heads} and {qk_heads}; check the dimensions' order"
        )
    if given.dt_bias.dim() == 2 or given.a.dim() == len(tokens) + 2:
        raise ValueError(
            "a and dt_bias must have a gate per head; got one per channel of K; call gated_delta_decode for each 8 tokens"
        )
    if K not in K_SIZES:
        raise ValueError(f"K, the last dimension of q, must be one of {K_SIZES}; got {K}; pad it with zeros")
    if V == 0 or V % V_UNIT:
        raise ValueError(f"V, the last dimension of v, must be a multiple of {V_UNIT}; got {V}; pad it")
    states = (len(q) if cu is None else len(cu) - 1, heads, V, K)
    wanted = {
        "k": (*tokens, qk_heads, K),
        **dict.fromkeys(("v", "out"), (*tokens, heads, V)),
        **dict.fromkeys(("a", "b"), (*tokens, heads)),
        **dict.fromkeys(("A_log", "dt_bias"), (heads,)),
        **dict.fromkeys(("initial_state", "final_state"), states),
    }
    for name, shape in wanted.items():
        tensor = getattr(given, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}; heads and sizes follow q and v")


def _check_memory(given: PrefillArguments) -> None:
    for name, tensor in given._asdict().items():
        if tensor is not None and tensor.device != given.q.device:
            raise ValueError(f"{name} must be on the device of q, {given.q.device}; got {tensor.device}; move it")
    results = ["out", "final_state"] if given.final_state is not None else ["out", "initial_state"]
    for name in results:
        tensor = getattr(given, name)
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous; got strides {tensor.stride()}; pass a contiguous tensor")

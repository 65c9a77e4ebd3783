"""Operators without a gradient say so when a backward pass reaches them, instead of leaving a term out of it."""

from __future__ import annotations

import torch
from torch import Tensor


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name: str, out: Tensor, *inputs: Tensor) -> Tensor:
        ctx.name = name
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx, _):
        raise NotImplementedError(
            f"{ctx.name}: has no gradient; got a backward pass through its result; call it under torch.no_grad(), or detach "
            "the result"
        )


def without_gradient(name: str, out: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return `out`, computed from `inputs` by the operator called `name`: a backward pass that reaches it raises
    NotImplementedError. Costs nothing where gradients are off or no input requires one.
    """
    if torch.is_grad_enabled():
        required = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        if required:
            return _NoGradient.apply(name, out, *required)
    return out

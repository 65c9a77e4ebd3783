"""Inputs of the gated delta rule, with another gate for every head, token and sequence, and poisoned results."""

import torch

from tilelang_ext import reference


def inputs(
    batch, tokens, qk_heads, heads, K, V, *, dtype=torch.bfloat16, state_dtype=torch.float32, per_channel=False, slots=None
):
    """Return what `gated_delta_decode` takes, by name; keys have a norm near 1, as models give them."""

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(dtype)

    gates = (heads, K) if per_channel else (heads,)
    return {
        "q": normal(batch, tokens, qk_heads, K),
        "k": normal(batch, tokens, qk_heads, K, scale=K**-0.5),
        "v": normal(batch, tokens, heads, V),
        "state": torch.randn(slots or batch, heads, V, K).to(state_dtype),
        "A_log": torch.randn(heads),
        "dt_bias": torch.randn(*gates) * 2,
        "a": normal(batch, tokens, *gates, scale=10.0),
        "b": normal(batch, tokens, heads, scale=3.0),
    }


def poisoned(given, *, each_token=False):
    """Return out and new_state, full of NaN."""
    batch, tokens = given["q"].shape[:2]
    shape = (batch, tokens, *given["state"].shape[1:]) if each_token else given["state"].shape
    out = torch.full(given["v"].shape, torch.nan, dtype=given["v"].dtype)
    return out, torch.full(shape, torch.nan, dtype=given["state"].dtype)


def expected(given, scale, *, l2_norm=False, slots=None, accepted=None):
    """Return the reference's out, and the state after each token or after the accepted ones, all in float64."""
    of_sequences = dict(given)
    if slots is not None:
        of_sequences["state"] = given["state"][slots]
    out, states = reference.gated_delta(**of_sequences, scale=scale, l2_norm=l2_norm)
    if accepted is None:
        return out, states
    states = torch.cat([of_sequences["state"].double()[:, None], states], 1)
    return out, states[torch.arange(len(states)), torch.as_tensor(accepted)]

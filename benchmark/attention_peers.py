"""FlashAttention-3, as vLLM builds it, beside which attention is timed."""

from __future__ import annotations

import torch


def flash_attention_3_arguments(
    q, k, v, out, *, causal, window=None, sinks=None, seqused_k=None, num_splits=1, scales=(None, None, None)
) -> tuple:
    """Return the arguments of vLLM's operator, by the names of its schema; raises RuntimeError where it is not loaded.

    Its build serves sequences of several lengths only, so `seqused_k` (batch,) names them.
    """
    if not hasattr(torch.ops._vllm_fa3_C, "fwd"):
        raise RuntimeError("no --fa3")
    left, right = (window - 1, 0) if window else (-1, 0 if causal else -1)
    given = {
        "q": q, "k": k, "v": v, "out": out, "seqused_k": seqused_k, "softmax_scale": q.shape[-1] ** -0.5, "is_causal": causal,
        "window_size_left": left, "window_size_right": right, "softcap": 0.0, "is_rotary_interleaved": True,
        "num_splits": num_splits, "sm_margin": 0, "s_aux": None if sinks is None else sinks.bfloat16(), "cp_world_size": 1,
        "cp_rank": 0, **dict(zip(("q_descale", "k_descale", "v_descale"), scales, strict=True)),
    }  # fmt: skip
    schema = torch.ops._vllm_fa3_C.fwd.default._schema
    return tuple(given.get(argument.name) for argument in schema.arguments)

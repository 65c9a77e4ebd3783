"""The truth in plain torch float64: what every kernel is measured against. Short and slow on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from tilelang_ext.formats import E2M1, E4M3, BlockScaledLayout, FloatFormat, format_of
from tilelang_ext.quantization import decode, expand_scale, quantize, unpack

Tensor = torch.Tensor

TOKEN_BITS = 24  # of a sorted token id; the slot lies above


def dequantize(
    codes: Tensor, scale: Tensor, format: FloatFormat, layout: BlockScaledLayout, *, zero_sentinel: bool = False
) -> Tensor:
    """value[i, k] = decode(codes[i, k]) * scale[i // rows, k // k of a block], float64, exact.

    codes: (..., rows, K) of an 8-bit format, or packed E2M1 (..., rows, K / 2); scale: as `quantization.expand_scale` takes it.
    """
    values = decode(unpack(codes) if format is E2M1 else codes, format, dtype=torch.float64)
    return values * expand_scale(scale, layout, values.shape, zero_sentinel=zero_sentinel)


def scaled_matmul(
    A: Tensor,  # (M, K) float8
    scale_a: Tensor,
    B: Tensor,  # (N, K) float8
    scale_b: Tensor,
    layout_a: BlockScaledLayout,
    layout_b: BlockScaledLayout | None = None,  # as layout_a
    C: Tensor | None = None,  # (M, N)
) -> Tensor:
    """C[i, j] + sum over k of (scale_a A)[i, k] * (scale_b B)[j, k], float64 (M, N); what C held is never scaled.

    A and B may have different FP8 dtypes; the layouts of T.fp8_scaled_matmul: per tensor, per row, (1, 128) with
    (128, 128), e8m0_k32. A transposed operand is passed as its `.T`.
    """
    if A.ndim != 2 or B.ndim != 2 or A.shape[1] != B.shape[1]:
        raise ValueError(f"A, B: must be (M, K) and (N, K); got {tuple(A.shape)} and {tuple(B.shape)}; transpose one")
    a = dequantize(A, scale_a, format_of(A.dtype), layout_a)
    b = dequantize(B, scale_b, format_of(B.dtype), layout_b or layout_a)
    product = a @ b.T
    return product if C is None else C.double() + product


def matmul(
    a: Tensor,  # (M, K)
    b: Tensor,  # (K, N)
    row_scale: Tensor | None = None,  # (M,)
    column_scale: Tensor | None = None,  # (N,)
    bias: Tensor | None = None,  # (N,)
    activation: str | None = None,  # relu, gelu, gelu_tanh or silu
    residual: Tensor | None = None,  # (M, N)
) -> Tensor:
    """activation(row_scale[i] * column_scale[j] * (a @ b)[i, j] + bias[j]) + residual[i, j], float64 (M, N)."""
    x = a.double() @ b.double()
    x = x if row_scale is None else x * row_scale.double()[:, None]
    x = x if column_scale is None else x * column_scale.double()
    x = x if bias is None else x + bias.double()
    F = torch.nn.functional
    functions = {None: lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
    x = F.gelu(x, approximate="tanh") if activation == "gelu_tanh" else functions[activation](x)
    return x if residual is None else x + residual.double()


def mxfp4_matmul(A: Tensor, W_packed: Tensor, scale_w: Tensor) -> Tensor:
    """sum over k of A[i, k] * W[j, k], float64 (M, N): A (M, K) of any float dtype, W packed (N, K/2), scale_w (N, K/32).

    For a8w4 and a4w4 A is the dequantised activation: `dequantize(...)` or `requantize(x, "mxfp8")`.
    """
    return A.double() @ dequantize(W_packed, scale_w, E2M1, BlockScaledLayout.e8m0_k32()).T


def requantize(values: Tensor, kind: str) -> Tensor:
    """What a reader sees of `values` (..., K) stored as `kind`, float64.

    `kind`: bfloat16, float16, mxfp8, mxfp4 (per 32 of K), or fp8 (E4M3 with a float32 scale a row).
    """
    mx = BlockScaledLayout.e8m0_k32()
    blocks = {"mxfp8": (E4M3, mx), "mxfp4": (E2M1, mx), "fp8": (E4M3, BlockScaledLayout.per_row())}
    if kind in blocks:
        return dequantize(*quantize(values, *blocks[kind]), *blocks[kind])
    if kind in ("bfloat16", "float16"):
        return values.to(getattr(torch, kind)).double()
    raise ValueError(f"kind: must be bfloat16, float16, fp8, mxfp8 or mxfp4; got {kind!r}; pick one")


def swiglu(gate_up: Tensor, alpha: float = 1.702, limit: float = 7.0, gate: str = "interleaved") -> Tensor:
    """gpt-oss: g * sigmoid(alpha * g) * (u + 1), g = min(g, limit), u = clamp(u, -limit, limit); (..., 2I) to (..., I)."""
    g, u = _gate_and_up(gate_up, gate)
    g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return g * torch.sigmoid(alpha * g) * (u + 1)


def silu_mul(gate_up: Tensor, gate: str = "separated") -> Tensor:
    """g * sigmoid(g) * u; (..., 2I) -> (..., I) float64."""
    g, u = _gate_and_up(gate_up, gate)
    return g * torch.sigmoid(g) * u


def clamped_silu(gate_up: Tensor, limit: float = 7.0, gate: str = "separated") -> Tensor:
    """g * sigmoid(g) * u, g = min(g, limit), u = clamp(u, -limit, limit); (..., 2I) -> (..., I) float64."""
    g, u = _gate_and_up(gate_up, gate)
    g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return g * torch.sigmoid(g) * u


def custom_activation(gate_up: Tensor, function: Callable[[Tensor, Tensor], Tensor], gate: str = "separated") -> Tensor:
    """function(g, u) of a user; (..., 2I) -> (..., I) float64."""
    return function(*_gate_and_up(gate_up, gate))


def _gate_and_up(gate_up: Tensor, gate: str) -> tuple[Tensor, Tensor]:
    if gate == "interleaved":
        return gate_up[..., 0::2].double(), gate_up[..., 1::2].double()
    if gate == "separated":
        return gate_up.double().chunk(2, dim=-1)
    raise ValueError(f"gate: must be 'interleaved' or 'separated'; got {gate!r}; gpt-oss is interleaved")


def moe(
    x: Tensor,  # (tokens, H)
    topk_ids: Tensor,  # (tokens, top_k) integers
    topk_weights: Tensor,  # (tokens, top_k)
    w13: Tensor,  # (E, 2I, H) dequantised; E local experts
    w2: Tensor,  # (E, H, I) dequantised
    *,
    activation: Callable[[Tensor], Tensor] = swiglu,
    bias13: Tensor | None = None,  # (E, 2I)
    bias2: Tensor | None = None,  # (E, H)
    between: str | None = None,  # how the first stage's output is stored: a kind of `requantize`; None: exactly
    expert_mask: Tensor | None = None,  # (all experts,) true where the expert is local
) -> Tensor:
    """y[t] = sum over slots s of topk_weights[t, s] * (w2[e] . act(w13[e] . x[t] + bias13[e]) + bias2[e]), e = topk_ids[t, s].

    float64 (tokens, H). Experts elsewhere (mask false) and ids out of range add nothing.
    """
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for local, expert in enumerate(_local_experts(w13.shape[0], expert_mask)):
        token, slot = torch.where(topk_ids == expert)
        hidden = x[token].double() @ w13[local].double().T
        hidden = activation(hidden if bias13 is None else hidden + bias13[local].double())
        if between is not None:
            hidden = requantize(hidden, between)
        out = hidden @ w2[local].double().T
        out = out if bias2 is None else out + bias2[local].double()
        y.index_add_(0, token, out * topk_weights[token, slot].double()[:, None])
    return y


class SortedTokens(NamedTuple):
    """Rows of the first GEMM, expert after expert, each expert padded to whole blocks of block_m."""

    token_ids: Tensor  # int32 (capacity,): slot << 24 | token; padding top_k << 24 | tokens
    weights: Tensor  # float32 (capacity,), 0 in padding
    expert_ids: Tensor  # int32 (capacity / block_m,): local expert of each block, -1 after the last
    num_valid: Tensor  # int32 (1,): rows in use, a multiple of block_m


def moe_sort(
    topk_ids: Tensor, topk_weights: Tensor, num_experts: int, block_m: int, expert_mask: Tensor | None = None
) -> SortedTokens:
    """Sort (tokens, top_k) by expert into blocks of block_m rows of one expert each; the contract of aiter, on the CPU.

    capacity = tokens * top_k + num_experts * block_m - top_k, rounded up to blocks. `num_experts` counts all experts;
    `expert_mask` (num_experts,) keeps the local ones, numbered in order. An expert without tokens has no block; ids out of
    range are dropped. Order inside an expert is free (here: by token): compare sets.
    """
    tokens, top_k = topk_ids.shape
    if tokens >= 1 << TOKEN_BITS or top_k > min(127, num_experts):
        raise ValueError(
            f"topk_ids: must have fewer than 2^24 tokens and at most 127 slots and {num_experts} experts; "
            f"got (tokens, top_k) = {tuple(topk_ids.shape)}; split the batch"
        )
    blocks = -(-(tokens * top_k + num_experts * block_m - top_k) // block_m)
    token_ids = torch.full((blocks, block_m), top_k << TOKEN_BITS | tokens, dtype=torch.int32)
    weights = torch.zeros(blocks, block_m)
    expert_ids = torch.full((blocks,), -1, dtype=torch.int32)
    used = 0
    for local, expert in enumerate(_local_experts(num_experts, expert_mask)):
        token, slot = (index.cpu() for index in torch.where(topk_ids == expert))
        end = used + -(-len(token) // block_m)
        token_ids[used:end].view(-1)[: len(token)] = (slot << TOKEN_BITS | token).int()
        weights[used:end].view(-1)[: len(token)] = topk_weights.cpu()[token, slot].float()
        expert_ids[used:end] = local
        used = end
    return SortedTokens(token_ids.view(-1), weights.view(-1), expert_ids, torch.tensor([used * block_m], dtype=torch.int32))


def _local_experts(num_experts: int, expert_mask: Tensor | None) -> list[int]:
    return list(range(num_experts)) if expert_mask is None else expert_mask.nonzero().flatten().tolist()


def gated_delta(
    q: Tensor,  # (batch, tokens, qk_heads, K)
    k: Tensor,
    v: Tensor,  # (batch, tokens, heads, V)
    state: Tensor,  # (batch, heads, V, K)
    A_log: Tensor,  # (heads,)
    dt_bias: Tensor,  # (heads,), or (heads, K)
    a: Tensor,  # (batch, tokens, heads), or (batch, tokens, heads, K)
    b: Tensor,  # (batch, tokens, heads)
    scale: float,
    *,
    l2_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule, token by token: out (batch, tokens, heads, V), and the state after each token, float64
    (batch, tokens, heads, V, K).

    g = exp(-exp(A_log) softplus(a + dt_bias)); S = g S; S = S + sigmoid(b) (v - S k) k^T; out = scale S q. Value head h has q
    and k of head h // (heads / qk_heads); with `l2_norm` they are divided by sqrt(their squares' sum + 1e-6).
    """
    out, states, S = [], [], state.double()
    for t in range(q.shape[1]):
        of_token = (x[:, t] for x in (q, k, v, a, b))
        o, S, _ = gated_delta_token(*of_token, S, A_log, dt_bias, scale, l2_norm=l2_norm)
        out.append(o)
        states.append(S)
    return torch.stack(out, 1), torch.stack(states, 1)


class GatedDeltaEntry(NamedTuple):
    """What one token adds to the state: S = g S + r k^T, with log_g, float64."""

    k: Tensor  # (batch, qk_heads, K), divided by its norm if asked
    r: Tensor  # (batch, heads, V)
    log_g: Tensor  # (batch, heads), or (batch, heads, K)


def gated_delta_token(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, A_log: Tensor, dt_bias: Tensor, scale: float,
    *, l2_norm: bool = False,
) -> tuple[Tensor, Tensor, GatedDeltaEntry]:  # fmt: skip
    """One token of `gated_delta`: out (batch, heads, V), the state after it, and what it added."""
    rate = A_log.double().exp().view(*A_log.shape, *[1] * (dt_bias.dim() - 1))
    log_g = -rate * torch.nn.functional.softplus(a.double() + dt_bias.double())
    g = torch.exp(log_g)
    q, k = (_divided_by_norm(x.double()) if l2_norm else x.double() for x in (q, k))
    query, key = (x.repeat_interleave(v.shape[1] // x.shape[1], dim=1) for x in (q, k))
    S = state * (g[:, :, None] if g.dim() == 3 else g[:, :, None, None])
    r = torch.sigmoid(b.double())[..., None] * (v.double() - torch.einsum("bhvk,bhk->bhv", S, key))
    S = S + r[..., None] * key[:, :, None, :]
    return scale * torch.einsum("bhvk,bhk->bhv", S, query), S, GatedDeltaEntry(k, r, log_g)


def attention(
    q: Tensor,  # (batch, S_q, heads, D)
    k: Tensor,  # (batch, S_k, kv_heads, D)
    v: Tensor,  # the same
    scale: float,
    causal: bool = False,
    window: int | None = None,
    sinks: Tensor | None = None,  # (heads,)
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v (batch, S_q, heads, D) and the natural logarithm of its sums (batch, heads, S_q), float64.

    Query i stands at position i + S_k - S_q of the keys. A query that sees no key gives 0 and -infinity. A sink adds e^sink to
    the sum, and no value.
    """
    S_q, S_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k) * scale
    distance = torch.arange(S_q)[:, None] + S_k - S_q - torch.arange(S_k)  # from a key to a query after it
    if causal or window is not None:
        scores = scores.masked_fill(distance < 0, -torch.inf)
    if window is not None:
        scores = scores.masked_fill(distance >= window, -torch.inf)
    lse = torch.logsumexp(scores, -1) if S_k else scores.new_full(scores.shape[:-1], -torch.inf)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.double()[:, None])
    seen = torch.where(scores == -torch.inf, 0.0, torch.exp(scores - lse[..., None]))
    return torch.einsum("bhij,bjhd->bihd", seen, v), lse


def merge_attention(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: o (..., S_q, heads, D), lse (..., heads, S_q), float64."""
    total = torch.logaddexp(lse.double(), other_lse.double())
    result = torch.zeros_like(o, dtype=torch.float64)
    for part, part_lse in ((o, lse), (other_o, other_lse)):
        weight = torch.where(part_lse == -torch.inf, 0.0, torch.exp(part_lse.double() - total)).transpose(-1, -2)[..., None]
        result += torch.where(weight == 0, 0.0, weight * part.double())
    return result, total


def _divided_by_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

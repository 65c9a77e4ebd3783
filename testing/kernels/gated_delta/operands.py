"""Inputs of the gated delta rule, with another gate for every head, token and sequence, and poisoned results."""

import itertools

import torch
from numeric import assert_close

from tilelang_ext import reference
from tilelang_ext.kernels.gated_delta.prefill_problem import PrefillProblem


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


# The chunks' T, A and R, and the state that MMAs read, are rounded to q's dtype; flash-linear-attention's are too.
PREFILL_TOLERANCE = {
    "bfloat16": {"max_error": 4e-2, "rms_error": 5e-3},
    "float16": {"max_error": 5e-3, "rms_error": 7e-4},
}
PREFILL_SCALE = 0.3


def prefill_problem(arch, qk_heads, heads, K, V, dtype=torch.bfloat16, state_dtype=torch.float32, **options):
    """What the kernels of `gated_delta_prefill` are compiled for: on Hopper, on AMD, or on Metal where arch is empty."""
    kind = {"sm": "cuda", "gf": "hip", "": "metal"}[arch[:2]]
    dtypes = (str(each).removeprefix("torch.") for each in (dtype, state_dtype))
    return PrefillProblem(kind, arch, 132, qk_heads, heads, K, V, *dtypes, PREFILL_SCALE, **options)


class Prefill:
    """The tensors of a launch of both kernels, by name: outputs are NaN, and so are k and v of what belongs to no sequence.

    `sizes` are a batch and its tokens, or the tokens of each sequence.
    """

    SOLVE = ("q", "k", "A_log", "dt_bias", "a", "b", "cu_seqlens", "solution", "scores", "factors")
    SCAN = ("q", "k", "v", "solution", "scores", "factors", "cu_seqlens", "initial", "out", "final")

    def __init__(self, of, sizes, seed=0):
        torch.manual_seed(seed)
        dtype, state_dtype = getattr(torch, of.dtype), getattr(torch, of.state_dtype)
        lengths = list(sizes) if of.has_lengths else [sizes[1]] * sizes[0]
        batch, tokens = (1, sum(lengths) + 3) if of.has_lengths else sizes
        self.of, self.lengths = of, lengths
        given = inputs(batch, tokens, of.qk_heads, of.heads, of.K, of.V, dtype=dtype)
        given["a"][:, ::2] = given["a"][:, ::2] / 8  # gates that forget slowly, too
        given["a"][:, 5::16] = 200  # and a token that forgets all before it
        given["k"][:, 8:12] = given["k"][:, 8:9]  # keys that are alike
        sequences, C = len(lengths), of.chunk
        tiles = (tokens // C + sequences if of.has_lengths else batch * -(-tokens // C)) * of.heads

        def nan(*shape, dtype=dtype):
            return torch.full(shape, torch.nan, dtype=dtype)

        initial = torch.randn(sequences, of.heads, of.V, of.K).to(state_dtype)
        if of.has_lengths:
            for name in "kv":  # not q, of which results would be NaN too, as if nothing had been written
                given[name][:, -3:] = torch.nan
        self.tensors = given | {
            "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
            "initial": initial if of.has_initial else initial[:1] * torch.nan,
            "solution": nan(tiles, C, C),
            "scores": nan(tiles, C, C),
            "factors": nan(tiles, 4, C, dtype=torch.float32),
            "out": nan(batch, tokens, of.heads, of.V),
            "final": nan(*initial.shape, dtype=state_dtype),
        }

    def check(self) -> None:
        """Compare results with the recurrence, sequence by sequence; nothing is written past the last one."""
        of, tensors, first = self.of, self.tensors, 0
        for i, length in enumerate(self.lengths):
            batch, at = (0, slice(first, first + length)) if of.has_lengths else (i, slice(None))
            state = tensors["initial"][i : i + 1] if of.has_initial else torch.zeros(1, of.heads, of.V, of.K)
            first += length
            if length == 0:
                assert torch.equal(tensors["final"][i : i + 1], state.to(tensors["final"].dtype))
                continue
            q, k, v, a, b = (tensors[name][batch : batch + 1, at] for name in "qkvab")
            gates = tensors["A_log"], tensors["dt_bias"], a, b
            wanted, states = reference.gated_delta(q, k, v, state, *gates, of.scale, l2_norm=of.l2_norm)
            assert_close(tensors["out"][batch : batch + 1, at], wanted, dtype=of.dtype, **PREFILL_TOLERANCE[of.dtype])
            of_state = PREFILL_TOLERANCE["bfloat16" if "bfloat16" in (of.dtype, of.state_dtype) else "float16"]
            assert_close(tensors["final"][i : i + 1], states[:, -1], dtype=of.state_dtype, **of_state)
        if of.has_lengths:
            assert tensors["out"][:, first:].isnan().all()

    def solve(self) -> None:
        """Write T, A and the factors, as `solve_chunks` does, from float64."""
        of, tensors = self.of, self.tensors
        C, per_qk = of.chunk, of.heads // of.qk_heads
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        for i, length in enumerate(self.lengths):
            begin = ends[i] - length
            batch, first, slot = (0, begin, begin // C + i) if of.has_lengths else (i, 0, i * -(-length // C))
            for chunk, head in itertools.product(range(-(-length // C)), range(of.heads)):
                n, at = min(C, length - chunk * C), first + chunk * C
                q, k = (tensors[name][batch, at : at + n, head // per_qk].double() for name in "qk")
                a, b = (tensors[name][batch, at : at + n, head].double() for name in "ab")
                x = torch.nn.functional.softplus(a + tensors["dt_bias"][head].double())
                G = (-x * tensors["A_log"][head].double().exp()).cumsum(0)
                norms = [torch.rsqrt(y.square().sum(1) + 1e-6) if of.l2_norm else torch.ones(n).double() for y in (q, k)]
                q, k = q * norms[0][:, None], k * norms[1][:, None]
                decay = torch.exp(G[:, None] - G).tril()
                beta = torch.sigmoid(b)
                L = (beta[:, None] * decay * (k @ k.T)).tril(-1)
                tile = (slot + chunk) * of.heads + head
                for name in ("solution", "scores", "factors"):
                    tensors[name][tile] = 0
                tensors["solution"][tile, :n, :n] = torch.linalg.inv(torch.eye(n) + L) * beta
                tensors["scores"][tile, :n, :n] = of.scale * decay * (q @ k.T)
                total, last = G.exp(), G[-1]
                tensors["factors"][tile, 0, :n] = total * norms[1]
                tensors["factors"][tile, 1, :n] = torch.exp(last - G) * norms[1]
                tensors["factors"][tile, 2, :n] = of.scale * total * norms[0]
                tensors["factors"][tile, 3] = last.exp()

"""`gated_delta_prefill` beside the chunked forward pass of flash-linear-attention.

    python benchmark/bench_gated_delta_prefill.py --csv prefill.csv --plot prefill.png    # on an NVIDIA GPU
    python benchmark/bench_gated_delta_prefill.py --batch 1 8 --heads 16/32 --tokens 32768 --providers ours

bfloat16, heads of 128 x 128, states from zeros, final states in float32; `--heads` are heads of q and k, and of v. Ours
computes the gates, which flash-linear-attention gets as they come out of a kernel before, outside the time. A head of the first
and one of the last sequence are checked against the recurrence in float64 before anything is timed.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), str(ROOT / "testing")]

from harness import (  # noqa: E402
    METHOD,
    Column,
    Provider,
    cache_bytes,
    choose,
    describe,
    find_device,
    options,
    plot,
    progress,
    rotation,
    show,
    time_cuda_in_turn,
    write_csv,
)
from numeric import Error, assert_close  # noqa: E402

from tilelang_ext import gated_delta_prefill, reference  # noqa: E402

K, V = 128, 128
SCALE = K**-0.5
CHUNK = 64
BANDWIDTH = 4.25e12  # bytes per second of an H200
# Of a token and head: k and q once per kernel, v and out once, T, A and the factors written and read
BYTES = 2 * (2 * 2 * K + 2 * V) + 2 * (2 * 2 * CHUNK + 4 * 4)
TIMES = (
    Column("case", "batch x tokens, heads"),
    Column("provider", "provider"),
    Column("us", "us", ",.1f"),
    Column("floor", "bytes of ours, us", ",.1f"),
    Column("speed", "speed / FLA's", ".2f"),
    Column("max_error", "max error", ".1e"),
)


class Inputs:
    """What one call takes, and its results, poisoned."""

    def __init__(self, batch: int, tokens: int, qk_heads: int, heads: int):
        def normal(*shape, scale=1.0):
            return (torch.randn(batch, tokens, *shape, device="cuda") * scale).bfloat16()

        self.q, self.k, self.v = normal(qk_heads, K), normal(qk_heads, K, scale=K**-0.5), normal(heads, V)
        self.A_log, self.dt_bias = torch.randn(heads, device="cuda"), torch.randn(heads, device="cuda") * 2
        self.a, self.b = normal(heads, scale=2.0), normal(heads)
        self.out = torch.full_like(self.v, torch.nan)
        self.final = torch.full((batch, heads, V, K), torch.nan, device="cuda")

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.q, self.k, self.v, self.out))

    @property
    def tensors(self) -> tuple:
        return self.q, self.k, self.v, self.A_log, self.dt_bias, self.a, self.b


def ours(inputs: Inputs) -> Callable:
    """Return a call that returns out and the states (V, K)."""
    return partial(gated_delta_prefill, *inputs.tensors, out=inputs.out, final_state=inputs.final)


def fla(inputs: Inputs) -> Callable:
    """Its Triton kernels alone; it has states (K, V), and v's heads of q and k as ours."""
    os.environ["FLA_TILELANG"] = "0"  # else it takes kernels of tilelang's, where that is installed
    chunked = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    gate = -torch.exp(inputs.A_log) * torch.nn.functional.softplus(inputs.a.float() + inputs.dt_bias)
    beta = inputs.b.sigmoid()

    @torch.no_grad()
    def call():
        out, state = chunked(inputs.q, inputs.k, inputs.v, g=gate, beta=beta, scale=SCALE, output_final_state=True)
        return out, state.transpose(2, 3)

    return call


PROVIDERS = [
    Provider("ours", "tilelang_ext.gated_delta_prefill", ("cuda",), ours),
    Provider("fla", "flash-linear-attention, chunk_gated_delta_rule", ("cuda",), fla),
]


def expected(inputs: Inputs, places: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the results (places, tokens, V) at some (sequence, head) by the recurrence, and the last states, in float64."""
    per_qk = inputs.v.shape[2] // inputs.q.shape[2]
    # One sequence, of which each place is a head; on the CPU, which has no launches to wait for.
    q, k = (torch.stack([x[batch, :, head // per_qk] for batch, head in places], 1)[None].cpu() for x in (inputs.q, inputs.k))
    v, a, b = (
        torch.stack([x[batch, :, head] for batch, head in places], 1)[None].cpu() for x in (inputs.v, inputs.a, inputs.b)
    )
    gates = [torch.stack([x[head] for _, head in places]).cpu() for x in (inputs.A_log, inputs.dt_bias)]
    S, out = torch.zeros(1, len(places), V, K, dtype=torch.float64), []
    for t in range(q.shape[1]):
        o, S, _ = reference.gated_delta_token(*(x[:, t] for x in (q, k, v, a, b)), S, *gates, SCALE)
        out.append(o[0])
    return torch.stack(out, 1), S[0]


def check(places: list, wanted: tuple, results: tuple) -> Error:
    """Compare what a provider returned with what is expected at some (sequence, head); return the error of out."""
    out = torch.stack([results[0][batch, :, head] for batch, head in places])
    states = torch.stack([results[1][batch, head] for batch, head in places])
    limits = {"max_error": 5e-2, "rms_error": 5e-3}  # as the tests', but for the largest of a million elements: 4.6e-2 was seen
    assert_close(states, wanted[1], dtype="float32", **limits)
    return assert_close(out, wanted[0], dtype="bfloat16", **limits)


def measure(sizes: tuple[int, int, int, int], providers: list[Provider], seed: int) -> list[dict]:
    """Check, then time, all on the same inputs in turn."""
    torch.manual_seed(seed)
    batch, tokens, qk_heads, heads = sizes
    first = Inputs(*sizes)
    inputs = [first, *(Inputs(*sizes) for _ in range(rotation(first.nbytes, cache_bytes("cuda")) - 1))]
    places = [(0, 0), (batch - 1, heads - 1)]
    wanted = expected(first, places)
    rows, chains = [], []
    for provider in providers:
        calls = [provider.make(each) for each in inputs]
        error = check(places, wanted, calls[0]())
        rows.append({"case": f"{batch} x {tokens}, {qk_heads}/{heads}", "provider": provider.name, "max_error": error.max})
        chains.append(calls)
    floor = batch * tokens * heads * BYTES / BANDWIDTH * 1e6
    for row, us in zip(rows, time_cuda_in_turn(chains), strict=True):
        row |= {"batch": batch, "tokens": tokens, "qk_heads": qk_heads, "heads": heads, "us": us, "floor": floor}
    peer = next((row["us"] for row in rows if row["provider"] == "fla"), None)
    for row in rows:
        row["speed"] = peer and peer / row["us"]
    return rows


def has_fla() -> bool:
    try:
        return bool(importlib.import_module("fla.ops.gated_delta_rule"))
    except ImportError:
        return False


def main(command_line: list[str] | None = None) -> list[dict]:
    """Run the benchmark; return its rows."""
    names = [provider.name for provider in PROVIDERS]
    parser = options(__doc__, ("auto", "cuda"), "an NVIDIA GPU", names)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8], metavar="B")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], metavar="S")
    parser.add_argument("--heads", nargs="+", default=["16/16", "32/32", "16/32"], metavar="QK/V")
    arguments = parser.parse_args(command_line)
    target, device, reason = find_device(arguments.target)
    if device != "cuda" or target != "cuda":
        raise SystemExit(
            f"bench_gated_delta_prefill.py: needs an NVIDIA GPU; got none ({reason}); the tests run the kernels without one"
        )
    given = arguments.providers or [name for name in names if name != "fla" or has_fla()]
    providers, absent = choose(PROVIDERS, given, target)
    cases = [
        (batch, tokens, *map(int, heads.split("/")))
        for heads in arguments.heads
        for tokens in arguments.tokens
        for batch in arguments.batch
    ]
    rows = []
    for case in progress(cases, "gated delta, prompts"):
        rows += measure(case, providers, arguments.seed)
    title = f"gated_delta_prefill, bfloat16, {K} x {V}, {describe(device)}"
    show(title, rows, TIMES, [METHOD["cuda"], f"bytes of ours: at {BANDWIDTH / 1e12} TB/s.", *absent])
    if arguments.csv:
        write_csv(arguments.csv, rows)
    if arguments.plot:
        plot(arguments.plot, rows, case="case", series="provider", value="us", title=title, label="us", order=names)
    return rows


if __name__ == "__main__":
    main()

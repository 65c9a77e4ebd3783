"""`attention` beside torch's scaled_dot_product_attention and FlashAttention-3.

    python benchmark/bench_attention.py --csv attention.csv --plot attention.png     # on an NVIDIA GPU
    python benchmark/bench_attention.py --head-dim 128 --fa3 _vllm_fa3_C.abi3.so     # FlashAttention-3 out of a vllm wheel
    python benchmark/bench_attention.py --random 40                                  # shapes drawn by --seed, checked and timed

bfloat16, self-attention of a batch of 2, 16 heads, 4096 tokens, full and causal; then what sinks cost, float8_e4m3fn, and the
layer of gpt-oss: 64 query and 8 key heads of 64 channels, causal, sinks, a window of 128. Operations are those of the pairs of
a query and a key that it sees. Every result is checked against float64 on some of its rows before anything is timed.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), str(ROOT / "testing")]

from attention_peers import flash_attention_3_arguments  # noqa: E402
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

from tilelang_ext import attention  # noqa: E402

HEAD_DIMS = (64, 128, 256, 512)
CHECKED_QUERIES = 64  # of one head, at the end, in the middle and at the beginning
MIN_COSINE, MAX_ERROR = 0.9999, 1e-2
MIN_COSINE_FP8, MAX_ERROR_FP8 = 0.998, 5e-2  # where P is rounded to e4m3
TIMES = (
    Column("case", "case"),
    Column("provider", "provider"),
    Column("us", "us", ",.1f"),
    Column("tflops", "TFLOP/s", ".0f"),
    Column("speed", "speed / best peer's", ".2f"),
    Column("cosine", "worst cosine", ".6f"),
)


@dataclass(frozen=True)
class Case:
    """Sizes and the mask of a call."""

    batch: int
    S_q: int
    S_k: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    window: int | None = None
    has_sinks: bool = False
    fp8: bool = False  # q, k and v of float8_e4m3fn

    @property
    def name(self) -> str:
        mask = [f"window {self.window}"] if self.window else ["causal" if self.causal else "full"]
        sizes = f"{self.S_q}" if self.S_q == self.S_k else f"{self.S_q}x{self.S_k}"
        return " ".join(
            [f"D {self.head_dim}, {self.batch}x{sizes}, {self.heads}/{self.kv_heads},", *mask, *["sinks"] * self.has_sinks]
            + ["fp8"] * self.fp8
        )

    @property
    def seen(self) -> int:
        """Pairs of a query and a key that it sees, of one head."""
        if not self.causal and not self.window:
            return self.S_q * self.S_k
        ends = range(self.S_k - self.S_q + 1, self.S_k + 1)
        return sum(max(0, end) - max(0, end - (self.window or end)) for end in ends)

    @property
    def flops(self) -> float:
        return 4.0 * self.batch * self.heads * self.seen * self.head_dim


class Inputs:
    """What one call takes, and its result, poisoned."""

    def __init__(self, case: Case):
        def normal(tokens, heads):
            return torch.randn(case.batch, tokens, heads, case.head_dim, device="cuda").bfloat16()

        self.case = case
        self.q, self.k, self.v = normal(case.S_q, case.heads), normal(case.S_k, case.kv_heads), normal(case.S_k, case.kv_heads)
        self.scales = [None] * 3
        self.sinks = torch.randn(case.heads, device="cuda") if case.has_sinks else None
        self.out = torch.full_like(self.q, torch.nan)
        if case.fp8:
            self.q, self.k, self.v = (x.to(torch.float8_e4m3fn) for x in (self.q, self.k, self.v))
            self.scales = [torch.full((1,), scale, device="cuda") for scale in (0.8, 1.1, 1.3)]

    def values(self, batch: int, rows: torch.Tensor, head: int) -> tuple[torch.Tensor, ...]:
        """Return some queries of a head, and the keys and values that it sees, in float64 on the CPU."""
        kv_head = head // (self.case.heads // self.case.kv_heads)
        taken = self.q[batch, rows.to(self.q.device), head], self.k[batch, :, kv_head], self.v[batch, :, kv_head]
        return tuple(
            x.cpu().double() if scale is None else x.cpu().double() * scale.item()
            for x, scale in zip(taken, self.scales, strict=True)
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.q, self.k, self.v, self.out))


def ours(inputs: Inputs) -> Callable:
    case = inputs.case
    call = partial(attention, causal=case.causal, window=case.window, sinks=inputs.sinks, out=inputs.out, return_lse=False)
    if case.fp8:
        call = partial(call, **dict(zip(("q_scale", "k_scale", "v_scale"), inputs.scales, strict=True)))
    return partial(call, inputs.q, inputs.k, inputs.v)


def sdpa(backend: SDPBackend, inputs: Inputs) -> Callable:
    case = inputs.case
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    if case.fp8 or case.window or case.has_sinks or (case.causal and case.S_q != case.S_k):
        raise RuntimeError("not among the masks of torch's function")
    function = torch.nn.functional.scaled_dot_product_attention

    def call():
        with sdpa_kernel(backend):
            return function(q, k, v, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads).transpose(1, 2)

    return call


def flash_attention_3(inputs: Inputs) -> Callable:
    case = inputs.case
    out, lengths = torch.empty_like(inputs.out), torch.full((case.batch,), case.S_k, dtype=torch.int32, device="cuda")
    arguments = flash_attention_3_arguments(
        inputs.q, inputs.k, inputs.v, out, causal=case.causal, window=case.window, sinks=inputs.sinks, seqused_k=lengths,
        scales=[scale if scale is None else scale.expand(case.batch, case.kv_heads) for scale in inputs.scales],
    )  # fmt: skip
    return lambda: torch.ops._vllm_fa3_C.fwd(*arguments)[0]


PROVIDERS = [
    Provider("ours", "tilelang_ext.attention", ("cuda",), ours),
    Provider("cudnn", "torch SDPA, cuDNN", ("cuda",), partial(sdpa, SDPBackend.CUDNN_ATTENTION)),
    Provider("flash", "torch SDPA, FlashAttention-2", ("cuda",), partial(sdpa, SDPBackend.FLASH_ATTENTION)),
    Provider("efficient", "torch SDPA, memory-efficient", ("cuda",), partial(sdpa, SDPBackend.EFFICIENT_ATTENTION)),
    Provider("fa3", "FlashAttention-3 of vLLM", ("cuda",), flash_attention_3),
]


def default_cases(head_dims) -> list[Case]:
    cases = [Case(2, 4096, 4096, 16, 16, D, causal) for D in head_dims for causal in (False, True)]
    cases += [Case(2, 4096, 4096, 16, 16, D, True, None, True) for D in head_dims]
    cases += [Case(2, 4096, 4096, 16, 16, D, causal, fp8=True) for D in head_dims if D <= 256 for causal in (False, True)]
    if 64 in head_dims:
        cases += [
            Case(2, 4096, 4096, 64, 8, 64, True, window, sinks) for window, sinks in ((None, False), (128, False), (128, True))
        ]
    return cases


def random_cases(count: int, seed: int) -> list[Case]:
    """Draw shapes that take some microseconds to some milliseconds."""
    draw = random.Random(seed)
    cases = []
    for _ in range(count):
        D, kv_heads = draw.choice(HEAD_DIMS), draw.choice((1, 2, 4, 8))
        S_k = draw.randint(200, 6000)
        S_q = S_k if draw.random() < 0.5 else draw.randint(1, S_k)
        causal = draw.random() < 0.5
        window, has_sinks = draw.choice((None, None, 128, 1000)), draw.random() < 0.3
        cases.append(
            Case(draw.randint(1, 4), S_q, S_k, kv_heads * draw.choice((1, 4, 8)), kv_heads, D, causal, window, has_sinks)
        )
    return cases


def check(inputs: Inputs, result: torch.Tensor) -> float:
    """Return the worst cosine of some rows of the first and the last head; raises where a row is wrong."""
    case, worst = inputs.case, 1.0
    least, most = (MIN_COSINE_FP8, MAX_ERROR_FP8) if case.fp8 else (MIN_COSINE, MAX_ERROR)
    for batch, head in ((0, 0), (case.batch - 1, case.heads - 1)):
        rows = torch.unique(torch.linspace(0, case.S_q - 1, CHECKED_QUERIES).long())
        q, k, v = inputs.values(batch, rows, head)
        scores = q @ k.T * case.head_dim**-0.5
        distance = rows[:, None] + case.S_k - case.S_q - torch.arange(case.S_k)
        if case.causal or case.window:
            scores = scores.masked_fill(distance < 0, -math.inf)
        if case.window:
            scores = scores.masked_fill(distance >= case.window, -math.inf)
        if inputs.sinks is not None:
            sink = inputs.sinks[head].double().cpu().expand(len(rows), 1)
            scores, v = torch.cat([scores, sink], 1), torch.cat([v, torch.zeros_like(v[:1])])
        wanted = torch.nan_to_num(torch.softmax(scores, -1)) @ v
        got = result[batch, rows.to(result.device), head].double().cpu()
        error = (got - wanted).abs() / (1 + wanted.abs())
        cosine = torch.nn.functional.cosine_similarity(got, wanted, dim=-1)
        cosine = torch.where(wanted.norm(dim=-1) == 0, torch.ones_like(cosine), cosine)
        worst = min(worst, cosine.min().item())
        if not (error.max() <= most and worst >= least):
            raise AssertionError(f"{case.name}: error {error.max():.1e}, cosine {worst}")
    return worst


def measure(case: Case, providers: list[Provider], seed: int, notes: list[str] | None = None) -> list[dict]:
    """Check, then time, all on the same inputs in turn; add to `notes` why a provider was left out, once for each reason."""
    torch.manual_seed(seed)
    first = Inputs(case)
    inputs = [first, *(Inputs(case) for _ in range(rotation(first.nbytes, cache_bytes("cuda")) - 1))]
    rows, chains = [], []
    for provider in providers:
        try:
            calls = [provider.make(each) for each in inputs]
            result = calls[0]()
            torch.cuda.synchronize()
        except (RuntimeError, NotImplementedError) as error:
            note = f"{provider.name}: left out of some cases: {str(error).partition(chr(10))[0][:100]}"
            if notes is not None and note not in notes:
                notes.append(note)
            continue
        cosine = check(first, result)
        rows.append({"case": case.name, "provider": provider.name, "cosine": cosine, "flops": case.flops})
        chains.append(calls)
    for row, us in zip(rows, time_cuda_in_turn(chains), strict=True):
        row |= {"us": us, "tflops": case.flops / us / 1e6}
    peers = [row["us"] for row in rows if row["provider"] != "ours"]
    for row in rows:
        row["speed"] = min(peers) / row["us"] if peers and row["provider"] == "ours" else None
    return rows


def main(command_line: list[str] | None = None) -> list[dict]:
    """Run the benchmark; return its rows."""
    names = [provider.name for provider in PROVIDERS]
    parser = options(__doc__, ("auto", "cuda"), "the NVIDIA GPU", names)
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEAD_DIMS, metavar="D")
    parser.add_argument("--random", type=int, metavar="N", help="draw N shapes by --seed instead")
    parser.add_argument("--fa3", metavar="FILE", help="_vllm_fa3_C.abi3.so of an unpacked vllm wheel")
    arguments = parser.parse_args(command_line)
    _, device, reason = find_device("cuda")
    if device != "cuda":
        raise SystemExit(f"bench_attention.py: needs an NVIDIA GPU; got none ({reason}); the tests run the kernels without one")
    if arguments.fa3:
        torch.ops.load_library(arguments.fa3)
    providers, notes = choose(PROVIDERS, arguments.providers or names, "cuda")
    cases = random_cases(arguments.random, arguments.seed) if arguments.random else default_cases(arguments.head_dim)
    rows = []
    for case in progress(cases, "attention"):
        rows += measure(case, providers, arguments.seed, notes)
        if arguments.csv:
            write_csv(arguments.csv, rows)
    show(f"Attention, bfloat16, {describe(device)}", rows, TIMES, [METHOD["cuda"], *notes])
    if arguments.plot:
        plot(
            arguments.plot,
            rows,
            case="case",
            series="provider",
            value="tflops",
            title="Attention",
            label="TFLOP/s",
            order=names,
        )
    return rows


if __name__ == "__main__":
    main()

"""`attention_decode` beside FlashAttention-3 and the bandwidth of a copy: one token of each sequence over a long cache.

    python benchmark/bench_attention_decode.py --csv decode.csv --plot decode.png    # on an NVIDIA GPU
    python benchmark/bench_attention_decode.py --head-dim 128 --keys 32768 --fa3 _vllm_fa3_C.abi3.so

Eight query heads share a head of keys and values; all sequences have the length that a case names. GB/s are the bytes of keys
and values over the time; a copy of 4 GiB in the same run, the faster of the driver's and a kernel's, counts what it reads and
writes. FlashAttention-3 takes q in 8 bits where the cache has them. Every result is checked against float64 on some heads
before anything is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

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
    time_cuda,
    time_cuda_in_turn,
    write_csv,
)

from tilelang_ext import attention_decode  # noqa: E402

HEAD_DIMS, KEYS, BATCHES = (64, 128, 512), (4096, 32768, 65536), (1, 8, 64)
GROUP = 8  # query heads of a head of keys and values
KV_HEADS = {512: 2}  # of wide heads; 8 otherwise
COPIED_BYTES = 2**32  # read, and as many written
E4M3 = torch.float8_e4m3fn
MIN_COSINE = {torch.bfloat16: 0.9999, E4M3: 0.99}  # where q and P are rounded to e4m3 too
TIMES = (
    Column("case", "case"),
    Column("provider", "provider"),
    Column("us", "us", ",.1f"),
    Column("gbps", "GB/s", ",.0f"),
    Column("of_copy", "of a copy's", ".2f"),
    Column("of_fa3", "speed / FlashAttention-3's", ".2f"),
    Column("of_bf16", "speed / of 16 bits", ".2f"),
    Column("cosine", "worst cosine", ".6f"),
)


@dataclass(frozen=True)
class Case:
    """Sizes of a call."""

    head_dim: int
    batch: int
    keys: int
    kv_heads: int

    @property
    def name(self) -> str:
        return f"D {self.head_dim}, {self.kv_heads * GROUP}/{self.kv_heads}, {self.batch}x{self.keys}"

    def nbytes(self, dtype: torch.dtype) -> int:
        return 2 * self.batch * self.keys * self.kv_heads * self.head_dim * dtype.itemsize


class Inputs:
    """What one call takes: a cache of 16 bits, and the same rounded to 8, with one scale per head."""

    def __init__(self, case: Case):
        def normal(tokens, heads):
            return torch.randn(case.batch, tokens, heads, case.head_dim, device="cuda", dtype=torch.bfloat16)

        self.case = case
        self.q = normal(1, case.kv_heads * GROUP)
        self.k, self.v = normal(case.keys, case.kv_heads), normal(case.keys, case.kv_heads)
        self.seqlens = torch.full((case.batch,), case.keys, dtype=torch.int32, device="cuda")
        self.k_scale, self.v_scale = (torch.rand(case.kv_heads, device="cuda") + 0.5 for _ in range(2))
        self.k8, self.v8 = (x.to(E4M3) for x in (self.k, self.v))
        self.out = torch.full_like(self.q, torch.nan)


def ours(inputs: Inputs) -> Callable:
    call = partial(attention_decode, out=inputs.out, return_lse=False)
    return partial(call, inputs.q, inputs.k, inputs.v, inputs.seqlens)


def ours_fp8(inputs: Inputs) -> Callable:
    call = partial(attention_decode, out=inputs.out, return_lse=False, k_scale=inputs.k_scale, v_scale=inputs.v_scale)
    return partial(call, inputs.q, inputs.k8, inputs.v8, inputs.seqlens)


def flash_attention_3(inputs: Inputs) -> Callable:
    arguments = flash_attention_3_arguments(
        inputs.q, inputs.k, inputs.v, torch.empty_like(inputs.q), causal=True, seqused_k=inputs.seqlens, num_splits=0
    )
    return lambda: torch.ops._vllm_fa3_C.fwd(*arguments)[0]


def flash_attention_3_fp8(inputs: Inputs) -> Callable:
    batch, heads = inputs.case.batch, inputs.case.kv_heads
    scales = [x.expand(batch, heads) for x in (torch.ones_like(inputs.k_scale), inputs.k_scale, inputs.v_scale)]
    arguments = flash_attention_3_arguments(
        inputs.q.to(E4M3), inputs.k8, inputs.v8, torch.empty_like(inputs.q), causal=True, seqused_k=inputs.seqlens,
        num_splits=0, scales=scales,
    )  # fmt: skip
    return lambda: torch.ops._vllm_fa3_C.fwd(*arguments)[0]


PROVIDERS = [
    Provider("ours", "tilelang_ext.attention_decode", ("cuda",), ours),
    Provider("fa3", "FlashAttention-3 of vLLM", ("cuda",), flash_attention_3),
    Provider("ours, fp8", "tilelang_ext.attention_decode, a cache of float8_e4m3fn", ("cuda",), ours_fp8),
    Provider("fa3, fp8", "FlashAttention-3 of vLLM, q, k and v of float8_e4m3fn", ("cuda",), flash_attention_3_fp8),
]


def default_cases(head_dims, keys, batches) -> list[Case]:
    return [Case(D, batch, S, KV_HEADS.get(D, 8)) for D in head_dims for S in keys for batch in batches]


def check(inputs: Inputs, result: torch.Tensor, fp8: bool, least: float) -> float:
    """Return the worst cosine of the heads that share the first and the last head of k and v; raises where one is wrong."""
    case, worst = inputs.case, 1.0
    for batch, head in ((0, 0), (case.batch - 1, case.kv_heads - 1)):
        k, v = (inputs.k8, inputs.v8) if fp8 else (inputs.k, inputs.v)
        k, v = (x[batch, :, head].to(torch.float64) for x in (k, v))
        if fp8:
            k, v = k * inputs.k_scale[head].double(), v * inputs.v_scale[head].double()
        rows = slice(head * GROUP, (head + 1) * GROUP)
        q = inputs.q[batch, 0, rows].double()
        wanted = torch.softmax(q @ k.T * case.head_dim**-0.5, -1) @ v
        got = result[batch, 0, rows].double()
        cosine = torch.nn.functional.cosine_similarity(got, wanted, dim=-1).min().item()
        worst = min(worst, cosine)
        if not worst >= least:
            raise AssertionError(f"{case.name}: cosine {worst}; wanted {least}")
    return worst


def copy_bandwidth() -> float:
    """Return the GB/s of a copy on this device, bytes read and written."""
    source = torch.randn(COPIED_BYTES // 4, device="cuda")
    to = torch.empty_like(source)
    us = min(time_cuda([call]) for call in (lambda: to.copy_(source), lambda: torch.neg(source, out=to)))
    return 2 * COPIED_BYTES / us / 1e3


def measure(case: Case, providers: list[Provider], copied: float, seed: int, notes: list[str] | None = None) -> list[dict]:
    """Check, then time, all on the same inputs in turn; add to `notes` why a provider was left out, once for each reason."""
    torch.manual_seed(seed)
    first = Inputs(case)
    sets = rotation(case.nbytes(E4M3), cache_bytes("cuda")) if case.nbytes(E4M3) < 4 * cache_bytes("cuda") else 1
    inputs = [first, *(Inputs(case) for _ in range(sets - 1))]
    rows, chains = [], []
    for provider in providers:
        fp8 = "fp8" in provider.name
        try:
            calls = [provider.make(each) for each in inputs]
            result = calls[0]()
            torch.cuda.synchronize()
        except (RuntimeError, NotImplementedError) as error:
            note = f"{provider.name}: left out of some cases: {str(error).partition(chr(10))[0][:100]}"
            if notes is not None and note not in notes:
                notes.append(note)
            continue
        least = MIN_COSINE[E4M3 if provider.name == "fa3, fp8" else torch.bfloat16]
        row = {"case": case.name, "provider": provider.name, "cosine": check(inputs[0], result, fp8, least)}
        rows.append(row | {"bytes": case.nbytes(E4M3 if fp8 else torch.bfloat16)})
        chains.append(calls)
    times = {row["provider"]: us for row, us in zip(rows, time_cuda_in_turn(chains), strict=True)}
    for row in rows:
        us, name = times[row["provider"]], row["provider"]
        row |= {"us": us, "gbps": row["bytes"] / us / 1e3}
        row["of_copy"] = row["gbps"] / copied
        peer, of_16_bits = name.replace("ours", "fa3"), name.removesuffix(", fp8")
        row["of_fa3"] = times[peer] / us if peer in times and peer != name else None
        row["of_bf16"] = times[of_16_bits] / us if of_16_bits in times and of_16_bits != name else None
    return rows


def main(command_line: list[str] | None = None) -> list[dict]:
    """Run the benchmark; return its rows."""
    names = [provider.name for provider in PROVIDERS]
    parser = options(__doc__, ("auto", "cuda"), "the NVIDIA GPU", names)
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEAD_DIMS, metavar="D")
    parser.add_argument("--keys", type=int, nargs="+", default=KEYS, metavar="N")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, metavar="B")
    parser.add_argument("--fa3", metavar="FILE", help="_vllm_fa3_C.abi3.so of an unpacked vllm wheel")
    arguments = parser.parse_args(command_line)
    _, device, reason = find_device("cuda")
    if device != "cuda":
        raise SystemExit(f"bench_attention_decode.py: needs an NVIDIA GPU; got none ({reason}); the tests run without one")
    if arguments.fa3:
        torch.ops.load_library(arguments.fa3)
    providers, notes = choose(PROVIDERS, arguments.providers or names, "cuda")
    copied, rows = copy_bandwidth(), []
    notes.append(f"A copy in this run: {copied:,.0f} GB/s.")
    for case in progress(default_cases(arguments.head_dim, arguments.keys, arguments.batch), "decode"):
        rows += measure(case, providers, copied, arguments.seed, notes)
        torch.cuda.empty_cache()
        if arguments.csv:
            write_csv(arguments.csv, rows)
    show(f"Attention of one token, {describe(device)}", rows, TIMES, [METHOD["cuda"], *notes])
    if arguments.plot:
        plot(
            arguments.plot,
            rows,
            case="case",
            series="provider",
            value="gbps",
            title="Attention of one token over a cache",
            label="GB/s of keys and values",
            order=names,
        )
    return rows


if __name__ == "__main__":
    main()

"""Mixtures of experts that nobody tuned for, for bench_grid.py: what is drawn, and how one case is measured.

A case is written H/I/E/top_k xTOKENS FORMAT, with "zipf" behind it where experts are chosen as often as one over their rank.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import random
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from harness import L2_CACHES, Column, cache_bytes, rotation, time_cuda_in_turn
from mxfp4_moe_cases import A_DTYPES, PROVIDERS, TAKES, Case, Inputs, Model, check, expected, installed

from tilelang_ext import Activation, ahead
from tilelang_ext.kernels.mxfp4_moe.ahead import compile_call
from tilelang_ext.kernels.mxfp4_moe.problem import HOPPER_LAYOUTS, Problem
from tilelang_ext.launch.device import target_of

MOST_TOKENS, MOST_TOP_K = 8192, 16
FEWEST_EXPERTS, MOST_EXPERTS = 8, 896
STEP, FEWEST, MOST = 32, 512, 7168  # of H and I
MOST_BYTES = 6 * 2**30  # of the weights of a layer, which a benchmark holds several times; kimi-k2's have 9 * 10^9
FORMATS = ("bf16", "fp8")
ZIPF = 1.0
CHECKED_ROWS = 32
REPLAYS = 10
COLUMNS = (
    Column("case", "H/I/E/top_k x tokens"),
    Column("ours_us", "ours us", ",.1f"),
    Column("peer_us", "best peer us", ",.1f"),
    Column("peer", "best peer"),
    Column("speed", "speed / best", ".2f"),
    Column("share_of_floor", "bytes floor", ".2f"),
    Column("tflops", "TFLOP/s", ",.0f"),
)


def draw(seed: int, count: int) -> list[Case]:
    """Return `count` cases, the same for the same seed: sizes uniform, experts and tokens log-uniform."""
    generator = random.Random(seed)
    cases: list[Case] = []
    while len(cases) < count:
        hidden, intermediate = (STEP * generator.randint(FEWEST // STEP, MOST // STEP) for _ in range(2))
        experts = round(math.exp(generator.uniform(math.log(FEWEST_EXPERTS), math.log(MOST_EXPERTS))))
        top_k = generator.randint(1, min(MOST_TOP_K, experts))
        tokens = round(math.exp(generator.uniform(0.0, math.log(MOST_TOKENS))))
        a_dtype, zipf = generator.choice(FORMATS), generator.choice((0.0, ZIPF))
        case = _case(Model("", hidden, intermediate, experts, top_k), tokens, a_dtype, zipf)
        if 3 * hidden * intermediate * experts * 17 // 32 <= MOST_BYTES:
            cases.append(case)
    return cases


def case_of(text: str) -> Case:
    """Return the case that is written as 7168/2048/384/8x1024:fp8 or 7168/2048/384/8x1024:fp8:zipf."""
    match = re.fullmatch(r"(\d+)/(\d+)/(\d+)/(\d+)x(\d+):(bf16|fp8)(:zipf)?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be as 7168/2048/384/8x1024:fp8, H/I/E/top_k, tokens; got {text}; write it so")
    *sizes, tokens = map(int, match.groups()[:5])
    return _case(Model("", *sizes), tokens, match[6], ZIPF if match[7] else 0.0)


def _case(model: Model, tokens: int, a_dtype: str, zipf: float) -> Case:
    return Case(model._replace(name="/".join(map(str, model[1:]))), tokens, a_dtype, "cuda", "cuda", zipf)


def name_of(case: Case) -> str:
    return f"{case.model.name} x{case.tokens} {case.a_dtype}{' zipf' if case.zipf else ''}"


def measure(case: Case, names: list[str], seed: int) -> list[dict]:
    """Return a row per provider, each with its time or with why it has none; ours must be right."""
    active = case.inputs(seed, "cuda").topk_ids.unique().numel()
    sets, cache = rotation(case.bytes(active), cache_bytes("cuda")), cache_bytes("cuda")
    copies = math.ceil(L2_CACHES * cache / case.bytes(case.model.experts))
    layers = [case.layer(seed + i, "cuda") for i in range(min(sets, copies))]
    inputs = [case.inputs(seed + i, "cuda") for i in range(sets)]
    outputs = [case.output("cuda") for _ in range(sets)]
    floor = sum(case.bytes(one.topk_ids.unique().numel()) for one in inputs) / sets
    checked = torch.unique(torch.linspace(0, case.tokens - 1, min(case.tokens, CHECKED_ROWS), device="cuda").long())
    want = expected(layers[0], Inputs(*(each[checked] for each in inputs[0])))
    rows, chains = [], []
    for provider in _providers(case, names):
        row = {"case": name_of(case), "tokens": case.tokens, "a_dtype": case.a_dtype, "provider": provider.name}
        outputs[0].fill_(torch.nan)
        try:
            binds = [provider.make(case, layer) for layer in layers]
            calls = [binds[i % len(binds)](one, out) for i, (one, out) in enumerate(zip(inputs, outputs, strict=True))]
            calls[0]()
            row |= check(case, provider.name, outputs[0][checked], want)
            if not bool(outputs[0].isfinite().all()):
                raise AssertionError(f"{name_of(case)}: {provider.name}: some elements are not finite")
        except (RuntimeError, ValueError, AssertionError) as error:
            if provider.name == "ours":
                raise
            rows.append({**row, "left_out": str(error).partition("\n")[0]})
            continue
        chains.append(calls)
        rows.append(row)
    timed = [row for row in rows if "left_out" not in row]
    for row, us in zip(timed, time_cuda_in_turn(chains, REPLAYS), strict=True):
        row |= {"us": us, "tflops": case.flops / us / 1e6, "gbps": floor / us / 1e3}
    return rows


def _providers(case: Case, names: list[str]) -> list:
    return [provider for provider in PROVIDERS if provider.name in names and case.a_dtype in TAKES[provider.name]]


def here(names: list[str]) -> list[str]:
    """Return the providers of these names that are installed."""
    return [provider.name for provider in PROVIDERS if provider.name in names and installed(provider)]


def summary_of(rows: list[dict], copy_gbps: float | None = None) -> dict:
    """Return what one case says: our time, the best peer's, the speed, and what part of ours moving the bytes takes."""
    times = {row["provider"]: row["us"] for row in rows if row.get("us") is not None}
    peer = min((name for name in times if name != "ours"), key=times.__getitem__, default=None)
    ours = next(row for row in rows if row["provider"] == "ours")
    return {
        "case": ours["case"],
        "ours_us": ours["us"],
        "peer_us": times[peer] if peer else None,
        "peer": peer or "none",
        "speed": times[peer] / ours["us"] if peer else None,
        "share_of_floor": ours["gbps"] / copy_gbps if copy_gbps else None,
        "tflops": ours["tflops"],
    }


def compile_ahead(cases: list[Case], names: list[str], processes: int) -> None:
    """Compile our kernels, then those of the peers, in parallel processes: they are found on disk afterwards."""
    if "ours" in names:
        kind, arch, num_sms = target_of("mxfp4_moe", torch.device("cuda", torch.cuda.current_device()))
        jobs: dict = {}

        def listed(make, *arguments, pass_configs=None) -> None:
            jobs[ahead.Job(make, arguments, arch, tuple((pass_configs or {}).items()))] = None

        for case in cases:
            compile_call(problem_of(case, kind, num_sms), listed)
        ahead.compile_all(list(jobs), processes)
    peers = [name for name in names if name != "ours"]
    if processes > 1 and peers:
        with ProcessPoolExecutor(max(2, processes // 2), mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(partial(_run_once, names=peers, path=sys.path), cases))


def problem_of(case: Case, kind: str, num_sms: int) -> Problem:
    """Return the problem that a case is."""
    _, hidden, intermediate, experts, top_k = case.model
    a_format = A_DTYPES[case.a_dtype] or "bfloat16"
    return Problem(
        tokens=case.tokens,
        top_k=top_k,
        num_experts=experts,
        num_local_experts=experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        dtype="bfloat16",
        ids_dtype="int32",
        a_format=a_format,
        weights_layout=HOPPER_LAYOUTS[a_format],
        activation=Activation(),
        epilogue="reduce",
        target_kind=kind,
        num_sms=num_sms,
    )


def _run_once(case: Case, names: list[str], path: list[str]) -> None:
    sys.path[:] = path
    torch.cuda.empty_cache()
    if case.bytes(case.model.experts) > MOST_BYTES // 2:  # several processes share the memory; this one compiles when measured
        return
    layer, inputs, out = case.layer(0, "cuda"), case.inputs(0, "cuda"), case.output("cuda")
    for provider in _providers(case, names):
        try:
            provider.make(case, layer)(inputs, out)()
        except (RuntimeError, ValueError, AssertionError) as error:
            print(f"{name_of(case)}: {provider.name}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
    torch.cuda.synchronize()

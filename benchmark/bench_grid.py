"""Sizes that nobody tuned for: an operator of this package beside the best of its peers, over sizes drawn at random.

    python benchmark/bench_grid.py --op scaled_mm --seed 7 --count 60 --csv grid.csv
    python benchmark/bench_grid.py --op scaled_mm --sizes 8x27648x5120 384x10240x8192
    python benchmark/bench_grid.py --op scaled_mm --seed 7 --count 60 --list         # the sizes alone; needs no GPU
    python benchmark/bench_grid.py --op mxfp4_moe --seed 7 --count 40 --path site --csv grid_moe.csv
    python benchmark/bench_grid.py --op mxfp4_moe --sizes 7168/2048/384/8x1024:fp8 4096/2048/256/6x8192:bf16:zipf

scaled_mm: M is drawn log-uniformly from 1 to 8192, N and K uniformly from the multiples of 128 in 1024 to 32768; each size has
row scales and block scales. Speed is the time of the best peer over ours: with row scales torch with and without fast
accumulation, beside ours with it (`ours_fast`), and in a column of its own torch without beside ours without (`ours`); with
block scales torch and DeepGEMM. A peer that cannot do a case is named with its reason. Kernels are compiled by parallel
processes first. Some rows of every result are compared with float64 before anything is timed, and all elements must be finite.

mxfp4_moe: hidden and intermediate size (H, I) are drawn uniformly from the multiples of 32 in 512 to 7168, experts (E)
log-uniform from 8 to 896, top_k from 1 to 16, tokens log-uniform from 1 to 8192, activations from bfloat16 and FP8, and the
router either finds all experts equally likely or the one of rank r as often as 1 / r (Zipf). Layers of more than 6 GiB of
weights are drawn again. Peers are triton_kernels (bfloat16) and humming, also from the folders of --path.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), str(ROOT / "testing")]

import mxfp4_moe_grid  # noqa: E402
from harness import (  # noqa: E402
    METHOD,
    Column,
    cache_bytes,
    describe,
    find_device,
    progress,
    rotation,
    show,
    time_cuda,
    time_cuda_in_turn,
    write_csv,
)
from scaled_mm_peers import FAST_ERROR, PROVIDERS, TAKES, TENSOR_CORE_ERROR, Case, Inputs, installed  # noqa: E402

from tilelang_ext import reference  # noqa: E402

MOST_ROWS = 8192
STEP, FEWEST, MOST = 128, 1024, 32768  # of N and K
RECIPES = ("row", "block")
CHECKED_ROWS = 64
BFLOAT16_ROUNDING = 2.0**-8
PROVIDERS_OF_GRID = ("ours", "ours_fast", "torch", "torch_fast", "deep_gemm", "vllm")
PROVIDERS_OF_MOE = ("ours", "triton_kernels", "humming")
REPLAYS = 10
COLUMNS = (
    Column("case", "M x N x K"),
    Column("ours_us", "ours us", ",.1f"),
    Column("peer_us", "best peer us", ",.1f"),
    Column("peer", "best peer"),
    Column("speed", "speed / best", ".2f"),
    Column("exact_speed", "exact / torch's", ".2f"),
)


def draw(seed: int, count: int) -> list[tuple[int, int, int]]:
    """Return `count` sizes (M, N, K), the same for the same seed."""
    generator = random.Random(seed)

    def multiple() -> int:
        return STEP * generator.randint(FEWEST // STEP, MOST // STEP)

    return [(round(math.exp(generator.uniform(0.0, math.log(MOST_ROWS)))), multiple(), multiple()) for _ in range(count)]


def size_of(text: str) -> tuple[int, int, int]:
    """Return the size that is written as 8x27648x5120."""
    try:
        M, N, K = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be as 8x27648x5120, M, N and K; got {text}; write it so") from None
    return M, N, K


def measure(case: Case, names: list[str], seed: int) -> list[dict]:
    """Return a row per provider, each with its time or with why it has none."""
    made = [case.by_blocks(seed + i, "cuda") for i in range(rotation(case.bytes, cache_bytes("cuda")))]
    rows_checked = torch.unique(torch.linspace(0, case.M - 1, min(case.M, CHECKED_ROWS), device="cuda").long())
    first = made[0]
    scale_a = first.scale_a[rows_checked]
    expected = reference.scaled_matmul(first.a[rows_checked], scale_a, first.b, first.scale_b, *case.layouts)
    level = torch.maximum(expected.abs(), expected.square().mean().sqrt())
    inputs = [case.as_torch(one) for one in made]
    outputs = [case.output("cuda") for _ in inputs]
    rows, chains = [], []
    for provider in (provider for provider in PROVIDERS if provider.name in names):
        row = {"case": case.name, "M": case.M, "N": case.N, "K": case.K, "recipe": case.recipe, "provider": provider.name}
        outputs[0].fill_(torch.nan)
        try:
            run = provider.make(case)
            run(inputs[0], outputs[0])
            torch.cuda.synchronize()
        except (RuntimeError, ValueError) as error:
            if provider.name.startswith("ours"):
                raise
            rows.append({**row, "left_out": str(error).partition("\n")[0]})
            continue
        fast = provider.name.endswith("fast") or (provider.name == "vllm" and case.recipe != "block")
        largest = ((outputs[0][rows_checked].double() - expected).abs() / level).nan_to_num(torch.inf).max().item()
        limit = (FAST_ERROR * max(1.0, case.K / 8192) if fast else TENSOR_CORE_ERROR) + BFLOAT16_ROUNDING
        if largest > limit or not bool(torch.isfinite(outputs[0]).all()):
            rule = f"{provider.name} must be within {limit:.1e} of float64"
            raise SystemExit(f"{case.name}: {rule}; got {largest:.1e}; report it")
        chains.append([partial(run, one, out) for one, out in zip(inputs, outputs, strict=True)])
        rows.append({**row, "max_error": largest})
    timed = [row for row in rows if "left_out" not in row]
    for row, us in zip(timed, time_cuda_in_turn(chains, REPLAYS), strict=True):
        row |= {"us": us, "tflops": case.flops / us / 1e6, "gbps": case.bytes / us / 1e3}
    return rows


def summary_of(rows: list[dict]) -> dict:
    """Return what one case says: our time, the best peer's, and the speeds."""
    times = {row["provider"]: row["us"] for row in rows if row.get("us") is not None}
    peers = {name: us for name, us in times.items() if not name.startswith("ours")}
    ours = times["ours_fast"] if "ours_fast" in times else times["ours"]
    peer = min(peers, key=peers.__getitem__, default=None)
    exact = peers.get("torch") if rows[0]["recipe"] == "row" else None
    return {
        "case": rows[0]["case"],
        "ours_us": ours,
        "peer_us": peers[peer] if peer else None,
        "peer": peer or "none",
        "speed": peers[peer] / ours if peer else None,
        "exact_speed": exact / times["ours"] if exact and "ours" in times else None,
    }


def verdict(name: str, speeds: list[float]) -> str:
    """Return the geometric mean and the worst of some speeds, in words."""
    mean = statistics.geometric_mean(speeds)
    return f"{name}: {len(speeds)} cases, geometric mean {mean:.3f}, worst {min(speeds):.3f} of the best peer"


def compile_ahead(cases: list[Case], names: dict[str, list[str]], processes: int) -> None:
    """Run every provider of a case's recipe once in parallel processes: what they compile is found on disk afterwards."""
    if processes < 2:
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(progress(list(pool.map(partial(_run_once, names=names), cases)), "compiling"))


def _run_once(case: Case, names: dict[str, list[str]]) -> None:
    codes = [torch.zeros(rows, case.K, dtype=torch.uint8, device="cuda") for rows in (case.M, case.N)]
    scales = [
        torch.ones(layout.scale_shape(rows, case.K), device="cuda")
        for layout, rows in zip(case.layouts, (case.M, case.N), strict=True)
    ]
    inputs = case.as_torch(Inputs(*(code.view(torch.float8_e4m3fn) for code in codes), *scales))
    out = case.output("cuda")
    for provider in (provider for provider in PROVIDERS if provider.name in names[case.recipe]):
        try:
            provider.make(case)(inputs, out)
        except (RuntimeError, ValueError) as error:
            print(f"{case.name}: {provider.name}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
    torch.cuda.synchronize()


def main(command_line: list[str] | None = None) -> list[dict]:
    """Run the benchmark and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=("scaled_mm", "mxfp4_moe"), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60, help="sizes to draw")
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help="MxNxK or H/I/E/top_kxTOKENS:FORMAT, in place of drawn ones")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="of scaled_mm")
    parser.add_argument(
        "--providers", nargs="+", choices=(*PROVIDERS_OF_GRID, *PROVIDERS_OF_MOE), help="default: all there are"
    )
    parser.add_argument("--path", nargs="+", default=[], metavar="FOLDER", help="folders to import peers of mxfp4_moe from")
    parser.add_argument("--without-exact", action="store_true", help="scaled_mm without ours of exact rows")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile at the same time")
    parser.add_argument("--list", action="store_true", help="print the sizes and stop")
    parser.add_argument("--csv", metavar="FILE", help="write every figure, after each case")
    arguments = parser.parse_args(command_line)

    sys.path[:0] = arguments.path
    of_moe = arguments.op == "mxfp4_moe"
    try:
        sizes = [(mxfp4_moe_grid.case_of if of_moe else size_of)(size) for size in arguments.sizes or ()]
    except argparse.ArgumentTypeError as error:
        parser.error(f"--sizes: {error}")
    sizes = sizes or (mxfp4_moe_grid.draw if of_moe else draw)(arguments.seed, arguments.count)
    if arguments.list:
        print("\n".join(mxfp4_moe_grid.name_of(size) if of_moe else "x".join(map(str, size)) for size in sizes))
        return []
    _, device, reason = find_device("cuda")
    if device != "cuda":
        raise SystemExit(f"bench_grid: must run on an NVIDIA GPU; got {reason}; --list prints the sizes")
    if arguments.providers is None:
        arguments.providers = list(PROVIDERS_OF_MOE if of_moe else PROVIDERS_OF_GRID)
    return _run_mxfp4_moe(arguments, sizes) if of_moe else _run_scaled_mm(arguments, sizes)


def _run_mxfp4_moe(arguments: argparse.Namespace, cases: list) -> list[dict]:
    here = mxfp4_moe_grid.here(arguments.providers)
    mxfp4_moe_grid.compile_ahead(cases, here, min(arguments.processes, len(cases)))
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    copy_gbps = 2 * source.nbytes / time_cuda([partial(torch.mul, source, 1.0, out=target)]) / 1e3
    del source, target
    rows, summaries = [], []
    for case in progress(cases, "grid"):
        rows += (of_case := mxfp4_moe_grid.measure(case, here, arguments.seed))
        summaries.append(mxfp4_moe_grid.summary_of(of_case, copy_gbps))
        if arguments.csv:
            write_csv(arguments.csv, rows)
    notes = [f"{name}: left out, not installed" for name in arguments.providers if name not in here]
    notes += [f"{row['case']}: {row['provider']} left out: {row['left_out']}" for row in rows if "left_out" in row]
    notes.append(f"bytes floor: the time that moving the least bytes takes at the speed of a copy, {copy_gbps:,.0f} GB/s.")
    drawn = "given sizes" if arguments.sizes else f"seed {arguments.seed}"
    notes.append(METHOD["cuda"])
    show(f"mxfp4_moe, {drawn}, {describe('cuda')}", summaries, mxfp4_moe_grid.COLUMNS, notes)
    for name in (*mxfp4_moe_grid.FORMATS, "zipf", "x"):
        speeds = [s["speed"] for s in summaries if name in s["case"] and s["speed"] is not None]
        if speeds:
            print(verdict("all" if name == "x" else name, speeds))
    return rows


def _run_scaled_mm(arguments: argparse.Namespace, sizes: list[tuple[int, int, int]]) -> list[dict]:
    cases = [Case(*size, recipe, "bfloat16", "cuda", "cuda") for size in sizes for recipe in arguments.recipes]
    here = [provider.name for provider in PROVIDERS if provider.name in arguments.providers and installed(provider)]
    absent = [name for name in arguments.providers if name not in here]
    of_recipe = {recipe: [name for name in here if recipe in TAKES[name]] for recipe in arguments.recipes}
    if arguments.without_exact and "row" in of_recipe:
        of_recipe["row"] = [name for name in of_recipe["row"] if name != "ours"]
    compile_ahead(cases, of_recipe, min(arguments.processes, len(cases)))
    rows, summaries = [], []
    for case in progress(cases, "grid"):
        rows += (of_case := measure(case, of_recipe[case.recipe], arguments.seed))
        summaries.append(summary_of(of_case))
        if arguments.csv:
            write_csv(arguments.csv, rows)
    notes = [f"{name}: left out, not installed" for name in absent]
    notes += [f"{row['case']}: {row['provider']} left out: {row['left_out']}" for row in rows if "left_out" in row]
    drawn = "given sizes" if arguments.sizes else f"seed {arguments.seed}"
    show(f"scaled_mm, e4m3 to bfloat16, {drawn}, {describe('cuda')}", summaries, COLUMNS, [*notes, METHOD["cuda"]])
    for recipe in arguments.recipes:
        speeds = [s["speed"] for s in summaries if s["case"].endswith(recipe) and s["speed"] is not None]
        if speeds:
            print(verdict(recipe, speeds))
    speeds = [s["speed"] for s in summaries if s["speed"] is not None]
    if speeds:
        print(verdict("all", speeds))
    exact = [s["exact_speed"] for s in summaries if s["exact_speed"] is not None]
    if exact:
        mean = statistics.geometric_mean(exact)
        print(f"row scales without fast accumulation, of torch's without: {mean:.3f}, worst {min(exact):.3f}")
    return rows


if __name__ == "__main__":
    main()

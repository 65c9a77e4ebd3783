"""The cost model of `matmul` on Hopper beside measured times: what its choices cost, and constants that fit better.

    python benchmark/fit_matmul.py                 # what the model's choices cost beside the best that were measured
    python benchmark/fit_matmul.py --steps 2000    # a random walk from today's constants that keeps what is better; prints them

Needs no GPU. The times are those of benchmark/results/matmul_h200_*.csv with tiles. The error is that of the logarithms of
times, weighted towards each size's best, and the time that the choices cost.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tilelang_ext.kernels.matmul import sm90_config  # noqa: E402
from tilelang_ext.kernels.matmul.pad import is_padded  # noqa: E402
from tilelang_ext.kernels.matmul.problem import Problem  # noqa: E402

RESULTS = ROOT / "benchmark" / "results"
FILES = tuple(f"matmul_h200_{name}.csv" for name in ("tiles", "random", "swapped", "any_size", "parts", "squares"))
# What the sum over splits, of few and of more, took longer in runs when it had fewer loads in flight (docs/log/matmul.md)
FEW_SPLITS, SUM_US = 4, (0.7, 1.2)
# fmt: off
CONSTANTS = (
    "_LAUNCH_US", "_CLUSTER_US", "_MEMORY", "_POWER", "_ROW_OPERATIONS", "_OVERLAP", "_OVERLAP_LOADS", "_SUM_US", "_SUM",
    "_GIVE_US", "_ADDED", "_TURN_US", "_MMA_US", "_MMA_ELEMENT_US", "_SHARED_MEMORY_US", "_STORE_ROW_US", "_UNIT_US",
    "_UNIT_ELEMENT_US", "_SWAPPED_ELEMENT_US", "_ROW_US", "_SPLIT_ROW_US", "_EMPTY_ROW_US", "_CUT_ROW_US", "_NARROW_ROW_US",
    "_SHARED_NARROW_US", "_SHARED_ROW_US", "_CACHE_ROW_US", "_SPLIT_BYTES", "_ALONE_US", "_STREAM_US", "_STREAMED",
    "_REREAD", "_JOIN_US", "_JOINED", "_AGAIN", "_SQUARE_US", "_CROWD",
)
# fmt: on


@dataclass(frozen=True)
class Measured:
    """One tile of one size."""

    problem: Problem
    tile: sm90_config.Tile
    splits: int
    is_turned: bool
    us: float

    def predicted_us(self) -> float:
        turn = sm90_config._TURN_US if self.is_turned else 0.0
        return turn + sm90_config.predicted_us(self.tile, self.splits, self.problem)


def load(paths: list[Path]) -> list[list[Measured]]:
    """Return the measured tiles of each size of each run; those that are no choices any more are left out."""
    by_size = defaultdict(list)
    for path in paths:
        with open(path) as file:
            for row in csv.DictReader(file):
                by_size[path.name, row.get("run"), row["M"], row["N"], row["K"], row["layout"]].append(row)
    tiles = {_key(tile): tile for tile in sm90_config.TILES}
    found = []
    for (name, run, *size, layout), rows in by_size.items():
        problem = Problem("cuda", "sm_90a", 132, *map(int, size), "bfloat16", "bfloat16", layout[0] == "N", layout[1] == "T")
        if is_padded(problem.a_row) or is_padded(problem.b_row):  # has a copy ahead, which is no matter of tiles
            continue
        measured, problems = [], (sm90_config._rounded(problem), sm90_config._rounded(replace(problem, a_is_k_major=True)))
        choices = [set(sm90_config.choices(of)) for of in problems]
        for row in rows:
            is_turned = row.get("turned") == "1"
            of = problems[is_turned]
            tile = tiles.get(_key_of_row(row)) if row["provider"] == "ours" and row["block_M"] else None
            if tile is None:
                continue
            tile = replace(tile, adds=row.get("adds") == "1", streams=row.get("streams") == "1", joins=row.get("joins") == "1")
            is_of_today = tile.cluster <= 2 or name == FILES[-1]  # once four blocks below each other shared the loads of B
            if is_of_today and (tile, int(row["splits"])) in choices[is_turned]:
                us = float(row["us"])
                if row["splits"] != "1" and not (tile.adds or tile.joins) and is_earlier(name, run):
                    us -= SUM_US[int(row["splits"]) > FEW_SPLITS]
                measured.append(Measured(of, tile, int(row["splits"]), is_turned, us))
        if measured:
            found.append(measured)
    return found


def _key(tile: sm90_config.Tile) -> tuple:
    return tile.block_M, tile.block_N, tile.cluster, tile.thin, tile.is_swapped, tile.shares_a


def _key_of_row(row: dict) -> tuple:
    numbers = (int(row[name]) for name in ("block_M", "block_N", "cluster", "thin"))
    return *numbers, row.get("swapped") == "1", row.get("shares_a") == "1"


def is_earlier(name: str, run: str | None) -> bool:
    """Return whether the sum over splits was the earlier one in a run."""
    return name != FILES[-1] or run == "1"


def costs(sizes: list[list[Measured]]) -> list[float]:
    """Return, for each size, the time of the model's choice among those measured over the best."""
    return [min(measured, key=Measured.predicted_us).us / min(one.us for one in measured) for measured in sizes]


def error(sizes: list[list[Measured]]) -> float:
    """Return what the fit makes small."""
    total = weights = 0.0
    cost = []
    for measured in sizes:
        best = min(one.us for one in measured)
        predicted = [one.predicted_us() for one in measured]
        cost.append(measured[predicted.index(min(predicted))].us / best)
        for one, us in zip(measured, predicted, strict=True):
            weight = math.exp(-4 * (one.us / best - 1)) + 0.03
            total += weight * math.log(us / one.us) ** 2
            weights += weight
    worst = statistics.mean(sorted(cost)[-8:]) - 1
    return math.sqrt(total / weights) + 2 * math.log(statistics.geometric_mean(cost)) + 0.15 * worst


def walk(sizes: list[list[Measured]], steps: int, seed: int) -> None:
    """Change some constants at a time, and keep what is better."""
    generator, least = random.Random(seed), error(sizes)
    for step in range(steps):
        before = {name: getattr(sm90_config, name) for name in CONSTANTS}
        spread = generator.choice((0.02, 0.1, 0.3))
        for name in generator.sample(CONSTANTS, generator.randint(1, 4)):
            setattr(sm90_config, name, before[name] * math.exp(generator.gauss(0, spread)))
        now = error(sizes)
        if now < least:
            least = now
        else:
            for name, value in before.items():
                setattr(sm90_config, name, value)
        if step % 100 == 0:
            print(f"{step} steps: error {least:.4f}", flush=True)


def main(command_line: list[str] | None = None) -> list[float]:
    """Print what the model's choices cost, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=Path, nargs="+", default=[RESULTS / name for name in FILES], metavar="FILE")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(command_line)
    sizes = load(arguments.times)
    if arguments.steps:
        walk(sizes, arguments.steps, arguments.seed)
        print(*(f"{name} = {getattr(sm90_config, name):.4g}" for name in CONSTANTS), sep="\n")
    cost = costs(sizes)
    print(f"{len(cost)} sizes: choices cost {statistics.geometric_mean(cost):.3f} of the best, at worst {max(cost):.3f}")
    return cost


if __name__ == "__main__":
    main()

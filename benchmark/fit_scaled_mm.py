"""The cost model of `scaled_mm` on Hopper beside measured times: what its choices cost, and constants that fit better.

    python benchmark/fit_scaled_mm.py                      # what the model's choices cost beside the best that were measured
    python benchmark/fit_scaled_mm.py --generations 200    # differential evolution from today's constants; prints better ones

Needs no GPU. The times are benchmark/results/scaled_mm_choices_h200.csv, or another file of its columns. The error is that of
the logarithms of times, weighted towards each size's best, and the time that the choices cost.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import statistics
import sys
from collections import defaultdict
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tilelang_ext.kernels.scaled_mm import sm90_config, tuning  # noqa: E402
from tilelang_ext.kernels.scaled_mm.selection import as_data  # noqa: E402
from tilelang_ext.launch.device import Target  # noqa: E402

TIMES = ROOT / "benchmark" / "results" / "scaled_mm_choices_h200.csv"
H200 = Target("cuda", "sm_90a", 132)
KIND = {"fast": "row_fast", "rows": "row", "blocks": "block"}
POPULATION, SPREAD = 40, 0.3
LEAST = {"alone": 1.0, "swapped": 0.9, "straddle": 1.0, "divided": 1.0}  # of factors; of all others as good as 0


@dataclass(frozen=True)
class Measured:
    """One choice of one size."""

    problem: object
    choice: sm90_config.Choice
    us: float


def load(path: Path) -> list[list[Measured]]:
    """Return the measured choices of each size; those that are no choices any more are left out."""
    by_size = defaultdict(list)
    with open(path) as file:
        for row in csv.DictReader(file):
            if row["us"]:
                by_size[row["kind"], f"{row['M']}x{row['N']}x{row['K']}"].append(row)
    found = []
    for (kind, size), rows in by_size.items():
        [case] = tuning.cases([size], (), (KIND[kind],), H200)
        known = {_text(as_data(choice)): choice for choice in sm90_config.choices(case.problem)}
        named = [(known.get(_text_of_row(row)), float(row["us"])) for row in rows]
        found.append([Measured(case.problem, choice, us) for choice, us in named if choice is not None])
    return [measured for measured in found if measured]


def _text(data: dict) -> str:
    return f"{data['kernel']} {sorted((name, str(value)) for name, value in data['config'].items() if name != 'num_blocks')}"


def _text_of_row(row: dict) -> str:
    other = ("kind", "M", "N", "K", "kernel", "us", "error")
    row = row | {"divides_k": row["divides_k"] or "False"} if row["kernel"] == "sm90_persistent" else row
    return f"{row['kernel']} {sorted((name, value) for name, value in row.items() if name not in other and value)}"


def costs(sizes: list[list[Measured]]) -> list[float]:
    """Return, for each size, the time of the model's choice among those measured over the best."""
    found = []
    for measured in sizes:
        chosen = min(measured, key=lambda one: sm90_config.predicted_us(one.choice, one.problem))
        found.append(chosen.us / min(one.us for one in measured))
    return found


def error(sizes: list[list[Measured]]) -> float:
    """Return what the fit makes small."""
    total = weights = 0.0
    cost = []
    for measured in sizes:
        best = min(one.us for one in measured)
        predicted = [sm90_config.predicted_us(one.choice, one.problem) for one in measured]
        cost.append(measured[predicted.index(min(predicted))].us / best)
        for one, us in zip(measured, predicted, strict=True):
            weight = math.exp(-2 * (one.us / best - 1)) + 0.03
            total += weight * math.log(us / one.us) ** 2
            weights += weight
    worst = statistics.mean(sorted(cost)[-5:]) - 1
    return math.sqrt(total / weights) + 2 * math.log(statistics.geometric_mean(cost)) + 0.15 * worst


def constants() -> list[float]:
    """Return the model's constants as one list; those of rows are not fitted."""
    flat = [value for kind in ("fast", "blocks") for value in astuple(sm90_config.MODELS[kind])]
    for value in astuple(sm90_config.SHARED):
        flat += value if isinstance(value, tuple) else [value]
    return flat


def least() -> list[float]:
    """Return the least of each of the constants."""
    of_model = [LEAST.get(field.name, 1e-9) for field in fields(sm90_config.Model)]
    return 2 * of_model + [1e-9] * (len(constants()) - 2 * len(of_model))


def set_constants(values: list[float]) -> None:
    """Give the model of this process other constants."""
    rest = list(values)
    for kind in ("fast", "blocks"):
        sm90_config.MODELS[kind] = sm90_config.Model(*(rest.pop(0) for _ in fields(sm90_config.Model)))
    shared = []
    for value in astuple(sm90_config.SHARED):
        shared.append(tuple(rest.pop(0) for _ in value) if isinstance(value, tuple) else rest.pop(0))
    sm90_config.SHARED = sm90_config.Shared(*shared)


def evolve(sizes: list[list[Measured]], generations: int, seed: int) -> list[float]:
    """Return better constants."""
    generator, start, floor = random.Random(seed), constants(), least()

    def error_of(values: list[float]) -> float:
        set_constants(values)
        return error(sizes)

    start = list(map(max, start, floor))
    people = [start]
    people += [
        [max(v * generator.uniform(1 - SPREAD, 1 + SPREAD), low) for v, low in zip(start, floor, strict=True)]
        for _ in range(POPULATION - 1)
    ]
    errors = [error_of(values) for values in people]
    for _ in range(generations):
        for i in range(POPULATION):
            best = people[errors.index(min(errors))]
            one, other, base = generator.choice(people), generator.choice(people), generator.choice([best, people[i]])
            scale = generator.uniform(0.4, 0.9)
            mixed = [
                max(b + scale * (x - y), low) if generator.random() < 0.8 else own
                for b, x, y, own, low in zip(base, one, other, people[i], floor, strict=True)
            ]
            if (new := error_of(mixed)) < errors[i]:
                people[i], errors[i] = mixed, new
    return people[errors.index(min(errors))]


def main(command_line: list[str] | None = None) -> list[float]:
    """Print what the model's choices cost, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=Path, default=TIMES, metavar="FILE")
    parser.add_argument("--generations", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(command_line)
    sizes = load(arguments.times)
    if arguments.generations:
        set_constants(evolve(sizes, arguments.generations, arguments.seed))
        print(sm90_config.MODELS, sm90_config.SHARED, sep="\n")
    cost = costs(sizes)
    print(
        f"{len(cost)} sizes and kinds: choices cost {statistics.geometric_mean(cost):.3f} of the best, at worst {max(cost):.3f}"
    )
    return cost


if __name__ == "__main__":
    main()

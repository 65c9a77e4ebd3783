"""Times of a new run beside the committed ones: what moved by more than a limit.

    python benchmark/compare_results.py benchmark/results/matmul_h200_float16.csv new.csv
    python benchmark/compare_results.py benchmark/results/grid_h200.csv seed7.csv seed11.csv --limit 5

Rows are the same if they agree in all columns that say what was measured (`WHAT`) and that both files have; several times of
one row count by their median, and a row that one file lacks is no error. A GPU may be slower as a whole: the ratio of each
provider's times is printed too, over all rows, and beside each row of ours the ratio of the peers in the same case. Ends with
status 1 if a row of ours is slower by more than the limit, also beside its peers.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

WHAT = (
    *("case", "M", "N", "K", "layout", "dtype", "recipe", "model", "tokens", "a_dtype", "batch", "state", "head_dim", "causal"),
    *("kind", "kernel", "block_M", "block_N", "cluster", "thin", "splits", "provider"),
)
LIMIT = 2.0  # percent
Key = tuple[str, ...]


def read(paths: Sequence[Path]) -> list[dict]:
    """Return the rows of CSV files that have a time."""
    rows = []
    for path in paths:
        with open(path, newline="") as file:
            rows += [row for row in csv.DictReader(file) if row.get("us")]
    return rows


def times_of(rows: Sequence[dict], columns: Sequence[str]) -> dict[Key, float]:
    """Return the median time for each combination of the values in `columns`."""
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[column] for column in columns)].append(float(row["us"]))
    return {key: statistics.median(times) for key, times in found.items()}


def is_ours(provider: str) -> bool:
    return not provider or provider.startswith(("ours", "plan", "scaled_mm", "intrinsic"))


def moved(before: Sequence[dict], after: Sequence[dict], limit: float = LIMIT) -> tuple[list[dict], dict[str, float]]:
    """Return the rows whose time differs by more than `limit` percent, most first, and each provider's mean ratio.

    A row has its `key`, both times, `ratio` (new over old) and `peers`, the geometric mean of the ratios of the other providers
    of its case, None if there is none.
    """
    if not before or not after:
        return [], {}
    columns = [column for column in WHAT if column in before[0] and column in after[0]]
    old, new = times_of(before, columns), times_of(after, columns)
    provider_at = columns.index("provider") if "provider" in columns else None

    def provider_of(key: Key) -> str:
        return "" if provider_at is None else key[provider_at]

    ratios = {key: new[key] / old[key] for key in new if key in old}
    by_provider, of_peers = defaultdict(list), defaultdict(list)
    for key, ratio in ratios.items():
        by_provider[provider_of(key)].append(ratio)
        if not is_ours(provider_of(key)):
            of_peers[_case(key, provider_at)].append(ratio)
    rows = []
    for key, ratio in ratios.items():
        if abs(math.log(ratio)) > math.log1p(limit / 100):
            peers = of_peers.get(_case(key, provider_at)) if is_ours(provider_of(key)) else None
            mean = statistics.geometric_mean(peers) if peers else None
            rows.append({"key": key, "before": old[key], "after": new[key], "ratio": ratio, "peers": mean})
    rows.sort(key=lambda row: -row["ratio"])
    return rows, {provider: statistics.geometric_mean(all_of) for provider, all_of in by_provider.items()}


def _case(key: Key, provider_at: int | None) -> Key:
    return key if provider_at is None else key[:provider_at] + key[provider_at + 1 :]


def is_slower(row: dict, limit: float) -> bool:
    """Whether a row took longer by more than `limit` percent, and longer than its peers' change explains."""
    longest = 1 + limit / 100
    return row["ratio"] > longest and (row["peers"] is None or row["ratio"] / row["peers"] > longest)


def main(command_line: list[str] | None = None) -> int:
    """Print what moved, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("committed", type=Path)
    parser.add_argument("new", type=Path, nargs="+")
    parser.add_argument("--limit", type=float, default=LIMIT, help="percent")
    arguments = parser.parse_args(command_line)
    if not arguments.committed.exists():
        print(f"{arguments.committed.name}: not committed yet; nothing to compare with")
        return 0
    before, after = read([arguments.committed]), read(arguments.new)
    rows, means = moved(before, after, arguments.limit)
    counts = f"{len(before)} times, {len(after)} new; {len(rows)} moved by more than {arguments.limit:g}%"
    print(f"{arguments.committed.name}: {counts}")
    for provider, ratio in means.items():
        print(f"  {provider or 'all'}: new / old {ratio:.3f} in the mean")
    status = 0
    for row in rows:
        slower = is_ours(row["key"][-1]) and is_slower(row, arguments.limit)
        status |= slower
        beside = "" if row["peers"] is None else f", its peers {row['peers']:.3f}"
        name = " ".join(filter(None, row["key"]))
        mark = "slower: " if slower else ""
        print(f"  {mark}{name}: {row['before']:.2f} -> {row['after']:.2f} us, {row['ratio']:.3f}{beside}")
    return status


if __name__ == "__main__":
    sys.exit(main())

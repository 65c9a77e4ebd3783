"""`tilelang-ext tune`: measure which kernel and configuration is fastest here, and write a table that operators read.

Every result is compared with float64 before it is timed. Each measurement is a line of a journal beside the table as soon as it
is made, so that a run that is interrupted goes on where it ended: what is in the journal is not measured again.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from tilelang_ext.launch import tables
from tilelang_ext.launch.device import target_of
from tilelang_ext.launch.record import kernel

OPERATORS = ("scaled_mm",)
CANDIDATES = 12
_L2_CACHES = 3  # inputs rotate through more than so many
_CHAIN, _CHAIN_US = 24, 2000.0  # calls of a graph, or fewer that take this long
_WARM_UP, _REPLAYS = 2, 9


def tune(
    operator: str,
    sizes: Sequence[str],
    matmuls: Sequence[tuple[int, int]] = (),
    *,
    kinds: Sequence[str] | None = None,
    candidates: int = CANDIDATES,
    processes: int | None = None,
    path: Path | None = None,
) -> Path:
    """Measure the choices for some sizes on this GPU, and return the path of the table written.

    `sizes` are as "16x4096x7168", M, N and K; `matmuls` (N, K) of which each batch size is measured; `kinds` of
    `tuning.KINDS` (None: all); `candidates` the choices per size, those that the model predicts to be fastest. The table holds
    what was measured in earlier runs too. Raises ValueError for sizes that cannot be tuned, RuntimeError without an NVIDIA GPU.
    """
    if not torch.cuda.is_available() or torch.version.hip:
        raise RuntimeError("tune: must run on an NVIDIA GPU; got none that torch sees; run it on the machine that serves")
    tuning = importlib.import_module(f"tilelang_ext.kernels.{operator}.tuning")
    device = torch.device("cuda", torch.cuda.current_device())
    cases = tuning.cases(sizes, matmuls, tuple(kinds or tuning.KINDS), target_of(operator, device))
    identity = tables.identity(operator, torch.cuda.get_device_name(device), tuning.KERNELS)
    path = path or tables.folder() / tables.file_of(operator, identity["device"])
    with Journal(path.with_suffix(".jsonl"), identity) as journal:
        wanted = [
            (case, choice)
            for case in cases
            for choice in case.choices(candidates)
            if (case.key, _text(case.data(choice))) not in journal.measured
        ]
        _compile(wanted, target_of(operator, device).arch, processes)
        for number, (case, choices) in enumerate(_by_case(wanted), 1):
            for done, (choice, us, error) in enumerate(_measure(case, choices), 1):
                journal.add(case.key, case.data(choice), us, error)
                line = f"\r{number} of {len({case.key for case, _ in wanted})} sizes, {done} of {len(choices)} of {case.name}"
                print(f"{line:100}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        write(path, identity, journal.rows)
    return path


class Journal:
    """The measurements of one table, a line each, written as they are made.

    One of another device, of other versions or sources is put aside with one line, as `<name>.old`. A last line that was cut
    short is dropped, and measured again.
    """

    def __init__(self, path: Path, identity: dict):
        self.path, self.rows = path, []
        lines = self._lines()
        if lines and lines[0] != identity:
            os.replace(path, path.with_suffix(".old"))
            print(f"tune: {path.name} is of another device, version or commit: it is now {path.stem}.old", file=sys.stderr)
            lines = []
        self.rows += lines[1:]
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:  # again, so that nothing is left of a line that was cut short
            file.writelines(_text(line) + "\n" for line in [identity, *self.rows])
        self._file = open(path, "a")  # noqa: SIM115 -- closed by __exit__

    def _lines(self) -> list[dict]:
        found = []
        with contextlib.suppress(OSError, ValueError):
            for line in self.path.read_text().splitlines():
                found.append(json.loads(line))
        return found

    @property
    def measured(self) -> set[tuple[str, str]]:
        """The keys of problems with the choices that were measured for them."""
        return {(row["key"], _text(row["choice"])) for row in self.rows}

    def add(self, key: str, choice: dict, us: float | None, error: str | None) -> None:
        """Keep a measurement: its time, or what was wrong with the result."""
        self.rows.append({"key": key, "choice": choice, "us": us, **({"error": error} if error else {})})
        self._file.write(_text(self.rows[-1]) + "\n")
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def write(path: Path, identity: dict, measurements: Iterable[dict]) -> None:
    """Write a table: for each problem the fastest choice whose result was right, and every time that was measured."""
    by_key: dict[str, list[dict]] = {}
    for row in measurements:
        by_key.setdefault(row["key"], []).append({name: value for name, value in row.items() if name != "key"})
    rows = []
    for key, measured in by_key.items():
        right = [row for row in measured if row["us"] is not None]
        if right:
            best = min(right, key=lambda row: row["us"])
            rows.append({"key": key, "choice": best["choice"], "us": best["us"], "measured": measured})
    head = json.dumps({**identity, "commit": _commit(), "torch": torch.__version__}, indent=1).removesuffix("\n}")
    lines = ",\n".join(json.dumps(row) for row in rows)
    temporary = path.with_suffix(".part")
    temporary.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    os.replace(temporary, path)


def _commit() -> str | None:
    """Return the commit of the checkout that this package is in, for people to read; None where it is in none."""
    done = subprocess.run(
        ["git", "-C", str(tables.PACKAGE), "describe", "--always", "--dirty", "--abbrev=10"], capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else None


def _text(data: dict) -> str:
    return json.dumps(data, sort_keys=True)


def _by_case(wanted: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, list]]:
    grouped: dict[str, tuple[Any, list]] = {}
    for case, choice in wanted:
        grouped.setdefault(case.key, (case, []))[1].append(choice)
    yield from grouped.values()


# --- compiling -------------------------------------------------------------------------------------------------------


def _compile(wanted: Iterable[tuple[Any, Any]], arch: str, processes: int | None) -> None:
    """Compile every kernel into the cache, in parallel; one that cannot be compiled is found out when it is measured."""
    jobs: dict[tuple, None] = {}

    def add(make: Callable, *arguments, pass_configs=None) -> None:
        jobs[make, arguments, arch, tuple((pass_configs or {}).items())] = None

    for case, choice in wanted:
        case.compile_choice(choice, add)
    if not jobs:
        return
    with ProcessPoolExecutor(
        min(processes or os.cpu_count() or 1, len(jobs)), mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        futures = [pool.submit(_compile_one, job) for job in jobs]
        for done, _ in enumerate(as_completed(futures), 1):
            print(f"\r{done} of {len(jobs)} kernels compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def _compile_one(job: tuple) -> None:
    kernel(*job)


# --- measuring -------------------------------------------------------------------------------------------------------


def _measure(case: Any, choices: Sequence[Any]) -> Iterator[tuple[Any, float | None, str | None]]:
    """Yield choices with the microseconds of a call, or with what is wrong."""
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    sets = max(2, min(64, math.ceil(_L2_CACHES * cache_bytes / case.bytes)))
    inputs = [case.inputs(seed) for seed in range(sets)]
    expected = case.expected(inputs[0])
    for choice in choices:
        out = inputs[0][-1].fill_(torch.nan)
        try:
            run = case.launcher(choice, inputs[0])
            run(inputs[0])
            error = case.error(out, expected)
        except (RuntimeError, ValueError) as failure:
            error = str(failure).partition("\n")[0]
        yield choice, None if error else _time(run, inputs), error


def _time(run: Callable[[tuple], None], inputs: Sequence[tuple]) -> float:
    """Return the microseconds of a call: calls chained in one CUDA graph over the inputs, median replay over their number."""
    one = _replays(_graph(run, inputs), 2)[-1] / len(inputs)
    rounds = max(1, min(math.ceil(_CHAIN / len(inputs)), math.ceil(_CHAIN_US / (one * len(inputs)))))
    times = _replays(_graph(run, list(inputs) * rounds), _WARM_UP + _REPLAYS)[_WARM_UP:]
    return statistics.median(times) / (rounds * len(inputs))


def _graph(run: Callable[[tuple], None], inputs: Sequence[tuple]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for arguments in inputs:
            run(arguments)
    return graph


def _replays(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    times = []
    for _ in range(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times

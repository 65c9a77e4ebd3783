"""What benchmarks share: providers, timing, tables, CSV files and plots. A benchmark gives one row per provider and case.

How CUDA is timed: one graph chains a call for each of several inputs that together exceed the L2 cache; the median time
of a replay is divided by the number of calls. So a figure contains neither a launch gap nor a warm cache. The GPU is busy while
the host enqueues a replay: until 2026-12-01 it was idle, and the calls of a replay shared that gap, by a fit some 10 to 35 us.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "testing"))

L2_CACHES = 3  # inputs rotate through this many times the L2 cache
MAX_ROTATION = 64
REPLAYS = 20
WARM_UP = 3  # replays before those that count
ENQUEUE_CYCLES = 500_000  # of the GPU, some 0.3 ms: longer than a host needs to enqueue a graph
CHAIN, CHAIN_US = 24, 3000.0  # a graph has this many calls, or fewer that take this long
BARS_IN_A_ROW = 24  # per row of a chart
MAC_CACHE_BYTES = 64 * 2**20  # more than the system-level cache of any Apple chip up to M4 Max
MMA_MULTIPLICATIONS = 8 * 8 * 8  # of one simdgroup matrix product
SIMULATOR_SECONDS = 600.0
METHOD = {
    "cuda": "Time: one CUDA graph over rotated inputs (more than the L2 cache), median replay / calls; results checked first.",
    "mps": "Time: calls queued over rotated inputs, wall clock, median / calls; results checked first.",
    "cpu": "CPU time, ours on one thread, torch perhaps on more. This target is for correctness.",
}


@dataclass(frozen=True)
class Provider:
    """One implementation: `make(case)` returns `run(*inputs, output)`; `targets` are the devices it exists on."""

    name: str
    what: str
    targets: tuple[str, ...]
    make: Callable


@dataclass(frozen=True)
class Column:
    """A column of a table: the row's key, its heading, and how its value is written (None: a dash)."""

    key: str
    heading: str
    form: str = ""

    def text(self, row: dict) -> str:
        value = row.get(self.key)
        return "-" if value is None else format(value, self.form)


TIMES = (
    Column("case", "M x N x K"),
    Column("provider", "provider"),
    Column("us", "us", ",.1f"),
    Column("tflops", "TFLOP/s", ".1f"),
    Column("gbps", "GB/s", ",.0f"),
    Column("speed_of_torch", "speed / torch's", ".2f"),
    Column("max_error", "max error", ".1e"),
)
LOWERED = (
    Column("case", "M x N x K"),
    Column("provider", "provider"),
    Column("lines", "lines of text"),
    Column("status", "status"),
)


def options(description: str, targets: Sequence[str], auto: str, providers: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of a benchmark's command line with the options that all have; `auto` explains target "auto"."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=targets, default="auto", help=f"auto: {auto}")
    among = ", ".join(providers)
    parser.add_argument("--providers", nargs="+", metavar="NAME", help=f"among {among}; default: all there are here")
    parser.add_argument("--csv", metavar="FILE", help="write every figure")
    parser.add_argument("--plot", metavar="FILE", help="draw a chart (png, svg or pdf)")
    parser.add_argument("--seed", type=int, default=0, help="of what is random: inputs, the simulator's order of threads")
    return parser


def sizes_of(arguments: argparse.Namespace, default: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """--m, --n and --k together: as many cases as the longest list; a single value serves all."""
    lists = [arguments.m, arguments.n, arguments.k]
    if not any(lists):
        return default
    lists = [given or next(other for other in lists if other) for given in lists]
    cases = max(len(given) for given in lists)
    if any(len(given) not in (1, cases) for given in lists):
        raise SystemExit(f"--m, --n, --k: must have one value or as many each; got {[len(v) for v in lists]}; repeat values")
    return list(zip(*(given * (cases // len(given)) for given in lists), strict=True))


def choose(providers: Iterable[Provider], names: Sequence[str], target: str) -> tuple[list[Provider], list[str]]:
    """Return the providers of that name that exist on `target`, and a sentence for each that does not."""
    known = {provider.name: provider for provider in providers}
    for name in names:
        if name not in known:
            raise SystemExit(f"--providers: must be among {', '.join(known)}; got {name}; pass one of these")
    chosen = [known[name] for name in names if target in known[name].targets]
    absent = [
        f"{name}: left out, exists on {', '.join(known[name].targets)}; the target is {target}"
        for name in names
        if target not in known[name].targets
    ]
    return chosen, absent


def progress(items: Sequence, what: str) -> Iterator:
    """Yield `items` under a progress bar, which vanishes when done; without one where the output is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty(), console=_console(stderr=True)) as bar:
        yield from bar.track(items, description=what)


def show(title: str, rows: Sequence[dict], columns: Sequence[Column], notes: Sequence[str] = ()) -> None:
    """Print rows as one table, and the notes below; a repeated first cell is written once."""
    from rich.table import Table

    console = _console()
    padding = (0, 2 if console.width >= 100 else 1, 0, 0)
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=padding)
    for i, column in enumerate(columns):
        table.add_column(
            column.heading, no_wrap=True, justify="left" if i == 0 or isinstance(rows[0].get(column.key), str) else "right"
        )
    previous = None
    for row in rows:
        cells = [column.text(row) for column in columns]
        first, cells[0] = cells[0], "" if cells[0] == previous else cells[0]
        previous = first
        table.add_row(*cells, style=None if row.get("findings") in (None, 0) else "red")
    console.print(table)
    for note in notes:
        console.print(f"  {note}", highlight=False, markup=False, style="dim")


def _console(**options):
    """Return the width of the terminal, or 120 columns for a file."""
    from rich.console import Console

    console = Console(**options)
    return console if console.is_terminal else Console(width=120, **options)


def write_csv(path: str, rows: Sequence[dict]) -> None:
    """Write every key of every row, one line per row."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)


def plot(path: str, rows: Sequence[dict], *, case: str, series: str, value: str, title: str, label: str, order=()) -> None:
    """Draw grouped bars: one group per `case`, one bar per `series`, as high as `value`; the suffix of `path` is the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    rows = [row for row in rows if row.get(value) is not None]
    if not rows:
        raise SystemExit(f"--plot: needs rows with {label}; got none; leave it out for this target")
    cases = list(dict.fromkeys(row[case] for row in rows))
    names = [n for n in order if any(r[series] == n for r in rows)] or list(dict.fromkeys(row[series] for row in rows))
    width = 0.8 / len(names)
    in_a_row = max(1, min(len(cases), BARS_IN_A_ROW // len(names)))
    panels = [cases[begin : begin + in_a_row] for begin in range(0, len(cases), in_a_row)]
    size = max(5.0, 1.2 + in_a_row * (0.7 + 0.55 * len(names))), 0.4 + 3.4 * len(panels)
    figure, plots = pyplot.subplots(len(panels), 1, figsize=size, layout="constrained", squeeze=False)
    for axes, here in zip(plots[:, 0], panels, strict=True):
        for i, name in enumerate(names):
            drawn = [(here.index(row[case]), row[value]) for row in rows if row[series] == name and row[case] in here]
            places = [place + (i - (len(names) - 1) / 2) * width for place, _ in drawn]
            bars = axes.bar(places, [height for _, height in drawn], width * 0.92, label=name, color=f"C{i}", zorder=2)
            axes.bar_label(bars, fmt=lambda v: f"{v:.3g}" if v < 1000 else f"{v:,.0f}", padding=2, fontsize=8)
        axes.set_xticks(range(len(here)), here)
        axes.set_xlim(-0.5, in_a_row - 0.5)
        axes.set_ylabel(label)
        axes.margins(y=0.15)
        axes.grid(axis="y", color="0.9", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    plots[0, 0].set_title(title, loc="left", fontsize=10)
    # Not by what the last panel shows: a series without a bar there would have lost its colour.
    colours = [Patch(color=f"C{i}", label=name) for i, name in enumerate(names)]
    options = {"frameon": False, "fontsize": 8, "ncols": len(names), "loc": "upper left", "bbox_to_anchor": (0, -0.12)}
    plots[-1, 0].legend(handles=colours, **options)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def plot_lines(path: str, rows: Sequence[dict], *, panel: str, x: str, series: str, value: str, title: str, label: str) -> None:
    """Draw lines over a logarithmic `x`: one panel per `panel`, one line per `series`; the suffix of `path` is the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.get(value) is not None]
    if not rows:
        raise SystemExit(f"--plot: needs rows with {label}; got none; leave it out for this target")
    panels = list(dict.fromkeys(row[panel] for row in rows))
    names = list(dict.fromkeys(row[series] for row in rows))
    figure, plots = pyplot.subplots(1, len(panels), figsize=(1 + 4 * len(panels), 4.4), layout="constrained", squeeze=False)
    for axes, place in zip(plots[0], panels, strict=True):
        here = [row for row in rows if row[panel] == place]
        for i, name in enumerate(names):
            points = sorted((row[x], row[value]) for row in here if row[series] == name)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1.2, color=f"C{i}", label=name, zorder=2)
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=label)
        ticks = sorted({row[x] for row in here})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_title(place, loc="left", fontsize=10)
        axes.grid(color="0.9", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {text: line for axes in plots[0] for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, ncols=len(names), loc="outside lower left")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def rotation(bytes_of_one: int, cache_bytes: int) -> int:
    """Return how many inputs fill L2_CACHES caches."""
    return max(2, min(MAX_ROTATION, math.ceil(L2_CACHES * cache_bytes / bytes_of_one)))


def cache_bytes(device: str) -> int:
    """Return the bytes of the last-level cache: the L2 of the CUDA device; on a Mac an upper limit."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else MAC_CACHE_BYTES


def time_cuda(calls: Sequence[Callable[[], None]], replays: int = REPLAYS) -> float:
    """Return the microseconds of one call: all `calls` chained in one CUDA graph, median replay over their number."""
    return time_cuda_in_turn([calls], replays)[0]


def time_cuda_in_turn(providers: Sequence[Sequence[Callable[[], None]]], replays: int = REPLAYS) -> list[float]:
    """Return `time_cuda` of several, one replay of each in turn, so that a GPU that slows down as it warms does so for all."""
    # What a replay itself costs is shared by its calls; all providers have equally many.
    one_round = min(_replay(_graph(calls), rounds=2) for calls in providers)
    count = min(math.ceil(CHAIN / len(providers[0])), math.ceil(CHAIN_US / one_round))
    providers = [list(calls) * count for calls in providers]
    graphs = [_graph(calls) for calls in providers]
    times: list[list[float]] = [[] for _ in graphs]
    for replay in range(WARM_UP + replays):
        order = range(len(graphs)) if replay % 2 else range(len(graphs) - 1, -1, -1)
        for provider in order:
            times[provider].append(_replay(graphs[provider]))
    return [statistics.median(own[WARM_UP:]) / len(calls) for own, calls in zip(times, providers, strict=True)]


def _replay(graph: torch.cuda.CUDAGraph, rounds: int = 1) -> float:
    """Return the microseconds of the last of some replays."""
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(ENQUEUE_CYCLES)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) * 1e3


def _graph(calls: Sequence[Callable[[], None]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, allocates workspaces and warms up outside the graph
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_wall(calls: Sequence[Callable[[], object]], wait: Callable[[list], None], repeats: int = REPLAYS) -> float:
    """Return the microseconds of one call by the clock: all `calls` are queued, then `wait(results)`; median over their number.

    For devices without graphs (MPS, MLX) the queue hides the launches; on the CPU `wait` does nothing.
    """
    times = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        wait([call() for call in calls])
        if repeat:  # the first warms up
            times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times) / len(calls)


def time_mps(calls: Sequence[Callable[[], None]]) -> float:
    """Return the microseconds of one call on torch's MPS stream."""
    return time_wall(calls, lambda _: torch.mps.synchronize())


def time_mlx(calls: Sequence[Callable[[], object]]) -> float:
    """Return the microseconds of one call that returns an mx.array; all are evaluated together."""
    import mlx.core as mx

    return time_wall(calls, mx.eval)


def usable_cuda() -> str | None:
    """Return None if a CUDA kernel runs here, else why not."""
    if not torch.cuda.is_available():
        return "torch sees no such GPU"
    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def find_device(target: str) -> tuple[str, str, str | None]:
    """Return the target that "auto" stands for, the device it runs on here, and why on none."""
    mps = torch.backends.mps.is_available()
    no_gpu = usable_cuda()
    if target == "auto":
        target = "metal" if no_gpu else "hip" if torch.version.hip else "cuda"
    if target == "c":
        return target, "cpu", None
    if target in ("metal", "metal4"):
        return target, "mps" if mps else "simulator", None
    if not no_gpu and (target == "hip") != bool(torch.version.hip):
        no_gpu = f"this torch is built for {'ROCm' if torch.version.hip else 'CUDA'}"
    return target, "none" if no_gpu else "cuda", no_gpu


def describe(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    return {"mps": "Apple GPU", "simulator": "in the simulator", "cpu": "on the CPU", "none": "no device"}[device]

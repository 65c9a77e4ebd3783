"""FP8 scaled matmul: `scaled_mm` of this package beside torch's, vLLM's CUTLASS kernels and DeepGEMM, or its operation counts.

    python benchmark/bench_scaled_matmul.py                            # the best device here
    python benchmark/bench_scaled_matmul.py --target cuda --recipes row block --csv scaled.csv --plot scaled.png
    python benchmark/bench_scaled_matmul.py --target metal --m 1 64 --n 256 --k 512

Every result is checked against float64 before anything is timed or counted. Without a Mac, targets metal and metal4 run in
the simulator, which counts operations and says nothing of speed. vLLM and DeepGEMM take part where they can be imported; an
unpacked vLLM library can be named by --library, and DeepGEMM finds CUTLASS by CPATH.
"""

import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), str(ROOT / "testing")]

import tilelang  # noqa: E402
from harness import (  # noqa: E402
    LOWERED,
    METHOD,
    MMA_MULTIPLICATIONS,
    SIMULATOR_SECONDS,
    TIMES,
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
    sizes_of,
    time_cuda_in_turn,
    time_mps,
    write_csv,
)
from numeric import BOUNDS, assert_close  # noqa: E402
from scaled_mm_peers import (  # noqa: E402
    ASSUMED_ARCH,
    DTYPES,
    FAST_ERROR,
    PROVIDERS,
    RECIPES,
    TAKES,
    TENSOR_CORE_ERROR,
    Case,
    Inputs,
    installed,
)
from tvm.target import Target  # noqa: E402

from tilelang_ext import simulate  # noqa: E402
from tilelang_ext.kernels.scaled_mm import tiled, vecmat  # noqa: E402

TARGETS = ("auto", "metal", "metal4", "cuda")
SIZES = {
    "cuda": [
        (8192,) * 3, (4096, 7168, 2048), (4096, 4096, 7168), (128, 4096, 7168), (128, 7168, 2048), (64, 2112, 7168),
        (16, 4096, 7168), (1, 4096, 7168),
    ],
    "mps": [(1, 4096, 4096), (64, 4096, 4096), (2048,) * 3],
    "simulator": [(1, 256, 2048), (4, 256, 2048), (64, 128, 256), (100, 150, 288)],
}  # fmt: skip


COUNTS = (
    Column("case", "M x N x K"),
    Column("provider", "kernel"),
    Column("mma", "MMAs", ","),
    Column("device_bytes_read", "device\nread, B", ","),
    Column("device_bytes_written", "device\nwritten, B", ","),
    Column("read_per_weight", "read / B's\nbytes", ".3f"),
    Column("threadgroup_barriers", "barriers", ","),
    Column("findings", "find-\nings"),
    Column("max_error", "max\nerror", ".1e"),
)


def count(case: Case, providers: list[Provider], seed: int) -> list[dict]:
    """Run the Metal text in the simulator: counts beside the fewest that these tiles allow."""
    kernel, _ = case.kernel
    inputs, out = case.by_blocks(seed), case.output()
    arguments = inputs.a, inputs.scale_a, inputs.b, inputs.scale_b, out
    report = simulate(kernel, *arguments, target=case.target, seed=seed, timeout=SIMULATOR_SECONDS)
    error = assert_close(out, case.expected(inputs), dtype=case.dtype)
    for finding in report.findings:
        print(finding, file=sys.stderr)
    ours = {
        "mma": report.counts.mma,
        "device_bytes_read": report.counts.device_bytes_read,
        "device_bytes_written": report.counts.device_bytes_written,
        "threadgroup_barriers": report.counts.threadgroup_barriers,
        "findings": len(report.findings),
        "max_error": error.max,
    }
    rows = []
    for name, values in (("ours", ours), ("minimum", bare_minimum(case))):
        row = {"case": case.name, "dtype": case.dtype, "target": case.target, "provider": name, **values}
        rows.append({**row, "read_per_weight": values["device_bytes_read"] / (case.N * case.K)})
    return rows


def bare_minimum(case: Case) -> dict:
    """Whole tiles of products; A and B read once by each threadgroup that needs them, C written once; scales left out."""
    _, config = case.kernel
    written = case.M * case.N * case.torch_dtype.itemsize
    if vecmat.takes(case.problem):
        threadgroups = -(-case.N // (config.rows * config.passes))
        read = case.N * case.K + threadgroups * case.M * case.K
        return {"mma": 0, "device_bytes_read": read, "device_bytes_written": written}
    rows, cols = -(-case.M // config.block_M), -(-case.N // config.block_N)
    block_K = tiled.BLOCK_K
    products = rows * cols * config.block_M * config.block_N * -(-case.K // block_K) * block_K
    read = cols * case.M * case.K + rows * case.N * case.K
    return {"mma": products // MMA_MULTIPLICATIONS, "device_bytes_read": read, "device_bytes_written": written}


def measure_time(case: Case, providers: list[Provider], seed: int) -> list[dict]:
    """Check, then time: every provider on the same inputs, which rotate through more than the cache."""
    sets = rotation(case.bytes, cache_bytes(case.device))
    made = [case.by_blocks(seed + i, case.device if case.device == "cuda" else "cpu") for i in range(sets)]
    expected = case.expected(made[0])
    inputs = [Inputs(*(tensor.to(case.device) for tensor in case.as_torch(one))) for one in made]
    outputs = [case.output(case.device) for _ in range(sets)]
    rows, chains = [], []
    for provider in (provider for provider in providers if case.recipe in TAKES[provider.name]):
        run = provider.make(case)
        outputs[0].fill_(torch.nan)
        try:
            run(inputs[0], outputs[0])
        except (RuntimeError, ValueError) as error:
            if provider.name.startswith("ours"):
                raise
            print(f"{case.name}: {provider.name} left out: {error}", file=sys.stderr)
            continue
        fast = provider.name.endswith("fast") or (provider.name == "vllm" and case.recipe != "block")
        sum_error = FAST_ERROR if fast else TENSOR_CORE_ERROR
        error = assert_close(outputs[0], expected, dtype=case.dtype, max_error=sum_error + BOUNDS[case.dtype][0])
        chains.append([partial(run, one, out) for one, out in zip(inputs, outputs, strict=True)])
        row = {"case": case.name, "dtype": case.dtype, "target": case.target, "provider": provider.name}
        rows.append({**row, "max_error": error.max})
    times = time_cuda_in_turn(chains) if case.device == "cuda" else [time_mps(calls) for calls in chains]
    for row, us in zip(rows, times, strict=True):
        row |= {"us": us, "tflops": case.flops / us / 1e6, "gbps": case.bytes / us / 1e3}
    torch_us = min((row["us"] for row in rows if row["provider"].startswith("torch")), default=None)
    for row in rows:
        row["speed_of_torch"] = torch_us / row["us"] if torch_us else None
    return rows


def lower(case: Case, providers: list[Provider], seed: int, reason: str) -> list[dict]:
    """Lower to text without a device; nothing runs."""
    target = Target({"kind": "cuda", "arch": ASSUMED_ARCH})
    with target:
        source = tilelang.lower(case.kernel[0], target=target, enable_device_compile=False).kernel_source
    row = {"case": case.name, "dtype": case.dtype, "target": case.target, "provider": "ours"}
    return [{**row, "lines": source.count("\n"), "status": f"lowered for {ASSUMED_ARCH}, not run: {reason}"}]


def main(command_line: list[str] | None = None) -> list[dict]:
    """Run the benchmark and return its rows."""
    names = [provider.name for provider in PROVIDERS]
    parser = options(__doc__, TARGETS, "CUDA, else a Mac, else the simulator", names)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the output; operands are E4M3")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["row", "block"], help="of the scales")
    for axis in "mnk":
        parser.add_argument(f"--{axis}", type=int, nargs="+", metavar=axis.upper(), help="one or several")
    parser.add_argument("--library", nargs="+", default=[], metavar="FILE", help="operator libraries to load, as vLLM's")
    arguments = parser.parse_args(command_line)

    target, device, reason = find_device(arguments.target)
    if target not in TARGETS:
        raise SystemExit(f"--target: scaled_mm exists on {', '.join(TARGETS[1:])}; got {target}; pass one of these")
    for library in arguments.library:
        torch.ops.load_library(library)
    key = {"mps": "mps", "simulator": "simulator"}.get(device, target)
    providers, notes = choose(PROVIDERS, arguments.providers or names, key)
    notes = notes if arguments.providers else []
    if device == "cuda":
        notes += [f"{p.name}: left out, not installed" for p in providers if not installed(p)]
    providers = [provider for provider in providers if installed(provider)]
    if not providers:
        raise SystemExit("--providers: at least one must exist here; " + "; ".join(notes))
    tilelang.set_log_level("WARNING")
    run = {"simulator": count, "none": partial(lower, reason=reason)}.get(device, measure_time)
    sizes = sizes_of(arguments, SIZES[key])
    cases = [Case(*size, recipe, arguments.dtype, target, device) for size in sizes for recipe in arguments.recipes]
    rows = [row for case in progress(cases, "scaled matmul") for row in run(case, providers, arguments.seed)]

    title = f"scaled matmul, e4m3 to {arguments.dtype}, target {target}, {describe(device)}"
    if device == "simulator":
        notes.append("Counts from executing the Metal text on the CPU; no measure of speed. MMA: 8x8x8.")
        notes.append("minimum: what these tiles need. Each threadgroup reads its part of A and B once; C is written once.")
        title += " (counts, no speed)"
        columns, value, label = COUNTS, "read_per_weight", "device bytes read / B's bytes"
    elif device == "none":
        columns, value, label = LOWERED, None, "times"
    else:
        columns, value, label = TIMES, "tflops", "TFLOP/s"
        notes += [f"{provider.name}: {provider.what}" for provider in providers]
        notes.append(METHOD[device] + (" Providers replay in turn." if device == "cuda" else ""))
    show(title, rows, columns, notes)
    if arguments.csv:
        write_csv(arguments.csv, rows)
    if arguments.plot:
        plot(arguments.plot, rows, case="case", series="provider", value=value, title=title, label=label)
    return rows


if __name__ == "__main__":
    main()

"""Mixture of experts with MXFP4 weights: `mxfp4_moe` beside triton_kernels and humming, or its operation counts.

    python benchmark/bench_mxfp4_moe.py                                # the best device here
    python benchmark/bench_mxfp4_moe.py --target cuda --a-dtype bf16 fp8 --path site --csv moe.csv --plot moe.png
    python benchmark/bench_mxfp4_moe.py --target metal --tokens 1 16

A figure is for the whole layer behind its router: both GEMMs, biases, gpt-oss's SwiGLU and the weighted sum over the slots.
Ours also quantises x and sorts tokens by expert; peers are given sorted tokens. Every result is checked against float64 before
anything is timed or counted. Without a Mac, targets metal and metal4 run in the simulator, which counts operations and says
nothing about speed. Peers take part where they can be imported, also from the folders of --path: triton_kernels is in vLLM's
third_party, humming is on PyPI as humming-kernels.
"""

import math
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), str(ROOT / "testing")]

import tilelang  # noqa: E402
from harness import (  # noqa: E402
    L2_CACHES,
    METHOD,
    SIMULATOR_SECONDS,
    Column,
    Provider,
    cache_bytes,
    choose,
    describe,
    find_device,
    options,
    plot_lines,
    progress,
    rotation,
    show,
    time_cuda,
    time_cuda_in_turn,
    time_mps,
    write_csv,
)
from mxfp4_moe_cases import (  # noqa: E402
    A_DTYPES,
    MODELS,
    PROVIDERS,
    TAKES,
    TARGETS,
    Case,
    Inputs,
    Layer,
    check,
    expected,
    installed,
    moved,
)
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from tvm.target import Target  # noqa: E402

from tilelang_ext import Activation, metal, simulate  # noqa: E402
from tilelang_ext.kernels.mxfp4_moe.arguments import Operands  # noqa: E402
from tilelang_ext.kernels.mxfp4_moe.launch import launch, problem_of  # noqa: E402

ASSUMED_ARCH = "sm_90a"  # when only lowering
DEFAULTS = {  # models and tokens
    "cuda": (["gpt-oss-120b", "gpt-oss-20b", "deepseek-like"], [1, 4, 16, 64, 128, 512, 2048, 8192]),
    "mps": (["gpt-oss-20b"], [1, 4, 16, 64, 512]),
    "simulator": (["small"], [1, 16]),
    "none": (["gpt-oss-120b"], [1, 128, 8192]),
}
COUNTS = (
    Column("case", "model"),
    Column("tokens", "tokens"),
    Column("a_dtype", "activations"),
    Column("provider", "kernel"),
    Column("mma", "MMAs", ","),
    Column("device_bytes_read", "device\nread, B", ","),
    Column("device_bytes_written", "device\nwritten, B", ","),
    Column("read_per_weight", "read / bytes\nof weights", ".2f"),
    Column("threadgroup_barriers", "barriers", ","),
    Column("findings", "find-\nings"),
    Column("max_error", "max\nerror", ".1e"),
)
TIMES = (
    *COUNTS[:4],
    Column("us", "us", ",.1f"),
    Column("tflops", "TFLOP/s", ",.1f"),
    Column("share_of_copy", "bytes floor /\ncopy speed", ".2f"),
    Column("speed_of_best_peer", "speed /\nbest peer's", ".2f"),
    Column("max_error", "max\nerror", ".1e"),
    Column("least_cosine", "least\ncosine", ".5f"),
)
LOWERED = (*COUNTS[:4], Column("lines", "lines of text", ","), Column("status", "status"))


# --- running ---------------------------------------------------------------------------------------------------------


def launch_all(case: Case, layer: Layer, inputs: Inputs, out: torch.Tensor, compiled) -> None:
    """The launches of the operator, with `compiled(make, options, device, pass_configs)` to make a prim_func runnable."""
    operands = Operands(*inputs, *layer, expert_mask=None)
    problem = problem_of(operands, Activation(), A_DTYPES[case.a_dtype] or "bfloat16", "reduce")
    launch(problem, operands, out, compiled=compiled)


def count(case: Case, providers: list[Provider], seed: int) -> list[dict]:
    """Run the Metal text of every launch in the simulator: its counts, and the least bytes that have to be moved."""
    layer, inputs, out = case.layer(seed, "cpu"), case.inputs(seed, "cpu"), case.output("cpu")
    reports = []

    def simulated(make, options, device, pass_configs):
        program = metal.lower(make(*options), case.target)

        def run(*tensors):
            reports.append(simulate(program, *tensors, target=case.target, seed=seed, timeout=SIMULATOR_SECONDS))

        return run

    launch_all(case, layer, inputs, out, simulated)
    errors = check(case, "ours", out, expected(layer, inputs))
    for finding in [finding for report in reports for finding in report.findings]:
        print(finding, file=sys.stderr)
    keys = ("mma", "device_bytes_read", "device_bytes_written", "threadgroup_barriers")
    ours = {key: sum(getattr(report.counts, key) for report in reports) for key in keys}
    ours |= {"findings": sum(len(report.findings) for report in reports), **errors}
    active = inputs.topk_ids.unique().numel()
    written = out.numel() * out.element_size()
    minimum = {"device_bytes_read": case.bytes(active) - written, "device_bytes_written": written}
    weights = case.bytes(active) - 2 * written
    rows = []
    for name, values in (("ours", ours), ("minimum", minimum)):
        rows.append({**described(case, name), **values, "read_per_weight": values["device_bytes_read"] / weights})
    return rows


def described(case: Case, provider: str) -> dict:
    return {
        "case": case.model.name,
        "tokens": case.tokens,
        "a_dtype": case.a_dtype,
        "target": case.target,
        "provider": provider,
    }


def measure_time(case: Case, providers: list[Provider], seed: int, copy_speed: float | None) -> list[dict]:
    """Check, then time every provider on the same inputs, which rotate through more than the cache holds."""
    device, cache = case.device, cache_bytes(case.device)
    maker = device if device == "cuda" else "cpu"  # float64, for what is expected
    active = case.inputs(seed, maker).topk_ids.unique().numel()
    sets = rotation(case.bytes(active), cache)
    copies = math.ceil(L2_CACHES * cache / case.bytes(case.model.experts))  # of all experts
    layers = [case.layer(seed + i, maker) for i in range(min(sets, copies))]
    inputs = [case.inputs(seed + i, maker) for i in range(sets)]
    outputs = [case.output(device) for _ in range(sets)]
    floor = sum(case.bytes(one.topk_ids.unique().numel()) for one in inputs) / sets
    want = expected(layers[0], inputs[0]).cpu()
    layers, inputs = [moved(one, device) for one in layers], [moved(one, device) for one in inputs]
    rows, chains = [], []
    for provider in (provider for provider in providers if case.a_dtype in TAKES[provider.name]):
        binds = [provider.make(case, layer) for layer in layers]
        chains.append([binds[i % len(binds)](one, out) for i, (one, out) in enumerate(zip(inputs, outputs, strict=True))])
        outputs[0].fill_(torch.nan)
        chains[-1][0]()
        rows.append({**described(case, provider.name), **check(case, provider.name, outputs[0].cpu(), want)})
    times = time_cuda_in_turn(chains) if device == "cuda" else [time_mps(calls) for calls in chains]
    for row, us in zip(rows, times, strict=True):
        row |= {"us": us, "tflops": case.flops / us / 1e6, "floor_bytes": round(floor), "calls": sets}
        row["share_of_copy"] = floor / us / copy_speed if copy_speed else None
    best = min((row["us"] for row in rows if row["provider"] != "ours"), default=None)
    for row in rows:
        row["speed_of_best_peer"] = best / row["us"] if best else None
    return rows


def copy_speed() -> float:
    """Bytes per microsecond, read and written, of a large copy by a kernel; the driver's copies are slower on an H200."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_cuda([lambda: torch.mul(source, 1.0, out=target)])


def lower(case: Case, providers: list[Provider], seed: int, reason: str) -> list[dict]:
    """Lower every launch to text, without a device; nothing runs."""
    lines = []
    target = Target({"kind": "cuda", "arch": ASSUMED_ARCH})

    def lowered(make, options, device, pass_configs):
        with target:
            source = tilelang.lower(make(*options), target=target, enable_device_compile=False).kernel_source
        lines.append(source.count("\n"))
        return lambda *tensors: None

    with FakeTensorMode():  # shapes are all that counts
        launch_all(case, case.layer(seed, "cpu"), case.inputs(seed, "cpu"), case.output("cpu"), lowered)
    status = f"{len(lines)} kernels lowered for {ASSUMED_ARCH}, not run: {reason}"
    return [{**described(case, "ours"), "lines": sum(lines), "status": status}]


def lines(rows: list[dict]) -> list[dict]:
    """Rows of the plot: what was measured, and the time that copying the least bytes takes."""
    drawn = [{**row, "line": f"{row['provider']}, {row['a_dtype']}"} for row in rows]
    floors = {(row["case"], row["tokens"]): row["us"] * row["share_of_copy"] for row in rows if row.get("share_of_copy")}
    return drawn + [{"case": case, "tokens": n, "us": us, "line": "bytes at copy speed"} for (case, n), us in floors.items()]


def main(command_line: list[str] | None = None) -> list[dict]:
    """Run the benchmark and return its rows."""
    names = [provider.name for provider in PROVIDERS]
    parser = options(__doc__, TARGETS, "CUDA, else a Mac, else the simulator", names)
    parser.add_argument("--models", nargs="+", choices=MODELS, help="by their sizes; weights are random")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="of a batch, one or several")
    parser.add_argument("--a-dtype", nargs="+", choices=A_DTYPES, default=["bf16"], help="what the GEMMs take activations in")
    parser.add_argument(
        "--path", nargs="+", default=[], metavar="FOLDER", help="folders to import triton_kernels and humming from"
    )
    arguments = parser.parse_args(command_line)

    target, device, reason = find_device(arguments.target)
    if target not in TARGETS:
        raise SystemExit(f"--target: mxfp4_moe exists on {', '.join(TARGETS[1:])}; got {target}; pass one of these")
    sys.path[:0] = arguments.path
    providers, notes = choose(PROVIDERS, arguments.providers or names, target)
    notes = notes if arguments.providers else []
    if device == "cuda":
        notes += [f"{p.name}: left out, not installed" for p in providers if not installed(p)]
    providers = [provider for provider in providers if installed(provider)]
    if not providers:
        raise SystemExit("--providers: at least one must exist here; " + "; ".join(notes))
    if device != "cuda" and providers[0].name != "ours":
        raise SystemExit(f"--providers: only ours exists on {describe(device)}; got {providers[0].name}; leave it out")
    tilelang.set_log_level("WARNING")
    run = {"simulator": count, "none": partial(lower, reason=reason)}.get(device)
    if run is None:
        run = partial(measure_time, copy_speed=copy_speed() if device == "cuda" else None)
    models, tokens = DEFAULTS[device]
    cases = [
        Case(MODELS[name], count, a_dtype, target, device)
        for name in arguments.models or models
        for count in arguments.tokens or tokens
        for a_dtype in arguments.a_dtype
    ]
    rows = []
    for case in progress(cases, "mixture of experts"):
        rows += run(case, providers, arguments.seed)
        if arguments.csv:  # a run that is ended keeps what it has
            write_csv(arguments.csv, rows)

    title = f"MXFP4 mixture of experts, target {target}, {describe(device)}"
    if device == "simulator":
        notes.append(
            "Counts are from executing the Metal text of every launch on the CPU; they do not measure speed. MMA: 8x8x8."
        )
        notes.append("minimum: codes and scales of the experts in use and x are read once, y is written once.")
        title += " (counts, no speed)"
        columns = COUNTS
    elif device == "none":
        columns = LOWERED
    else:
        columns = TIMES
        notes += [f"{provider.name}: {provider.what}" for provider in providers]
        notes += ["bytes floor: codes and scales of the experts in use, x and y, each moved once."]
        notes.append(METHOD[device] + (" Providers replay in turn." if device == "cuda" else ""))
    show(title, rows, columns, notes)
    if arguments.plot:
        keys = {"panel": "case", "x": "tokens", "series": "line", "value": "us"}
        plot_lines(arguments.plot, lines(rows), **keys, title=title, label="us")
    return rows


if __name__ == "__main__":
    main()

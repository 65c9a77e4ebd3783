"""C = A @ B: this package's kernels beside torch's and MLX's, or their operation counts where there is no GPU.

    python benchmark/bench_matmul.py                                   # the best device here
    python benchmark/bench_matmul.py --target cuda --csv matmul.csv --plot matmul.png
    python benchmark/bench_matmul.py --target cuda --providers ours torch --random 40
    python benchmark/bench_matmul.py --target metal4 --m 256 512 --n 256 512 --k 256 512

On CUDA and ROCm `ours` is the operator `tilelang_ext.matmul`, and `plain` the kernel of examples/matmul.py, which is `ours`
elsewhere. Every result is checked against float64 before anything is timed or counted. Without a Mac, targets metal and metal4
run in the simulator, which counts operations and says nothing of speed.
"""

import math
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), str(ROOT / "examples"), str(ROOT / "testing")]

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
    time_mlx,
    time_mps,
    time_wall,
    write_csv,
)
from kernels.compile_on_gpu import compile_matmuls, in_processes  # noqa: E402
from matmul import matmul  # noqa: E402
from numeric import assert_close  # noqa: E402
from tvm.target import Target  # noqa: E402

from tilelang_ext import language as T  # noqa: E402
from tilelang_ext import matmul as matmul_operator  # noqa: E402
from tilelang_ext import metal, simulate  # noqa: E402
from tilelang_ext.kernels.metal_tile import Gemm, pick_tile  # noqa: E402

TARGETS = ("auto", "metal", "metal4", "cuda", "hip", "c")
DTYPES = ("float16", "bfloat16", "float32")
LAYOUTS = ("NN", "NT", "TN", "TT")  # of A and B: N row-major, T column-major
RANDOM_M, RANDOM_N_AND_K = (1, 8192), (64, 16384)  # the least and the most of random sizes
ASSUMED = {"cuda": {"kind": "cuda", "arch": "sm_90"}, "hip": {"kind": "hip", "mcpu": "gfx942"}}  # when only lowering
SIZES = {
    "cuda": [(1024,) * 3, (4096,) * 3, (8192,) * 3, (4096, 7168, 2048), (128, 4096, 7168)],
    "hip": [(4096,) * 3],
    "mps": [(1024,) * 3, (2048,) * 3, (4096,) * 3],
    "simulator": [(256,) * 3, (512,) * 3, (300, 200, 100)],  # the last with tails in M, N and K
    "c": [(256,) * 3],
}


@dataclass(frozen=True)
class Case:
    """One GEMM: its size, the element type of A, B and C, the target and the device it runs on."""

    M: int
    N: int
    K: int
    dtype: str
    target: str
    device: str  # "cuda", "mps", "simulator", "cpu", or "none" when the kernel is lowered only
    layout: str = "NN"

    @property
    def name(self) -> str:
        return f"{self.M}x{self.N}x{self.K}" + (f" {self.layout}" if self.layout != "NN" else "")

    @property
    def flops(self) -> int:
        return 2 * self.M * self.N * self.K

    @property
    def bytes(self) -> int:
        """Bytes of A, B and C, each once."""
        return (self.M * self.K + self.K * self.N + self.M * self.N) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def blocks(self) -> dict:
        """Arguments of `matmul` for this case."""
        block_K = 32 if self.dtype == "float32" else 64
        if self.target in ("metal", "metal4"):  # what the operator's model picks
            size = self.torch_dtype.itemsize
            return asdict(pick_tile((Gemm(self.M, self.N, size, size, size, size),), (32, 64)))
        if self.M <= 64:  # a short M fills no larger tile
            return {"block_M": 64, "block_N": 64, "block_K": block_K, "num_stages": 3, "threads": 128}
        if self.M * self.N < 2048 * 2048:  # few tiles: smaller ones keep more SMs busy
            return {"block_M": 128, "block_N": 128, "block_K": block_K, "num_stages": 3, "threads": 128}
        if self.target == "hip":  # 64 KB of shared memory
            return {"block_M": 128, "block_N": 128, "block_K": 32, "num_stages": 2, "threads": 256}
        return {"block_M": 128, "block_N": 256, "block_K": block_K, "num_stages": 3, "threads": 256}  # two warpgroups

    @property
    def max_error(self) -> float | None:
        """The limit on the error, None for that of the type. CUDA multiplies float32 as TF32 (10 bits), here in torch too."""
        return 1e-3 if (self.dtype, self.device) == ("float32", "cuda") else None

    def inputs(self, seed: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)

        def random_matrix(rows: int, columns: int, order: str) -> torch.Tensor:
            shape = (rows, columns) if order == "N" else (columns, rows)
            matrix = torch.randn(shape, generator=generator, device=device).to(self.torch_dtype)
            return matrix if order == "N" else matrix.t()

        return random_matrix(self.M, self.K, self.layout[0]), random_matrix(self.K, self.N, self.layout[1])

    def output(self, device: str = "cpu") -> torch.Tensor:
        """Return an output full of NaN, so that an element that is not written is seen."""
        return torch.full((self.M, self.N), float("nan"), dtype=self.torch_dtype, device=device)


def random_cases(count: int, seed: int, target: str, device: str) -> Iterator[Case]:
    """Yield cases of 16-bit floats: M, N and K log-uniform, N and K multiples of 8, any layout and dtype.

    What is contiguous in memory is a multiple of 8 elements, as for TMA; M too where A is column-major.
    """
    generator = random.Random(seed)

    def draw(least: int, most: int) -> float:
        return math.exp(generator.uniform(math.log(least), math.log(most)))

    for _ in range(count):
        M = round(draw(*RANDOM_M))
        N, K = (8 * round(draw(*RANDOM_N_AND_K) / 8) for _ in "NK")
        layout, dtype = generator.choice(LAYOUTS), generator.choice(DTYPES[:2])
        yield Case(M if layout[0] == "N" else -(-M // 8) * 8, N, K, dtype, target, device, layout)


def matmul_cpu(M, N, K, dtype, block=32):
    """The same GEMM in the form that upstream's C target takes: tiles in local arrays, one thread, float32."""

    @T.prim_func
    def matmul_cpu(A: T.Tensor((M, K), dtype), B: T.Tensor((K, N), dtype), C: T.Tensor((M, N), dtype)):
        with T.Kernel(T.ceildiv(N, block), T.ceildiv(M, block)) as (bx, by):
            A_s = T.alloc_local((block, block), "float32")
            B_s = T.alloc_local((block, block), "float32")
            C_s = T.alloc_local((block, block), "float32")
            T.clear(C_s)
            for k in T.serial(T.ceildiv(K, block)):
                T.copy(A[by * block, k * block], A_s)
                T.copy(B[k * block, bx * block], B_s)
                T.gemm(A_s, B_s, C_s)
            T.copy(C_s, C[by * block, bx * block])

    return matmul_cpu


def make_ours(case: Case):
    if case.device == "cuda" and case.dtype != "float32":
        return lambda A, B, C: matmul_operator(A, B, out=C)
    return make_plain(case)


def make_plain(case: Case):
    if case.target == "c":  # upstream's C text does not compile with vectors of half
        pass_configs = {"tirx.disable_vectorize": True}
        return tilelang.compile(matmul_cpu(case.M, case.N, case.K, case.dtype), target="c", pass_configs=pass_configs)
    kernel = matmul(case.M, case.N, case.K, dtype=case.dtype, **case.blocks)
    if case.device == "mps":
        return metal.to_torch(metal.lower(kernel, case.target))
    return tilelang.compile(kernel, target=case.target)


def make_torch(case: Case):
    return lambda A, B, C: torch.matmul(A, B, out=C)


def make_mlx(case: Case):
    import mlx.core as mx

    return mx.matmul


PROVIDERS = (
    Provider("ours", "tilelang_ext.matmul(A, B, out=C)", ("cuda", "hip", "mps", "simulator", "c"), make_ours),
    Provider("plain", "examples/matmul.py", ("cuda", "hip"), make_plain),
    Provider("torch", "torch.matmul(A, B, out=C)", ("cuda", "hip", "mps", "c"), make_torch),
    Provider("mlx", "mlx.core.matmul (allocates its output)", ("mps",), make_mlx),
)
COUNTS = (  # 79 columns of text, so that it fits a terminal
    Column("case", "M x N x K"),
    Column("provider", "kernel"),
    Column("mma", "MMAs", ","),
    Column("device_bytes_read_per_mma", "device\nread\nB/MMA", ".1f"),
    Column("device_bytes_written_per_mma", "device\nwritten\nB/MMA", ".1f"),
    Column("threadgroup_bytes_read_per_mma", "group\nread\nB/MMA", ".1f"),
    Column("threadgroup_bytes_written_per_mma", "group\nwritten\nB/MMA", ".1f"),
    Column("barriers_per_1000_mma", "bar-\nriers /\n1,000", ".1f"),
    Column("findings", "find-\nings"),
    Column("max_error", "max\nerror", ".1e"),
)
CPU_TIMES = tuple(column for column in TIMES if column.key not in ("tflops", "gbps"))


def count(case: Case, providers: list[Provider], seed: int) -> list[dict]:
    """Run the Metal text in the simulator: counts beside the fewest that these tiles allow."""
    kernel = matmul(case.M, case.N, case.K, dtype=case.dtype, **case.blocks)
    (A, B), C = case.inputs(seed), case.output()
    report = simulate(kernel, A, B, C, target=case.target, seed=seed, timeout=SIMULATOR_SECONDS)
    error = assert_close(C, A.double() @ B.double(), dtype=case.dtype)
    counts = report.counts
    row = {
        "mma": counts.mma,
        "device_bytes_read": counts.device_bytes_read,
        "device_bytes_written": counts.device_bytes_written,
        "threadgroup_bytes_read": counts.threadgroup_bytes_read,
        "threadgroup_bytes_written": counts.threadgroup_bytes_written,
        "threadgroup_barriers": counts.threadgroup_barriers,
        "findings": len(report.findings),
        "max_error": error.max,
    }
    for finding in report.findings:
        print(finding, file=sys.stderr)
    return [_per_mma(case, name, values) for name, values in (("ours", row), ("minimum", bare_minimum(case)))]


def bare_minimum(case: Case) -> dict:
    """Return the fewest counts: MMAs of whole tiles; A and B read once by each threadgroup that needs them, C written once."""
    block_M, block_N, block_K = (case.blocks[f"block_{axis}"] for axis in "MNK")
    rows, cols, steps = -(-case.M // block_M), -(-case.N // block_N), -(-case.K // block_K)
    size = case.torch_dtype.itemsize
    return {
        "mma": rows * cols * steps * block_M * block_N * block_K // MMA_MULTIPLICATIONS,
        "device_bytes_read": (cols * case.M * case.K + rows * case.K * case.N) * size,
        "device_bytes_written": case.M * case.N * size,
    }


def _per_mma(case: Case, provider: str, values: dict) -> dict:
    row = {"case": case.name, "dtype": case.dtype, "target": case.target, "provider": provider, **values}
    for key in ("device_bytes_read", "device_bytes_written", "threadgroup_bytes_read", "threadgroup_bytes_written"):
        row[f"{key}_per_mma"] = values[key] / values["mma"] if key in values else None
    if "threadgroup_barriers" in values:
        row["barriers_per_1000_mma"] = 1000 * values["threadgroup_barriers"] / values["mma"]
    return row


def measure_time(case: Case, providers: list[Provider], seed: int) -> list[dict]:
    """Check, then time: every provider on the same inputs, which rotate through more than the cache."""
    device = case.device
    sets = rotation(case.bytes, cache_bytes(device)) if device != "cpu" else 1
    if device == "cuda":
        inputs = [case.inputs(seed + i, device) for i in range(sets)]
    else:
        hosts = [case.inputs(seed + i) for i in range(sets)]
        inputs = [tuple(tensor.to(device) for tensor in host) for host in hosts]
    outputs = [case.output(device) for _ in range(sets)]
    expected = _float64_product(*inputs[0])
    rows, calls = [], {}
    for provider in providers:
        if provider.name == "plain" and case.layout != "NN":
            continue
        run = provider.make(case)
        if provider.name == "mlx":
            us, result = _time_mlx(run, hosts)
        else:
            outputs[0].fill_(float("nan"))
            run(*inputs[0], outputs[0])
            result = outputs[0].clone()
        error = assert_close(result, expected, dtype=case.dtype, max_error=case.max_error)
        row = {
            "case": case.name,
            "dtype": case.dtype,
            "target": case.target,
            "provider": provider.name,
            "max_error": error.max,
        }
        if provider.name == "mlx":
            row["us"] = us
        else:
            calls[provider.name] = [partial(run, *pair, output) for pair, output in zip(inputs, outputs, strict=True)]
        rows.append(row)
    times = dict(zip(calls, _time(device, list(calls.values())), strict=True))
    for row in rows:
        row.setdefault("us", times.get(row["provider"]))
        row |= {"tflops": case.flops / row["us"] / 1e6, "gbps": case.bytes / row["us"] / 1e3}
    torch_us = next((row["us"] for row in rows if row["provider"] == "torch"), None)
    for row in rows:
        row["speed_of_torch"] = torch_us / row["us"] if torch_us else None
    return rows


def compile_ahead(cases: list[Case], names: list[str]) -> None:
    """Compile the kernels of all cases at the same time, into the caches on disk."""
    if "ours" in names:
        compile_matmuls([(case.M, case.N, case.K, case.dtype, case.layout) for case in cases])
    plain = [case for case in cases if case.layout == "NN"]
    if "plain" in names and plain:
        in_processes(_compile_plain, plain)


def _compile_plain(case: Case) -> None:
    make_plain(case)


def _time(device: str, calls: list) -> list[float]:
    if device == "cuda":
        return time_cuda_in_turn(calls)
    return [time_mps(own) if device == "mps" else time_wall(own, lambda _: None) for own in calls]


def _time_mlx(run, hosts):
    """MLX has arrays of its own; values are passed to them as float32, which holds every value of the smaller types."""
    import mlx.core as mx

    dtype = getattr(mx, str(hosts[0][0].dtype).removeprefix("torch."))
    arrays = [tuple(mx.array(tensor.float().numpy()).astype(dtype) for tensor in host) for host in hosts]
    mx.eval(arrays)
    result = torch.tensor(run(*arrays[0]).astype(mx.float32).tolist())
    return time_mlx([partial(run, *pair) for pair in arrays]), result


def _float64_product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    if A.device.type == "mps":  # which has no float64
        A, B = A.cpu(), B.cpu()
    return A.double() @ B.double()


def lower(case: Case, providers: list[Provider], seed: int, reason: str) -> list[dict]:
    """Lower to text without a device; nothing runs."""
    target = Target(ASSUMED[case.target])
    with target:
        source = tilelang.lower(matmul(case.M, case.N, case.K, dtype=case.dtype, **case.blocks), target=target).kernel_source
    row = {"case": case.name, "dtype": case.dtype, "target": case.target, "provider": "ours"}
    arch = ASSUMED[case.target].get("arch") or ASSUMED[case.target]["mcpu"]
    return [{**row, "lines": source.count("\n"), "status": f"lowered for {arch}, not run: {reason}"}]


def main(command_line: list[str] | None = None) -> list[dict]:
    """Run the benchmark and return its rows."""
    names = [provider.name for provider in PROVIDERS]
    parser = options(__doc__, TARGETS, "CUDA or ROCm, else a Mac, else the simulator", names)
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="type of A, B and C; accumulators are float32")
    parser.add_argument("--layout", choices=LAYOUTS, default="NN", help="of A and B: N row-major, T column-major")
    parser.add_argument("--random", type=int, metavar="COUNT", help="random sizes, layouts and 16-bit dtypes (CUDA and ROCm)")
    for axis in "mnk":
        parser.add_argument(f"--{axis}", type=int, nargs="+", metavar=axis.upper(), help="one or several")
    arguments = parser.parse_args(command_line)

    target, device, reason = find_device(arguments.target)
    if (target, arguments.dtype) == ("c", "bfloat16"):
        raise SystemExit("--dtype: upstream's C target takes float16 or float32; got bfloat16; pass one of these")
    key = {"mps": "mps", "simulator": "simulator"}.get(device, target)
    providers, notes = choose(PROVIDERS, arguments.providers or names, key)
    notes = notes if arguments.providers else []
    providers = [p for p in providers if p.name != "mlx" or _has_mlx(notes)]
    if not providers:
        raise SystemExit("--providers: at least one must exist here; " + "; ".join(notes))
    tilelang.set_log_level("WARNING")
    torch.backends.cuda.matmul.allow_tf32 = True  # as T.gemm does; see Case.max_error
    run = {"simulator": count, "none": partial(lower, reason=reason)}.get(device, measure_time)
    if device != "cuda" and (arguments.random or arguments.layout != "NN"):
        raise SystemExit(f"--random, --layout: need CUDA or ROCm; got {describe(device)}; leave them out")
    sizes = sizes_of(arguments, SIZES[key])
    cases = [Case(*size, arguments.dtype, target, device, arguments.layout) for size in sizes]
    if arguments.random:
        cases = list(random_cases(arguments.random, arguments.seed, target, device))
    if target == "cuda" and device == "cuda":
        compile_ahead(cases, [provider.name for provider in providers])
    rows = [row for case in progress(cases, "matmul") for row in run(case, providers, arguments.seed)]

    title = f"matmul, {arguments.dtype}, target {target}, {describe(device)}"
    if device == "simulator":
        notes.append("Counts from executing the Metal text on the CPU; no measure of speed. group: threadgroup. MMA: 8x8x8.")
        notes.append("minimum: what these tiles need. Each threadgroup reads its part of A and B once; C is written once.")
        title += " (counts, no speed)"
        columns, value, label = COUNTS, "device_bytes_read_per_mma", "device bytes read an MMA"
    elif device == "none":
        columns, value, label = LOWERED, None, "times"
    else:
        columns, value, label = CPU_TIMES if device == "cpu" else TIMES, "tflops", "TFLOP/s"
        ours = "examples/matmul.py" if target != "c" else "matmul_cpu of this file, by upstream's C target"
        notes += [f"{p.name}: {p.what}" if p.name != "ours" or device == "cuda" else f"ours: {ours}" for p in providers]
        ratios = sorted(row["speed_of_torch"] for row in rows if row["provider"] == "ours" and row.get("speed_of_torch"))
        if arguments.random and ratios:
            middle = math.exp(sum(map(math.log, ratios)) / len(ratios))
            notes.append(f"speed / torch's of {len(ratios)} sizes: worst {ratios[0]:.2f}, geometric mean {middle:.2f}")
        notes.append(METHOD[device])
    show(title, rows, columns, notes)
    if arguments.csv:
        write_csv(arguments.csv, rows)
    if arguments.plot:
        plot(arguments.plot, rows, case="case", series="provider", value=value, title=title, label=label)
    return rows


def _has_mlx(notes: list[str]) -> bool:
    try:
        import mlx.core  # noqa: F401
    except ImportError:
        notes.append("mlx: left out, not installed; pip install mlx")
        return False
    return True


if __name__ == "__main__":
    main()

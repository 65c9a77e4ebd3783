"""Host time of a call: a kernel of nine tensors, `scaled_mm(out=)` and `mxfp4_moe`, beside bare cuLaunchKernelEx in one run.

    python benchmark/bench_host.py                       # all that can be imported here
    python benchmark/bench_host.py --cases add scaled_mm --csv host.csv
    python benchmark/bench_host.py --path site           # humming beside `mxfp4_moe`, imported from there

How it is timed: BATCH calls are enqueued and the clock is read, then the GPU is waited for; of many such batches the median
and the least count. The GPU keeps up, since its queue holds a batch. Results are checked first. Needs an NVIDIA GPU and a C
compiler; tilelang's own adapter, torch and Triton do the same work where they can.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), str(ROOT / "testing")]

import tilelang  # noqa: E402
import tilelang.language as T  # noqa: E402
from harness import Column, show, write_csv  # noqa: E402
from mxfp4_moe_cases import Case, Model, check, expected  # noqa: E402
from mxfp4_moe_peers import make_humming  # noqa: E402
from torch.nn.functional import ScalingType  # noqa: E402

from tilelang_ext import mxfp4_moe, scaled_mm  # noqa: E402
from tilelang_ext.kernels.mxfp4_moe import launch as moe  # noqa: E402
from tilelang_ext.kernels.mxfp4_moe.activation import Activation  # noqa: E402
from tilelang_ext.kernels.mxfp4_moe.arguments import Operands  # noqa: E402
from tilelang_ext.kernels.mxfp4_moe.operator import _by_reference  # noqa: E402
from tilelang_ext.kernels.mxfp4_moe.weights import prepare_mxfp4_weights, tile_for_hopper  # noqa: E402
from tilelang_ext.launch.device import target_of  # noqa: E402
from tilelang_ext.launch.recipe import compile_cached  # noqa: E402

BATCH, BATCHES, WARM_UP = 100, 60, 5
COLUMNS = (
    Column("case", "case"),
    Column("provider", "provider"),
    Column("us", "us", ".2f"),
    Column("least", "least", ".2f"),
    Column("over_bare", "over bare", "+.2f"),
    Column("wanted", "wanted"),
)
NINE = 9
ROWS, COLUMNS_OF_X = 64, 256
GPT_OSS = {"experts": 32, "top_k": 4, "hidden": 2880, "intermediate": 2880}
MATMUL_N, MATMUL_K = 4096, 7168


def time_batches(enqueue: Callable[[int], float]) -> tuple[float, float]:
    """Return the median and the least microseconds of a call; enqueue(count) returns the seconds that `count` calls took."""
    times = []
    for _ in range(WARM_UP + BATCHES):
        torch.cuda.synchronize()
        times.append(1e6 * enqueue(BATCH) / BATCH)
    torch.cuda.synchronize()
    return statistics.median(times[WARM_UP:]), min(times[WARM_UP:])


def host_time(call: Callable[[], object]) -> tuple[float, float]:
    def enqueue(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - start

    return time_batches(enqueue)


# --- a kernel of nine tensors ---------------------------------------------------------------------------------------


def sum_of_eight():
    """The prim_func (x0 ... x7, out): out = x0 + ... + x7."""
    n = T.dynamic("n")
    rows, columns = 4, COLUMNS_OF_X

    @T.prim_func
    def add(
        x0: T.Tensor((n, columns), "float32"),
        x1: T.Tensor((n, columns), "float32"),
        x2: T.Tensor((n, columns), "float32"),
        x3: T.Tensor((n, columns), "float32"),
        x4: T.Tensor((n, columns), "float32"),
        x5: T.Tensor((n, columns), "float32"),
        x6: T.Tensor((n, columns), "float32"),
        x7: T.Tensor((n, columns), "float32"),
        out: T.Tensor((n, columns), "float32"),
    ):
        with T.Kernel(T.ceildiv(n, rows), threads=128) as bx:
            for i, j in T.Parallel(rows, columns):
                if bx * rows + i < n:
                    out[bx * rows + i, j] = (
                        (x0[bx * rows + i, j] + x1[bx * rows + i, j])
                        + (x2[bx * rows + i, j] + x3[bx * rows + i, j])
                        + (x4[bx * rows + i, j] + x5[bx * rows + i, j])
                        + (x6[bx * rows + i, j] + x7[bx * rows + i, j])
                    )

    return add


@functools.cache
def bare_library() -> ctypes.CDLL:
    compiler = next(path for name in ("cc", "gcc", "clang") if (path := shutil.which(name)))
    library = Path(tempfile.mkdtemp(), "bare_launch.so")
    source = Path(__file__).with_name("bare_launch.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
    built = ctypes.CDLL(str(library))
    built.bare_launch.restype = ctypes.c_int64
    return built


def bare(lowered, cubin: bytes, tensors: list[torch.Tensor]) -> Callable[[int], float]:
    """Return enqueue(count) of bare launches, for the kernel and parameters that the plan has."""
    [step] = lowered.variant["steps"]
    kinds = [parameter[0] for parameter in step["parameters"]]
    assert kinds == ["pointer"] * NINE + ["int32"], kinds
    by_name = dict(zip((argument["name"] for argument in lowered.arguments), tensors, strict=True))
    addresses = (ctypes.c_uint64 * NINE)(*(by_name[name].data_ptr() for _, name, _ in step["parameters"][:NINE]))
    library = bare_library()
    failed = library.bare_load(cubin, step["launch"].encode())
    assert not failed, f"cuModuleLoadData: {failed}"
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    blocks = -(-ROWS // 4)

    def enqueue(count: int) -> float:
        nanoseconds = library.bare_launch(count, addresses, ROWS, blocks, step["block"][0], stream)
        assert nanoseconds > 0, f"cuLaunchKernelEx: {-nanoseconds}"
        return nanoseconds / 1e9

    return enqueue


def triton_sum() -> Callable | None:
    if find_spec("triton") is None:
        return None
    from host_time_triton import sum_of_eight as kernel

    return lambda tensors: kernel[(ROWS,)](*tensors, COLUMNS=COLUMNS_OF_X)


def add(arch: str) -> Iterator[dict]:
    tensors = [torch.randn(ROWS, COLUMNS_OF_X, device="cuda") for _ in range(NINE)]
    *inputs, out = tensors
    expected = torch.stack(inputs).double().sum(0)
    lowered, cubin = compile_cached(("bench_host", "sum_of_eight"), sum_of_eight, arch)
    plan = lowered.plan(cubin)
    bound = plan.bind(*tensors)
    adapter = tilelang.compile(sum_of_eight(), target={"kind": "cuda", "arch": arch})
    by_triton = triton_sum()
    providers = {
        "plan": (lambda: plan(*tensors), "bare + 1.0"),
        "plan, bound": (bound, "bare + 0.5"),
        "tilelang's adapter": (lambda: adapter(*tensors), None),
        **({"triton": (lambda: by_triton(tensors), None)} if by_triton else {}),
    }
    enqueue = bare(lowered, cubin, tensors)
    for call in (lambda: enqueue(1), *(call for call, _ in providers.values())):
        out.fill_(torch.nan)
        call()
        assert torch.allclose(out.double(), expected, atol=1e-5), "a sum of eight is wrong"
    floor, least = time_batches(enqueue)
    yield {"case": "nine tensors", "provider": "cuLaunchKernelEx", "us": floor, "least": least}
    for name, (call, wanted) in providers.items():
        us, least = host_time(call)
        yield {"case": "nine tensors", "provider": name, "us": us, "least": least, "over_bare": us - floor, "wanted": wanted}
    us, least = host_time(lambda: torch.add(inputs[0], inputs[1], out=out))
    yield {"case": "nine tensors", "provider": "torch.add(out=), three tensors", "us": us, "least": least}


# --- operators ------------------------------------------------------------------------------------------------------


def matmuls(arch: str) -> Iterator[dict]:
    row = ScalingType.RowWise
    N, K = MATMUL_N, MATMUL_K
    for M in (16, 128):
        a, weight = (torch.randn(rows, K, device="cuda").to(torch.float8_e4m3fn) for rows in (M, N))
        scale_a, scale_b = torch.rand(M, 1, device="cuda"), torch.rand(1, N, device="cuda")
        b, out = weight.t(), torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
        expected = (a.double() * scale_a) @ (b.double() * scale_b)

        def ours(a=a, b=b, scale_a=scale_a, scale_b=scale_b, out=out):
            scaled_mm(a, b, scale_a, row, scale_b, row, out=out)

        def torch_s(a=a, b=b, scale_a=scale_a, scale_b=scale_b, out=out):
            torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, out=out)

        prepared = scaled_mm.prepare(b, scale_b, row, row)
        calls = (
            ("scaled_mm", ours, "6"),
            ("prepared", lambda call=prepared, a=a, scale=scale_a, out=out: call(a, scale, out=out), None),
            ("prepared, bound", prepared.bind(a, scale_a, out=out), None),
            ("torch._scaled_mm", torch_s, None),
        )
        case = f"scaled_mm(out=) {M}x{N}x{K}"
        for name, call, wanted in calls:
            out.fill_(torch.nan)
            call()
            error = ((out.double() - expected).norm() / expected.norm()).item()
            assert error < 4e-3, f"{name}: error {error}"
            us, least = host_time(call)
            yield {"case": case, "provider": name, "us": us, "least": least, "wanted": wanted}


def experts(arch: str) -> Iterator[dict]:
    E, top_k, H, I = GPT_OSS.values()

    def prepared(rows, k, gate=None):
        codes = torch.randint(0, 256, (E, rows, k // 2), dtype=torch.uint8, device="cuda")
        scale = torch.randint(118, 122, (E, rows, k // 32), dtype=torch.uint8, device="cuda")
        return prepare_mxfp4_weights(codes, scale, torch.randn(E, rows, device="cuda"), gate=gate)

    w13, w2 = prepared(2 * I, H, "separated"), prepared(H, I)
    x, out = torch.randn(1, H, device="cuda").bfloat16(), torch.empty(1, H, device="cuda").bfloat16()
    ids, row_weights = torch.randperm(E, device="cuda")[:top_k][None], torch.rand(1, top_k, device="cuda")
    activation = Activation()
    exact = torch.zeros(1, H, dtype=torch.float64, device="cuda")
    general = Operands(x, ids, row_weights, w13, w2, None)
    _by_reference(moe.problem_of(general, activation, "bfloat16", "reduce"), general, exact)
    for a_format, wanted, bound_of_error in (("bfloat16", "25", 1e-2), ("fp8", "32", 6e-2)):
        tiled = tuple(tile_for_hopper(each, a_dtype=a_format) for each in (w13, w2))
        a_dtype = None if a_format == "bfloat16" else a_format

        def ours(tiled=tiled, a_dtype=a_dtype):
            mxfp4_moe(x, ids, row_weights, *tiled, activation=activation, a_dtype=a_dtype, out=out)

        case = f"mxfp4_moe {a_format}, gpt-oss-20b, 1 token"
        fixed = mxfp4_moe.prepare(*tiled, activation=activation, a_dtype=a_dtype)
        calls = (
            ("mxfp4_moe", ours, wanted),
            ("prepared", lambda call=fixed: call(x, ids, row_weights, out=out), None),
            ("prepared, bound", fixed.bind(x, ids, row_weights, out=out), None),
        )
        for name, call, most in calls:
            out.fill_(torch.nan)
            call()
            error = ((out.double() - exact).norm() / exact.norm()).item()
            assert error < bound_of_error, f"{case}, {name}: error {error}"
            us, least = host_time(call)
            yield {"case": case, "provider": name, "us": us, "least": least, "wanted": most}
        if find_spec("humming"):
            us, least = host_time(humming(a_format))
            yield {"case": case, "provider": "humming", "us": us, "least": least}


def humming(a_format: str) -> Callable[[], None]:
    """Return its call for a layer of the same size, checked: two GEMMs, the activation between them and the sum."""
    a_dtype = "fp8" if a_format == "fp8" else "bf16"
    model = Model("gpt-oss-20b", GPT_OSS["hidden"], GPT_OSS["intermediate"], GPT_OSS["experts"], GPT_OSS["top_k"])
    case = Case(model, 1, a_dtype, "cuda", "cuda", 0.0)
    layer, inputs, out = case.layer(0, "cuda"), case.inputs(0, "cuda"), case.output("cuda")
    call = make_humming(case, layer)(inputs, out)
    call()
    check(case, "humming", out, expected(layer, inputs))
    return call


CASES = {"add": add, "scaled_mm": matmuls, "mxfp4_moe": experts}


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--path", nargs="+", default=[], metavar="FOLDER", help="folders to import humming from")
    parser.add_argument("--csv", metavar="FILE", help="write every figure")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench_host: needs an NVIDIA GPU, since it times launches; got none; run it on one")
    sys.path += chosen.path
    torch.manual_seed(0)
    target = target_of("bench_host", torch.device("cuda", torch.cuda.current_device()))
    rows = [row for name in chosen.cases for row in CASES[name](target.arch)]
    title = f"Host time of a call: {torch.cuda.get_device_name()}, torch {torch.__version__}, tilelang {tilelang.__version__}"
    show(title, rows, COLUMNS, [f"Median and least of {BATCHES} batches of {BATCH} calls, in microseconds."])
    if chosen.csv:
        write_csv(chosen.csv, rows)
    return rows


if __name__ == "__main__":
    main()

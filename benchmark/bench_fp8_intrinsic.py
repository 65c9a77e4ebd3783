"""`T.fp8_scaled_matmul` in a user's kernel, that of examples/fp8_scaled_matmul_persistent.py, beside the operator `scaled_mm`.

    python benchmark/bench_fp8_intrinsic.py                                 # on a Hopper GPU
    python benchmark/bench_fp8_intrinsic.py --cases rows blocks --m 128 --n 4096 --k 7168 --csv intrinsic.csv

They multiply the same inputs in turn, the example with one tile or two. Every result is checked against float64 before anything
is timed. Without a Hopper GPU the kernels are lowered and nothing is timed.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), str(ROOT / "testing"), str(ROOT / "examples")]

import tilelang  # noqa: E402
from fp8_scaled_matmul_persistent import BLOCKS, ROWS, SMALL, TALL, WIDE, Tile, scaled_matmul  # noqa: E402
from harness import (  # noqa: E402
    LOWERED,
    METHOD,
    Column,
    cache_bytes,
    describe,
    find_device,
    progress,
    rotation,
    show,
    sizes_of,
    time_cuda_in_turn,
    write_csv,
)
from numeric import BOUNDS, assert_close  # noqa: E402
from torch.nn.functional import ScalingType  # noqa: E402
from tvm.target import Target  # noqa: E402

from tilelang_ext import reference, scaled_mm  # noqa: E402

CASES = {  # layouts, whether sums stay in the matrix unit, recipes of scaled_mm
    "rows_fast": (ROWS, True, (ScalingType.RowWise, ScalingType.RowWise)),
    "rows": (ROWS, False, (ScalingType.RowWise, ScalingType.RowWise)),
    "blocks": (BLOCKS, False, (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128)),
}
SIZES = [(4096, 4096, 7168), (8192,) * 3, (128, 4096, 7168)]
ARCH = "sm_90a"
NUM_SMS = 132  # of an H200, when only lowering
SUM_ERROR = {False: 2e-3, True: 3e-2}  # by "the sums stay in the matrix unit"
TIMES = (
    Column("case", "M x N x K"),
    Column("provider", "kernel"),
    Column("us", "us", ",.1f"),
    Column("tflops", "TFLOP/s", ",.0f"),
    Column("speed_of_scaled_mm", "speed / scaled_mm's", ".3f"),
    Column("max_error", "max error", ".1e"),
)


@dataclass(frozen=True)
class Case:
    """One product: its size and a key of CASES."""

    M: int
    N: int
    K: int
    kind: str

    @property
    def name(self) -> str:
        return f"{self.M}x{self.N}x{self.K} {self.kind}"

    @property
    def tiles(self) -> dict[str, Tile]:
        """The tiles that are tried, by name."""
        if self.M <= 128:
            return {"small": SMALL}
        return {"wide": WIDE} if self.fast else {"tall": TALL, "wide": WIDE}

    @property
    def layouts(self) -> tuple:
        return CASES[self.kind][0]

    @property
    def fast(self) -> bool:
        return CASES[self.kind][1]

    @property
    def bytes(self) -> int:
        return (self.M + self.N) * self.K + 2 * self.M * self.N

    def kernel(self, tile: Tile, num_blocks: int):
        """Return the prim_func of the example."""
        return scaled_matmul(self.M, self.N, self.K, *self.layouts, tile, num_blocks, use_fast_accum=self.fast)

    def inputs(self, seed: int) -> tuple[torch.Tensor, ...]:
        """Return (A, scale_a, B, scale_b) on the GPU, random; every scale differs."""
        generator = torch.Generator("cuda").manual_seed(seed)
        made = []
        for rows, layout in zip((self.M, self.N), self.layouts, strict=True):
            codes = torch.randn(rows, self.K, generator=generator, device="cuda").to(torch.float8_e4m3fn)
            made += [codes, torch.rand(layout.scale_shape(rows, self.K), generator=generator, device="cuda") + 0.5]
        return tuple(made)


def make_intrinsic(case: Case, tile: Tile):
    """Return the example's kernel, and the inputs as it takes them."""
    num_blocks = torch.cuda.get_device_properties().multi_processor_count
    kernel = tilelang.compile(case.kernel(tile, num_blocks), target={"kind": "cuda", "arch": ARCH})
    return kernel, lambda A, scale_a, B, scale_b: (A, scale_a, B, scale_b)


def make_scaled_mm(case: Case):
    """Return the operator, and the inputs as torch documents them: scales of A have stride 1 along M."""
    recipe_a, recipe_b = CASES[case.kind][2]

    def run(A, scale_a, B, scale_b, C) -> None:
        scaled_mm(A, B, scale_a, recipe_a, scale_b, recipe_b, use_fast_accum=case.fast, out=C)

    return run, lambda A, scale_a, B, scale_b: (A, scale_a.t().contiguous().t(), B.t(), scale_b.t())


def measure(case: Case, seed: int) -> list[dict]:
    """Check, then time: all on the same inputs, which rotate through more than the cache; scaled_mm comes last."""
    sets = rotation(case.bytes, cache_bytes("cuda"))
    inputs = [case.inputs(seed + i) for i in range(sets)]
    outputs = [torch.empty(case.M, case.N, dtype=torch.bfloat16, device="cuda") for _ in range(sets)]
    A, scale_a, B, scale_b = inputs[0]
    expected = reference.scaled_matmul(A, scale_a, B, scale_b, *case.layouts)
    rows, chains = [], []
    makers = {f"intrinsic, {name}": partial(make_intrinsic, tile=tile) for name, tile in case.tiles.items()}
    for name, make in {**makers, "scaled_mm": make_scaled_mm}.items():
        run, prepare = make(case)
        chains.append([partial(run, *prepare(*one), out) for one, out in zip(inputs, outputs, strict=True)])
        outputs[0].fill_(torch.nan)
        chains[-1][0]()
        max_error = SUM_ERROR[case.fast] + BOUNDS["bfloat16"][0]
        error = assert_close(outputs[0], expected, dtype="bfloat16", max_error=max_error)
        rows.append({"case": case.name, "provider": name, "max_error": error.max})
    times = time_cuda_in_turn(chains)
    for row, us in zip(rows, times, strict=True):
        row |= {"us": us, "tflops": 2 * case.M * case.N * case.K / us / 1e6, "speed_of_scaled_mm": times[-1] / us}
    return rows


def lower(case: Case, reason: str) -> list[dict]:
    """Lower to text without a device; nothing runs."""
    target, rows = Target({"kind": "cuda", "arch": ARCH}), []
    for name, tile in case.tiles.items():
        with target:
            source = tilelang.lower(case.kernel(tile, NUM_SMS), target=target, enable_device_compile=False).kernel_source
        status = f"lowered for {ARCH}, not run: {reason}"
        rows.append({"case": case.name, "provider": f"intrinsic, {name}", "lines": source.count("\n"), "status": status})
    return rows


def main(command_line: list[str] | None = None) -> list[dict]:
    """Run the benchmark; return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="write every figure")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    for axis in "mnk":
        parser.add_argument(f"--{axis}", type=int, nargs="+", metavar=axis.upper(), help="one or several")
    arguments = parser.parse_args(command_line)
    _, device, reason = find_device("cuda")
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        device, reason = "none", f"{torch.cuda.get_device_name(0)} is no Hopper GPU"
    tilelang.set_log_level("WARNING")
    cases = [Case(*size, kind) for size in sizes_of(arguments, SIZES) for kind in arguments.cases]
    run = measure if device == "cuda" else lambda case, _: lower(case, reason)
    rows = [row for case in progress(cases, "fp8 intrinsic") for row in run(case, arguments.seed)]
    notes = [f"{name}: {tile}" for name, tile in {"wide": WIDE, "tall": TALL, "small": SMALL}.items()]
    notes += [METHOD["cuda"] + " All replay in turn."] if device == "cuda" else []
    title = f"T.fp8_scaled_matmul in a kernel of 40 lines, e4m3 to bfloat16, {describe(device)}"
    show(title, rows, TIMES if device == "cuda" else LOWERED, notes)
    if arguments.csv:
        write_csv(arguments.csv, rows)
    return rows


if __name__ == "__main__":
    main()

"""MXFP4 weights in a user's kernel, those of examples/mxfp4_scaled_matmul*.py, beside torch's bfloat16 product.

    python benchmark/bench_mxfp4_intrinsic.py                               # on a Hopper GPU
    python benchmark/bench_mxfp4_intrinsic.py --cases a16w4 --m 1 --n 4096 --k 4096 --tiles 8x32x512 8x16x256

Kernels of many rows are persistent, or have a block for each tile. Those of few rows begin when the one before them ends, or,
"chained", while it still runs (PDL).

Every result is checked against float64 before anything is timed; scales of W differ in each row and group. Without a Hopper
GPU the kernels are lowered and nothing is timed.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), str(ROOT / "testing"), str(ROOT / "examples")]

import mxfp4_scaled_matmul as by_tiles  # noqa: E402
import mxfp4_scaled_matmul_persistent as persistent  # noqa: E402
import tilelang  # noqa: E402
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
from mxfp4_scaled_matmul import FEW, MANY, SOME, Tile  # noqa: E402
from numeric import BOUNDS, assert_close  # noqa: E402
from tvm.target import Target  # noqa: E402

from tilelang_ext import reference  # noqa: E402

DTYPES = {"a16w4": torch.bfloat16, "a8w4": torch.float8_e4m3fn}
SIZES = [(4096, 4096, 4096), (16, 4096, 4096), (1, 4096, 4096)]
ARCH = "sm_90a"
NUM_SMS = 132  # of an H200
FEW_ROWS = 16
SUM_ERROR = {"a16w4": 2e-3, "a8w4": 3e-2}  # the matrix unit keeps fewer bits of a sum of fp8 products
SMALLEST_SCALE, SCALES = 117, 12  # bytes of E8M0: what one row of a8w4 may have to be multiplied in fp8
TIMES = (
    Column("case", "M x N x K"),
    Column("provider", "kernel"),
    Column("us", "us", ",.2f"),
    Column("tflops", "TFLOP/s", ",.0f"),
    Column("terabytes", "TB/s", ".2f"),
    Column("speed_of_torch", "speed / torch's", ".2f"),
    Column("max_error", "max error", ".1e"),
)


@dataclass(frozen=True)
class Case:
    """One product: its size, a key of DTYPES, the tiles to try."""

    M: int
    N: int
    K: int
    kind: str
    tiles: tuple[Tile, ...]

    @property
    def name(self) -> str:
        return f"{self.M}x{self.N}x{self.K} {self.kind}"

    @property
    def bytes(self) -> int:
        return self.M * self.K * DTYPES[self.kind].itemsize + self.N * self.K * 17 // 32 + 2 * self.M * self.N

    def kernels(self) -> dict:
        """Return the prim_funcs of the examples by name; those that decode have no scale of A."""
        dtype, size = str(DTYPES[self.kind]).removeprefix("torch."), (self.M, self.N, self.K)
        made = {}
        for tile in self.tiles:
            name = f"{tile.block_M}x{tile.block_N}, {tile.threads} threads"
            if self.M > FEW_ROWS:
                made[f"{name}, persistent"] = persistent.scaled_matmul(*size, tile, NUM_SMS, dtype)
                made[name] = by_tiles.scaled_matmul(*size, tile, dtype)
            else:
                made[name] = by_tiles.scaled_matmul(*size, tile, dtype)
                made[f"{name}, chained"] = by_tiles.scaled_matmul(*size, tile, dtype, chained=True)
            if self.kind == "a16w4":
                of_many = persistent.dequant_matmul(*size, tile, NUM_SMS) if self.M > FEW_ROWS else None
                made[f"{name}, dequant{', chained' if of_many is None else ', persistent'}"] = (
                    of_many or by_tiles.dequant_matmul(*size, tile, chained=True)
                )
        return made

    def inputs(self, seed: int) -> tuple[torch.Tensor, ...]:
        """Return (A, scale_a, W, scale_w) on the GPU, random; every scale differs."""
        generator = torch.Generator("cuda").manual_seed(seed)
        on = {"generator": generator, "device": "cuda"}
        A = torch.randn(self.M, self.K, **on).to(DTYPES[self.kind])
        W = torch.randint(0, 256, (self.N, self.K // 2), dtype=torch.uint8, **on)
        scale_w = torch.randint(SMALLEST_SCALE, SMALLEST_SCALE + SCALES, (self.N, self.K // 32), dtype=torch.uint8, **on)
        return A, torch.rand(self.M, **on) + 0.5, W, scale_w


def measure(case: Case, seed: int) -> list[dict]:
    """Check, then time: all on the same inputs, which rotate through more than the cache; torch on as many of its own."""
    sets = rotation(case.bytes, cache_bytes("cuda"))
    inputs = [case.inputs(seed + i) for i in range(sets)]
    outputs = [torch.empty(case.M, case.N, dtype=torch.bfloat16, device="cuda") for _ in range(sets)]
    A, scale_a, W, scale_w = inputs[0]
    expected = reference.mxfp4_matmul(A, W, scale_w)
    if case.kind != "a16w4":
        expected = expected * scale_a.double()[:, None]
    rows, chains = [], []
    for name, kernel in case.kernels().items():
        run = tilelang.compile(kernel, target={"kind": "cuda", "arch": ARCH})
        own = [one if len(kernel.params) == 5 else (one[0], *one[2:]) for one in inputs]
        chains.append([partial(run, *one, out) for one, out in zip(own, outputs, strict=True)])
        outputs[0].fill_(torch.nan)
        chains[-1][0]()
        error = assert_close(outputs[0], expected, dtype="bfloat16", max_error=SUM_ERROR[case.kind] + BOUNDS["bfloat16"][0])
        rows.append({"provider": name, "max_error": error.max})
    wide = [(one[0].bfloat16(), torch.randn(case.K, case.N, device="cuda").bfloat16().t().contiguous().t()) for one in inputs]
    chains.append([partial(torch.mm, *one, out=out) for one, out in zip(wide, outputs, strict=True)])
    rows.append({"provider": "torch bfloat16"})
    times = time_cuda_in_turn(chains)
    for row, us in zip(rows, times, strict=True):
        row |= {
            "case": case.name,
            "us": us,
            "tflops": 2 * case.M * case.N * case.K / us / 1e6,
            "speed_of_torch": times[-1] / us,
        }
        row["terabytes"] = None if row["provider"] == "torch bfloat16" else case.bytes / us / 1e6
    return rows


def lower(case: Case, reason: str) -> list[dict]:
    """Lower to text without a device; nothing runs."""
    target = Target({"kind": "cuda", "arch": ARCH})
    with target:
        source = tilelang.lower(next(iter(case.kernels().values())), target=target, enable_device_compile=False).kernel_source
    status = f"lowered for {ARCH}, not run: {reason}"
    return [{"case": case.name, "provider": "intrinsic", "lines": source.count("\n"), "status": status}]


def tiles_of(M: int, kind: str) -> tuple[Tile, ...]:
    """Return the example's tile for a number of rows; one row of fp8 takes 8, which the matrix unit needs."""
    return (FEW if M <= 8 else SOME,) if M <= 16 and kind == "a16w4" else (MANY if M > 16 else Tile(16, 128, 256),)


def main(command_line: list[str] | None = None) -> list[dict]:
    """Run the benchmark; return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="write every figure")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--cases", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--tiles", nargs="+", metavar="MxNxTHREADS", help="instead of the example's")
    for axis in "mnk":
        parser.add_argument(f"--{axis}", type=int, nargs="+", metavar=axis.upper(), help="one or several")
    arguments = parser.parse_args(command_line)
    _, device, reason = find_device("cuda")
    if device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        device, reason = "none", f"{torch.cuda.get_device_name(0)} is no Hopper GPU"
    tilelang.set_log_level("WARNING")
    given = tuple(Tile(*map(int, text.split("x"))) for text in arguments.tiles or ())
    cases = [
        Case(*size, kind, given or tiles_of(size[0], kind)) for size in sizes_of(arguments, SIZES) for kind in arguments.cases
    ]
    run = measure if device == "cuda" else lambda case, _: lower(case, reason)
    rows = [row for case in progress(cases, "mxfp4 intrinsic") for row in run(case, arguments.seed)]
    notes = [METHOD["cuda"] + " All replay in turn. TB/s: the bytes of each operand once."] if device == "cuda" else []
    title = f"T.mxfp4_scaled_matmul in a kernel of 30 lines, to bfloat16, {describe(device)}"
    show(title, rows, TIMES if device == "cuda" else LOWERED, notes)
    if arguments.csv:
        write_csv(arguments.csv, rows)
    return rows


if __name__ == "__main__":
    main()

"""Metal: what the products of this package read, write and wait for in the simulator, beside recorded counts of MLX's kernels.

    python benchmark/bench_metal_counts.py

Results are checked against float64. Counts are of one 8x8x8 MMA, barriers of 1,000. They are no measure of speed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "testing"), str(ROOT / "benchmark")]

import tilelang  # noqa: E402
from harness import Column, show  # noqa: E402
from kernels.matmul.operands import ALL, FP16, NONE, problem  # noqa: E402
from kernels.metal_counts import mxfp4_tile, per_mma, run_matmul, run_mxfp4, run_scaled  # noqa: E402
from kernels.scaled_mm.operands import MX, ROW  # noqa: E402
from simulator.mlx_figures import QMM_T_256, STEEL_512  # noqa: E402

from tilelang_ext.kernels.matmul.tiled import pick_config  # noqa: E402

COLUMNS = (
    Column("case", "M x N x K"),
    Column("kernel", "kernel"),
    Column("device", "device\nread\nB/MMA", ".1f"),
    Column("of_least", "of the\nleast", ".3f"),
    Column("read", "group\nread\nB/MMA", ".1f"),
    Column("written", "group\nwritten\nB/MMA", ".1f"),
    Column("barriers", "bar-\nriers /\n1,000", ".1f"),
)


def _row(case: str, kernel: str, report, least: int | None = None) -> dict:
    device, read, written, barriers = per_mma(report)
    return {
        "case": case, "kernel": kernel, "device": device, "read": read, "written": written, "barriers": barriers,
        "of_least": None if least is None else report.counts.device_bytes_read / least,
    }  # fmt: skip


def _recorded(case: str, kernel: str, figures) -> dict:
    device, constant, read, written, barriers = figures
    return {
        "case": case, "kernel": kernel, "device": device + constant, "read": read, "written": written, "barriers": barriers
    }  # fmt: skip


def main() -> list[dict]:
    """Count, and return the rows."""
    tilelang.set_log_level("WARNING")
    rows = []
    for M, N, K in ((512, 512, 512), (128, 128, 512), (16, 512, 512)):
        config = pick_config(problem(M, N, K, FP16, arch=""))
        tile = f"{config.block_M}x{config.block_N}x{config.block_K}, {config.threads} threads"
        for name, epilogue in (("matmul", NONE), ("and epilogue", ALL)):
            rows.append(_row(f"{M}x{N}x{K} float16", f"{name}, {tile}", run_matmul(M, N, K, epilogue)))
    rows += [_recorded("512x512x512 float16", f"MLX steel {tile}", figures) for tile, figures in STEEL_512.items()]
    for M in (128, 16):
        tile = mxfp4_tile(M, 128)
        text = f"{tile.block_M}x{tile.block_N}x{tile.block_K}, {tile.threads} threads"
        case = f"{M}x128x256 MXFP4"
        rows.append(_row(case, f"T.mxfp4_scaled_matmul, {text}", *run_mxfp4(M, 128, 256, tile)))
        rows.append(_row(case, f"T.mxfp4_dequant, T.gemm, {text}", *run_mxfp4(M, 128, 256, tile, dequant=True)))
    rows.append(_recorded("128x128x256 MXFP4", "MLX fp_qmm_t", QMM_T_256[4]))
    for recipe in (ROW, MX):
        rows.append(_row(f"128x128x256 E4M3, {recipe.name}", "scaled_mm", *run_scaled(128, 128, 256, recipe)))
    rows.append(_recorded("128x128x256 MXFP8", "MLX fp_qmm_t", QMM_T_256[8]))
    notes = ["Counts from executing the Metal text on the CPU; no measure of speed. MLX's are recorded: make test-peers."]
    show("products on Metal (counts, no speed)", rows, COLUMNS, notes)
    return rows


if __name__ == "__main__":
    main()

"""Benchmarks and examples: they run, check before they count or time, and never report a speed of the simulator."""

import contextlib
import csv
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmark"), str(ROOT / "examples")]

import bench_matmul  # noqa: E402
import harness  # noqa: E402


def run(*arguments):
    return bench_matmul.main([str(a) for a in arguments])


@pytest.mark.parametrize(
    ("target", "dtype", "size"),
    [("metal", "float16", (128, 64, 64)), ("metal", "bfloat16", (70, 40, 50)), ("metal4", "float32", (64, 64, 32))],
)
def test_counts_beside_the_minimum(target, dtype, size, capsys):
    M, N, K = size
    ours, minimum = run("--target", target, "--dtype", dtype, "--m", M, "--n", N, "--k", K)
    assert ours["findings"] == 0
    for key in ("mma", "device_bytes_read", "device_bytes_written"):
        assert ours[key] == minimum[key]
    output = capsys.readouterr().out
    assert "no speed" in output
    assert not any(word in output for word in ("FLOP", " us", "GB/s"))


TILE = {"block_M": 64, "block_N": 64, "block_K": 32, "threads": 128}


def test_minimum_is_a_hand_count(monkeypatch):
    """128 x 64 x 64 halves in 64x64x32 tiles: two threadgroups, each reading 64 rows of A and 64 columns of B."""
    monkeypatch.setattr(bench_matmul.Case, "blocks", TILE)
    case = bench_matmul.Case(128, 64, 64, "float16", "metal", "simulator")
    expected = {"mma": 16 * 8 * 8, "device_bytes_read": 2 * (64 * 64 + 64 * 64) * 2, "device_bytes_written": 128 * 64 * 2}
    assert bench_matmul.bare_minimum(case) == expected


def test_minimum_counts_whole_tiles_and_real_bytes(monkeypatch):
    monkeypatch.setattr(bench_matmul.Case, "blocks", TILE)
    case = bench_matmul.Case(65, 1, 33, "float32", "metal", "simulator")
    minimum = bench_matmul.bare_minimum(case)
    assert minimum["mma"] == 2 * 1 * 2 * 64 * 64 * 32 // 512
    assert minimum["device_bytes_read"] == (65 * 33 + 2 * 33) * 4


def test_wrong_result_stops_the_benchmark(monkeypatch):
    simulate = bench_matmul.simulate

    def off_by_one(kernel, A, B, C, **options):
        report = simulate(kernel, A, B, C, **options)
        C[-1, -1] += 1
        return report

    monkeypatch.setattr(bench_matmul, "simulate", off_by_one)
    with pytest.raises(AssertionError, match=r"worst at \(63, 63\)"):
        run("--target", "metal", "--m", 64)


def test_files(tmp_path):
    table, chart = tmp_path / "rows.csv", tmp_path / "chart.png"
    rows = run("--target", "metal", "--m", 64, 128, "--n", 64, "--k", 32, "--csv", table, "--plot", chart)
    with open(table) as file:
        read = list(csv.DictReader(file))
    assert [(row["case"], row["provider"]) for row in read] == [(row["case"], row["provider"]) for row in rows]
    assert [row["case"] for row in rows] == ["64x64x32"] * 2 + ["128x64x32"] * 2
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("target", ["cuda", "hip"])
@pytest.mark.parametrize("dtype", bench_matmul.DTYPES)
def test_lowers_without_a_device_and_says_so(target, dtype, monkeypatch):
    monkeypatch.setattr(harness, "usable_cuda", lambda: "no driver")
    big, small = run("--target", target, "--dtype", dtype, "--m", 4096, 64, "--n", 4096, "--k", 512)
    for row in (big, small):
        assert row["lines"] > 20
        assert row["status"].endswith("not run: no driver")
        assert "us" not in row


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_c_target_runs_on_the_cpu(dtype):
    ours, torchs = run("--target", "c", "--dtype", dtype, "--m", 50, "--n", 40, "--k", 33)
    assert (ours["provider"], torchs["provider"]) == ("ours", "torch")
    assert ours["us"] > 0


@pytest.mark.parametrize(("cuda", "mps", "expected"), [
    ("no GPU", False, ("metal", "simulator")), ("no GPU", True, ("metal", "mps")), (None, False, ("cuda", "cuda")),
])  # fmt: skip
def test_auto_takes_the_best_device(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(harness, "usable_cuda", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.version, "hip", None)
    assert harness.find_device("auto")[:2] == expected


def test_bad_arguments():
    with pytest.raises(SystemExit, match="--m, --n, --k: must have one value or as many each"):
        run("--target", "metal", "--m", 64, 64, "--n", 64, 64, 64, "--k", 64)
    with pytest.raises(SystemExit, match="--providers: must be among ours, plain, torch, mlx; got numpy"):
        run("--target", "metal", "--providers", "numpy")
    with pytest.raises(SystemExit, match="C target takes float16 or float32; got bfloat16"):
        run("--target", "c", "--dtype", "bfloat16")
    with pytest.raises(SystemExit, match="torch: left out, exists on cuda"):
        run("--target", "metal", "--providers", "torch")
    with pytest.raises(SystemExit, match="--random, --layout: need CUDA or ROCm; got in the simulator"):
        run("--target", "metal", "--random", 3)


def test_random_cases():
    """The same ones for a seed, of every layout and 16-bit dtype; what is contiguous in memory is a multiple of 8."""
    cases = list(bench_matmul.random_cases(40, 0, "cuda", "cuda"))
    assert cases == list(bench_matmul.random_cases(40, 0, "cuda", "cuda"))
    assert {case.layout for case in cases} == set(bench_matmul.LAYOUTS)
    assert {case.dtype for case in cases} == {"float16", "bfloat16"}
    for case in cases:
        assert 1 <= case.M <= 8192
        assert case.N % 8 == case.K % 8 == (case.M if case.layout[0] == "T" else 0) % 8 == 0
    A, B = bench_matmul.Case(3, 5, 7, "float16", "cuda", "cpu", "TT").inputs(0)
    assert (A.shape, A.stride(), B.shape, B.stride()) == ((3, 7), (1, 3), (7, 5), (1, 7))


def test_wall_clock_divides_by_the_calls(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    seen = []
    calls = [lambda: "a", lambda: "b"]
    assert harness.time_wall(calls, seen.append, repeats=3) == 1e6 / 2
    assert seen == [["a", "b"]] * 4


def test_rotation_passes_the_cache():
    assert harness.rotation(10, 100) == 30
    assert harness.rotation(10**6, 100) == 2
    assert harness.rotation(1, 10**6) == harness.MAX_ROTATION


def test_readme_kernel_prints_what_the_readme_shows(tmp_path):
    """The README's kernel, run as a reader would copy it, prints the README's next block."""
    blocks = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    place = next(i for i, (kind, _) in enumerate(blocks) if kind == "python")
    (tmp_path / "readme.py").write_text(blocks[place][1])
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(str(tmp_path / "readme.py"))
    assert output.getvalue() == blocks[place + 1][1]


def test_example(capsys):
    import matmul

    matmul.main(64, 70, 40)
    output = capsys.readouterr().out
    assert "findings: none" in output
    assert float(output.rsplit(maxsplit=1)[1]) < 1e-3


def test_the_legend_names_series_that_the_last_panel_lacks(tmp_path, monkeypatch):
    """Two panels: the second series has bars in the first alone, and keeps its colour."""
    from matplotlib.axes import Axes

    legends = []
    legend = Axes.legend
    monkeypatch.setattr(Axes, "legend", lambda axes, **options: legends.append(legend(axes, **options)))
    cases = [f"case {i}" for i in range(harness.BARS_IN_A_ROW // 2 + 1)]
    rows = [{"case": case, "of": "ours", "us": 1.0} for case in cases] + [{"case": cases[0], "of": "theirs", "us": 2.0}]
    harness.plot(str(tmp_path / "chart.png"), rows, case="case", series="of", value="us", title="t", label="us")
    both = legends[0].get_texts(), legends[0].get_patches()
    colours = {text.get_text(): patch.get_facecolor() for text, patch in zip(*both, strict=True)}
    assert colours["ours"] != colours["theirs"]

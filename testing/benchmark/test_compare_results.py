"""What moved between two runs of a benchmark: rows told apart by what they measured, slower only beside their peers."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmark")]

import compare_results as compare  # noqa: E402

BEFORE = [("8x8x8", "ours", 100.0), ("8x8x8", "torch", 100.0), ("9x9x9", "ours", 50.0), ("7x7x7", "ours", 10.0)]


def file_of(path: Path, rows, **columns) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", *columns, "provider", "max_error", "us"])
        writer.writerows([case, *columns.values(), provider, 1e-3, us] for case, provider, us in rows)
    return path


@pytest.mark.parametrize(
    ("after", "lines", "status"),
    [
        ([("8x8x8", "ours", 101.9), ("8x8x8", "torch", 98.1)], [], 0),
        # As much slower as its peer: the GPU is
        ([("8x8x8", "ours", 110.0), ("8x8x8", "torch", 109.0)], ["8x8x8 ours: 100.00 -> 110.00 us, 1.100, its peers 1.090"], 0),
        ([("8x8x8", "ours", 110.0), ("8x8x8", "torch", 100.0)], ["slower: 8x8x8 ours: 100.00 -> 110.00 us, 1.100"], 1),
        (
            [("9x9x9", "ours", 55.0), ("9x9x9", "ours", 40.0), ("9x9x9", "ours", 60.0)],
            ["slower: 9x9x9 ours: 50.00 -> 55.00"],
            1,
        ),
        ([("9x9x9", "ours", 40.0), ("1x1x1", "ours", 1.0)], ["  9x9x9 ours: 50.00 -> 40.00 us, 0.800"], 0),
        ([("8x8x8", "torch", 150.0)], ["8x8x8 torch: 100.00 -> 150.00"], 0),
    ],
)
def test_what_moved(after, lines, status, tmp_path, capsys):
    committed, new = file_of(tmp_path / "old.csv", BEFORE), file_of(tmp_path / "new.csv", after, tflops=3)
    assert compare.main([str(committed), str(new)]) == status
    printed = capsys.readouterr().out
    assert all(line in printed for line in lines)
    if not lines:
        assert "0 moved by more than 2%" in printed


def test_rows_are_told_apart_by_every_column_of_what_was_measured(tmp_path, capsys):
    committed = file_of(tmp_path / "old.csv", BEFORE, dtype="float16")
    assert compare.main([str(committed), str(file_of(tmp_path / "new.csv", [("8x8x8", "ours", 300.0)], dtype="bfloat16"))]) == 0
    assert "0 moved" in capsys.readouterr().out
    assert compare.main([str(tmp_path / "none.csv"), str(committed)]) == 0


def test_script_knows_its_parts():
    """Every part names benchmarks that exist and results that are committed or say so; an unknown one is an error."""
    script = ROOT / "benchmark" / "remeasure.sh"
    listed = subprocess.run(["sh", script, "--list"], capture_output=True, text=True, check=True).stdout.split()
    assert {"scaled_mm", "grid", "matmul", "mxfp4_moe"} <= set(listed)
    text = script.read_text()
    for name in {word for word in text.split() if word.startswith("bench_")}:
        assert (ROOT / "benchmark" / name).exists(), name
    wrong = subprocess.run(["sh", script, "nothing"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "remeasure: the part must be among" in wrong.stderr

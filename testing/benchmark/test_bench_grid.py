"""The benchmark over random sizes: what is drawn, and what it says of times; a wrong result stops it."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmark")]

import bench_grid as bench  # noqa: E402


def test_sizes_are_drawn_by_the_seed():
    sizes = bench.draw(7, 200)
    assert sizes == bench.draw(7, 200) != bench.draw(8, 200)
    assert sizes[:3] == [(19, 5888, 13952), (353, 3328, 27904), (125, 12928, 20096)]
    assert all(1 <= M <= 8192 and N % 128 == K % 128 == 0 and min(N, K) >= 1024 and max(N, K) <= 32768 for M, N, K in sizes)
    assert sum(M < 90 for M, _, _ in sizes) == pytest.approx(100, abs=20), "half of log-uniform rows are below the root of 8192"
    assert {N for _, N, _ in bench.draw(0, 5000)} == set(range(1024, 32769, 128))


def test_list_needs_no_gpu(capsys):
    assert bench.main(["--op", "scaled_mm", "--seed", "7", "--count", "2", "--list"]) == []
    assert capsys.readouterr().out.split() == ["19x5888x13952", "353x3328x27904"]


def rows(recipe, **times):
    return [{"case": f"8x1024x1024 {recipe}", "recipe": recipe, "provider": name, "us": us} for name, us in times.items()]


def test_summary():
    """Ours with fast accumulation beside the best of all, ours without beside torch without; a peer left out counts nothing."""
    row = bench.summary_of(rows("row", ours=12.0, ours_fast=10.0, torch=15.0, torch_fast=9.0, vllm=None))
    assert (row["ours_us"], row["peer"], row["speed"], row["exact_speed"]) == (10.0, "torch_fast", 0.9, 1.25)
    block = bench.summary_of(rows("block", ours=10.0, torch=15.0, deep_gemm=11.0))
    assert (block["peer"], block["speed"], block["exact_speed"]) == ("deep_gemm", 1.1, None)
    assert bench.summary_of(rows("block", ours=10.0))["speed"] is None
    assert bench.verdict("all", [0.5, 2.0]) == "all: 2 cases, geometric mean 1.000, worst 0.500 of the best peer"


def test_bad_arguments(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--op", "scaled_mm", "--sizes", "8x1024"])
    assert "must be as 8x27648x5120, M, N and K; got 8x1024; write it so" in capsys.readouterr().err
    monkeypatch.setattr(bench, "find_device", lambda target: ("cuda", "none", "torch sees no such GPU"))
    with pytest.raises(SystemExit, match="must run on an NVIDIA GPU; got torch sees no such GPU; --list prints"):
        bench.main(["--op", "scaled_mm"])

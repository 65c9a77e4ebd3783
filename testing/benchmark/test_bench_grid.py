"""The benchmark over random sizes: what is drawn, and what it says of times; a wrong result stops it."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmark")]

import bench_grid as bench  # noqa: E402
import mxfp4_moe_grid as grid  # noqa: E402


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


def test_mixtures_are_drawn_by_the_seed(capsys):
    cases = grid.draw(7, 100)
    assert cases == grid.draw(7, 100) != grid.draw(8, 100)
    sizes = [case.model[1:] for case in cases]
    assert all(H % 32 == I % 32 == 0 and min(H, I) >= 512 and max(H, I) <= 7168 for H, I, _, _ in sizes)
    assert all(8 <= E <= 896 and 1 <= top_k <= min(16, E) for _, _, E, top_k in sizes)
    assert all(case.bytes(case.model.experts) - 4 * case.tokens * case.model.hidden <= grid.MOST_BYTES for case in cases)
    assert {(case.a_dtype, case.zipf) for case in cases} == {(a, z) for a in ("bf16", "fp8") for z in (0.0, 1.0)}
    assert bench.main(["--op", "mxfp4_moe", "--sizes", "7168/2048/384/8x1024:fp8:zipf", "--list"]) == []
    assert capsys.readouterr().out == "7168/2048/384/8 x1024 fp8 zipf\n"
    with pytest.raises(SystemExit):
        bench.main(["--op", "mxfp4_moe", "--sizes", "7168/2048/384/8x1024"])
    assert "must be as 7168/2048/384/8x1024:fp8, H/I/E/top_k, tokens; got 7168/2048/384/8x1024" in capsys.readouterr().err


def test_hot_experts():
    """The hottest of 64 experts has one slot in five or so, not one in 64; which one it is differs with the seed."""
    case = grid.case_of("64/64/64/1x4096:bf16:zipf")
    counts = [case.inputs(seed, "cpu").topk_ids.flatten().bincount(minlength=64) for seed in (0, 1)]
    assert all(0.15 < count.max() / 4096 < 0.3 for count in counts)
    assert counts[0].argmax() != counts[1].argmax()
    uniform = grid.case_of("64/64/64/1x4096:bf16").inputs(0, "cpu").topk_ids.flatten().bincount(minlength=64)
    assert uniform.max() < 3 * 64


def test_summary_of_a_mixture():
    times = {"ours": 10.0, "humming": 12.0, "triton_kernels": None}
    found = [{"case": "c", "provider": name, "us": us, "gbps": 2000.0, "tflops": 5.0} for name, us in times.items()]
    row = grid.summary_of(found, 4000.0)
    assert (row["speed"], row["peer"], row["share_of_floor"]) == (1.2, "humming", 0.5)


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

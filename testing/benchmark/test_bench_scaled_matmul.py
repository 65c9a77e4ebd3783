"""The scaled matmul benchmark: counts beside a hand count, wrong results stop it, every provider gets its own layout."""

import csv
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmark")]

import bench_scaled_matmul as bench  # noqa: E402
import harness  # noqa: E402
import scaled_mm_peers  # noqa: E402
from bench_scaled_matmul import Case  # noqa: E402


def run(*arguments):
    return bench.main([str(a) for a in arguments])


def test_counts_beside_the_minimum(tmp_path, capsys):
    table, chart = tmp_path / "rows.csv", tmp_path / "chart.png"
    sizes = ("--m", 1, 64, "--n", 64, "--k", 256)
    rows = run("--target", "metal", *sizes, "--recipes", "row", "--csv", table, "--plot", chart)
    assert [row["provider"] for row in rows] == ["ours", "minimum"] * 2
    for ours, minimum in (rows[:2], rows[2:]):
        assert ours["findings"] == 0
        assert ours["device_bytes_read"] > minimum["device_bytes_read"]  # by the scales
        for key in ("mma", "device_bytes_written"):
            assert ours[key] == minimum[key]
    with open(table) as file:
        assert [row["case"] for row in csv.DictReader(file)] == ["1x64x256 row"] * 2 + ["64x64x256 row"] * 2
    assert chart.read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "no speed" in output
    assert not any(word in output for word in ("FLOP", " us", "GB/s"))


def test_minimum_is_a_hand_count():
    """65 x 130 x 300 in 64x32 tiles: two rows of five threadgroups; K is rounded up to 384."""
    case = Case(65, 130, 300, "row", "float32", "metal", "simulator")
    expected = {"mma": 16 * 20 * 48, "device_bytes_read": 5 * 65 * 300 + 2 * 130 * 300, "device_bytes_written": 65 * 130 * 4}
    assert bench.bare_minimum(case) == expected
    case = Case(2, 130, 256, "mx", "float16", "metal", "simulator")
    expected = {"mma": 0, "device_bytes_read": 130 * 256 + 3 * 2 * 256, "device_bytes_written": 2 * 130 * 2}
    assert bench.bare_minimum(case) == expected


def test_wrong_result_stops_the_benchmark(monkeypatch):
    simulate = bench.simulate

    def off_by_some(*arguments, **options):
        report = simulate(*arguments, **options)
        arguments[-1][-1, -1] += 100
        return report

    monkeypatch.setattr(bench, "simulate", off_by_some)
    with pytest.raises(AssertionError, match=r"worst at \(0, 63\)"):
        run("--target", "metal", "--m", 1, "--n", 64, "--k", 64, "--recipes", "tensor")


def test_lowers_without_a_device_and_says_so(monkeypatch):
    monkeypatch.setattr(harness, "usable_cuda", lambda: "no driver")
    for row in run("--target", "cuda", "--m", 1, 4096, "--n", 4096, "--k", 512, "--recipes", "row"):
        assert row["lines"] > 20
        assert row["status"] == "lowered for sm_90a, not run: no driver"
        assert "us" not in row


def dequantised(codes, scale, rows, cols):
    return (
        codes.double()
        * scale.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[: codes.shape[0], : codes.shape[1]].double()
    )


def fake_deep_gemm():
    """fp8_gemm_nt as DeepGEMM documents it, by float64."""

    def fp8_gemm_nt(a, b, out, disable_ue8m0_cast):
        assert disable_ue8m0_cast
        assert a[1].stride(0) == 1
        out.copy_(dequantised(*a, 1, 128) @ dequantised(*b, 128, 128).T)

    module = types.ModuleType("deep_gemm")
    module.fp8_gemm_nt = fp8_gemm_nt
    return module


def fake_cutlass_scaled_mm(out, a, b, scale_a, scale_b, bias):
    """cutlass_scaled_mm as vLLM documents it: (M, 1) and (1, N), or groups along both axes of both operands."""
    assert bias is None
    if scale_b.shape[0] == 1:
        return out.copy_((a.double() * scale_a) @ (b.double() * scale_b))
    assert scale_a.stride(0) == 1
    out.copy_(dequantised(a, scale_a, 1, 128) @ dequantised(b, scale_b, 128, 128))


@pytest.mark.parametrize("recipe", ["row", "block"])
def test_providers_agree(monkeypatch, recipe):
    """Each gets scales in the layout that it documents, and the time of a call is over all inputs."""
    monkeypatch.setattr(torch.ops._C, "cutlass_scaled_mm", fake_cutlass_scaled_mm, raising=False)
    monkeypatch.setitem(sys.modules, "deep_gemm", fake_deep_gemm())
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 100_000)
    timed = []
    monkeypatch.setattr(bench, "time_mps", lambda calls: timed.append([call() for call in calls]) or 2.0)
    case = Case(5, 256, 384, recipe, "bfloat16", "cuda", "cpu")
    providers = [p for p in bench.PROVIDERS if not (p.name.startswith("torch") and recipe == "block")]  # torch's CPU lacks it
    rows = bench.measure_time(case, providers, seed=0)
    names = {"row": ["ours", "ours_fast", "torch", "torch_fast", "vllm"], "block": ["ours", "vllm", "deep_gemm"]}[recipe]
    assert [row["provider"] for row in rows] == names
    assert all(len(calls) == bench.rotation(case.bytes, 100_000) for calls in timed)
    assert rows[0]["tflops"] == case.flops / 2.0 / 1e6
    assert rows[0]["speed_of_torch"] == (1.0 if recipe == "row" else None)


def test_optional_providers(monkeypatch):
    by_name = {provider.name: provider for provider in bench.PROVIDERS}
    monkeypatch.setattr(scaled_mm_peers, "find_spec", lambda name: None)
    monkeypatch.delattr(torch.ops._C, "cutlass_scaled_mm", raising=False)
    assert [name for name, provider in by_name.items() if not bench.installed(provider)] == ["vllm", "deep_gemm"]
    monkeypatch.setattr(torch.ops._C, "cutlass_scaled_mm", fake_cutlass_scaled_mm, raising=False)
    assert bench.installed(by_name["vllm"])


def test_bad_arguments(monkeypatch):
    with pytest.raises(SystemExit, match="torch: left out, exists on cuda"):
        run("--target", "metal", "--providers", "torch")
    monkeypatch.setattr(bench, "find_device", lambda target: ("hip", "cuda", None))
    with pytest.raises(SystemExit, match="--target: scaled_mm exists on metal, metal4, cuda; got hip"):
        run()

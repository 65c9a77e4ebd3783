"""Kernels of one's own that docs/guide/own_kernel.md shows: they run, and the guide shows what runs."""

import re
import sys
from pathlib import Path

import pytest
import tilelang
from numeric import assert_close
from tvm.target import Target

from tilelang_ext import simulate

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import attention
import gated_delta
import moe
import mxfp4_gemv

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx1100"])
def test_moe(target):
    """An expert without tokens, tokens that end inside a block."""

    def run(kernel, *arguments):
        report = simulate(kernel, *arguments, target=target)
        assert not report.findings, str(report)

    arguments, expected = moe.problem()
    assert_close(moe.moe(*arguments, run), expected, dtype="float32")


def test_moe_for_cuda():
    """The intrinsics become products of the matrix unit: decoded to bfloat16, and in one call over all of K on Hopper."""
    texts = {}

    def lower(kernel, *_):
        for arch in ("sm_80", "sm_90a"):
            target = Target({"kind": "cuda", "arch": arch})
            with target:
                text = tilelang.lower(kernel, target=target, enable_device_compile=False).kernel_source
            texts[kernel.attrs["global_symbol"], arch] = text

    moe.moe(*moe.problem()[0], lower)
    assert texts.keys() == {(name, arch) for name in ("gate_up", "down") for arch in ("sm_80", "sm_90a")}
    assert all("kBFloat16, tl::DataType::kBFloat16" in texts[name, "sm_80"] for name in ("gate_up", "down"))
    called = {name: re.findall(r"tilelang_ext::(mxfp4_\w+)<", texts[name, "sm_90a"]) for name in ("gate_up", "down")}
    assert called == {"gate_up": ["mxfp4_consume", "mxfp4_fetch"], "down": ["mxfp4_consume", "mxfp4_fetch"]}


def test_mxfp4_gemv():
    N, K = 16, 512
    report, error = mxfp4_gemv.run(N, K, "metal")
    assert not report.findings
    assert error < 1e-6
    # Codes and scales once, x once per block.
    assert report.counts.device_bytes_read == N * K // 2 + N * K // 32 + N // 8 * 2 * K


@pytest.mark.parametrize("name", ["moe", "mxfp4_gemv", "fp8_scaled_matmul_persistent"])
def test_the_guide_shows_the_kernel_of_the_example(name):
    source = (ROOT / "examples" / f"{name}.py").read_text()
    kernel = source.partition("# [kernel]\n")[2].partition("# [/kernel]")[0].strip("\n")
    assert kernel in (ROOT / "docs" / "guide" / "own_kernel.md").read_text()
    assert len(kernel.splitlines()) <= 80


def test_gated_delta():
    """On the CPU, by the reference; the window of replay is full once."""
    errors = gated_delta.main(["--batch", "3", "--steps", "10"])
    assert errors.pop("10 steps, bfloat16 state") < 0.1
    assert errors["10 steps, float32 state"] < 1e-5
    assert len(errors) == 6
    assert max(errors.values()) < 0.03


def test_attention():
    """On the CPU, by the reference: the masks of the three steps are the same ones."""
    assert max(attention.main([]).values()) < 1e-2

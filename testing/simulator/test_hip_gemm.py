"""T.gemm of every architecture: the emitted HIP text computes the product, and nothing is wrong with it."""

import pytest
from numeric import assert_close
from simulator.hip_kernels import ARCHS, gemm, operands, target

from tilelang_ext import simulate

FP16 = {
    "gfx90a": "mfma_f32_16x16x16f16",
    "gfx942": "mfma_f32_16x16x16f16",
    "gfx950": "mfma_f32_16x16x32_f16",
    "gfx1100": "wmma_f32_16x16x16_f16_w32",
    "gfx1201": "wmma_f32_16x16x16_f16_w32_gfx12",
}


@pytest.mark.parametrize("arch", ARCHS)
def test_fp16(arch):
    a, b, c, reference = operands(64, 64, 96, "float16")
    report = simulate(gemm(64, 64, 96, "float16"), a, b, c, target=target(arch))
    assert_close(c, reference, dtype="float32")
    assert report.findings == ()
    K = 32 if arch == "gfx950" else 16
    assert report.instructions == {FP16[arch]: 4 * 4 * 96 // K}
    assert report.counts.mma == 8 * 8 * 12

"""Kernels nobody here wrote: MLX's steel GEMM and quantised matmul, from the headers of its macOS wheel.

`pytest -m peers` downloads the wheel into a temporary folder; nothing of it is kept.
"""

import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from simulator.mlx_figures import QMM_T_256, STEEL_512, Figures

from tilelang_ext import formats, quantization, reference
from tilelang_ext.simulator import execute_msl

pytestmark = pytest.mark.peers

WHEEL = "mlx-metal==0.32.4"
GEMM = """
#include "mlx/backend/metal/kernels/utils.h"
#include "mlx/backend/metal/kernels/steel/gemm/gemm.h"
#include "mlx/backend/metal/kernels/steel/gemm/kernels/steel_gemm_fused.h"
"""
GEMM_NAX = """
#include "mlx/backend/metal/kernels/utils.h"
#include "mlx/backend/metal/kernels/steel/gemm/nax.h"
#include "mlx/backend/metal/kernels/steel/gemm/gemm_nax.h"
#include "mlx/backend/metal/kernels/steel/gemm/kernels/steel_gemm_fused_nax.h"
"""
QUANTIZED = """
#include "mlx/backend/metal/kernels/utils.h"
#include "mlx/backend/metal/kernels/steel/gemm/gemm.h"
#include "mlx/backend/metal/kernels/quantized_utils.h"
#include "mlx/backend/metal/kernels/quantized.h"
"""

FP_QUANTIZED = QUANTIZED.replace("quantized.h", "fp_quantized.h")


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlx")
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--platform", "macosx_14_0_arm64",
         "--only-binary=:all:", "--dest", str(folder), WHEEL],
        check=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [n for n in archive.namelist() if n.startswith("mlx/include/mlx/backend/metal/kernels/")])
    # bf16_math.h adds Apple's internals for bfloat, which the shim has under their public names.
    replaced = folder / "replaced" / "mlx" / "backend" / "metal" / "kernels" / "bf16_math.h"
    replaced.parent.mkdir(parents=True)
    replaced.touch()
    return folder / "replaced", folder / "mlx" / "include"


def template(name, *arguments):
    spelled = (str(a).lower() if isinstance(a, bool) else str(a) for a in arguments)
    return f"{name}<{', '.join(spelled)}>"


def run_gemm(headers, m, n, k, tile, trans_a, trans_b, source=GEMM):
    block_m, block_n, block_k, simd_m, simd_n = tile
    generator = torch.Generator().manual_seed(m + n + k)
    a, b = torch.randn(m, k, generator=generator).half(), torch.randn(k, n, generator=generator).half()
    d = torch.full((m, n), float("nan")).half()
    a_stored, b_stored = (a.T if trans_a else a).contiguous(), (b.T if trans_b else b).contiguous()
    tiles_n, tiles_m = -(-n // block_n), -(-m // block_m)
    params = struct.pack(
        "8i3q3i4x", m, n, k, a_stored.shape[1], b_stored.shape[1], n, tiles_n, tiles_m, 0, 0, 0, 0, k // block_k, 1
    )
    report = execute_msl(
        source,
        template("gemm", "half", *tile, trans_a, trans_b, "float"),
        [a_stored, b_stored, None, d, params, None, None, None],
        grid=(tiles_n, tiles_m, 1),
        threads=(32, simd_n, simd_m),
        constants={10: False, 100: False, 110: False, 200: m % block_m == 0, 201: n % block_n == 0, 202: k % block_k == 0},
        include_directories=headers,
    )
    reference = a.double() @ b.double()
    assert (d - reference).abs().max() <= 2**-10 * reference.abs().max()  # half an ulp of half, at the largest
    return report


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((128, 128, 128), (64, 64, 16, 2, 2)),
        ((100, 72, 50), (64, 64, 16, 2, 2)),  # ragged in every direction
        ((64, 96, 80), (64, 32, 32, 2, 2)),
        ((1, 33, 7), (32, 32, 16, 2, 2)),
    ],
)
@pytest.mark.parametrize(("trans_a", "trans_b"), [(False, False), (True, False), (False, True)])
def test_steel_gemm(headers, shape, tile, trans_a, trans_b):
    report = run_gemm(headers, *shape, tile, trans_a, trans_b)
    assert report.findings == (), str(report)


@pytest.mark.parametrize("shape", [(128, 128, 64), (100, 72, 50)])
@pytest.mark.parametrize(("trans_a", "trans_b"), [(False, False), (True, False), (False, True), (True, True)])
def test_steel_gemm_of_metal4(headers, shape, trans_a, trans_b):
    """matmul2d on cooperative tensors, whose layout MLX relies on."""
    report = run_gemm(headers, *shape, (64, 64, 32, 2, 2), trans_a, trans_b, source=GEMM_NAX)
    assert report.findings == (), str(report)
    assert report.counts.threadgroup_bytes_read == 0


def figures(report):
    """The counts of a launch per MMA, as they are recorded."""
    assert report.findings == (), str(report)
    counts, mma = report.counts, report.counts.mma
    return Figures(
        round(counts.device_bytes_read / mma, 1),
        round(counts.constant_bytes_read / mma, 1),
        counts.threadgroup_bytes_read / mma,
        counts.threadgroup_bytes_written / mma,
        round(1000 * counts.threadgroup_barriers / mma, 1),
    )


@pytest.mark.parametrize("tile", STEEL_512)
def test_steel_gemm_counts(headers, tile, record_property):
    report = run_gemm(headers, 512, 512, 512, tile, False, False)
    assert report.counts.mma == 64**3
    assert figures(report) == STEEL_512[tile]
    record_property("counts", str(report))


@pytest.mark.parametrize("bits", QMM_T_256)
def test_fp_qmm_t_counts(headers, bits, record_property):
    """y = x w^T with w in MXFP4 or MXFP8, as MLX multiplies more than a few rows by them."""
    m, n, k = 128, 128, 256
    generator = torch.Generator().manual_seed(bits)
    element = {4: formats.E2M1, 8: formats.E4M3}[bits]
    layout = formats.BlockScaledLayout.e8m0_k32()
    x = torch.randn(m, k, generator=generator).half()
    codes, scale = quantization.quantize(torch.randn(n, k, generator=generator), element, layout)
    y = torch.full((m, n), float("nan")).half()
    numbers = [struct.pack("i", v) for v in (k, n, m)]
    report = execute_msl(
        FP_QUANTIZED,
        template("fp_qmm_t", "half", 32, bits, True, False),
        [codes.view(torch.uint8), scale.view(torch.uint8), torch.zeros(1), x, y, *numbers, *[b"\0" * 64] * 7],
        grid=(n // 32, m // 32, 1),
        threads=(32, 2, 2),
        include_directories=headers,
    )
    expected = x.double() @ reference.dequantize(codes, scale, element, layout).double().T
    assert (y - expected).abs().max() <= 2**-10 * expected.abs().max()
    assert figures(report) == QMM_T_256[bits]
    record_property("counts", str(report))


@pytest.mark.parametrize(("m", "n"), [(32, 32), (40, 64)])
def test_quantized_matmul(headers, m, n):
    """affine_qmm_t: y = x w^T with w in 4 bits, scale and bias of each 64 along k."""
    k, group_size = 128, 64
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(m, k, generator=generator).half()
    codes = torch.randint(0, 16, (n, k), generator=generator)
    scales = torch.rand(n, k // group_size, generator=generator).half()
    biases = torch.randn(n, k // group_size, generator=generator).half()
    packed = (codes.reshape(n, k // 8, 8) << (4 * torch.arange(8))).sum(-1).to(torch.uint32)
    y = torch.full((m, n), float("nan")).half()
    weights = codes * scales.double().repeat_interleave(group_size, 1) + biases.double().repeat_interleave(group_size, 1)
    numbers = [struct.pack("i", v) for v in (k, n, m)]
    report = execute_msl(
        QUANTIZED,
        template("affine_qmm_t", "half", group_size, 4, n % 32 == 0, False),
        [packed, scales, biases, x, y, *numbers, *[b"\0" * 64] * 8],
        grid=(n // 32, -(-m // 32), 1),
        threads=(32, 2, 2),
        include_directories=headers,
    )
    assert report.findings == (), str(report)
    reference = x.double() @ weights.T
    # The kernel rounds the decoded weights to half.
    assert (y - reference).abs().max() <= 4e-3 * reference.abs().max()

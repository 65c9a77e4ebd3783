"""Quantisation of activations on the device: the codes and scales of the host's quantiser, bit for bit, ties included."""

import pytest
import torch
from kernels.mxfp4_moe.targets import TARGETS, compiled

from tilelang_ext import formats, quantization
from tilelang_ext.kernels.mxfp4_moe.formats import quantize_groups, quantize_rows

L = formats.BlockScaledLayout
ROWS, K = 48, 288


def values(dtype):
    """Rows of all magnitudes; from row 4 on mostly odd multiples of 1/32 of a row's largest element, which are ties."""
    generator = torch.Generator().manual_seed(0)
    low, high = (-30, 10) if dtype == torch.float16 else (-150, 100)
    scale = torch.exp2(torch.randint(low, high, (ROWS, 1), generator=generator).double())
    x = (torch.randn(ROWS, K, generator=generator).double() * scale).to(dtype)
    for row in range(4, 40):
        steps = torch.randint(16, 33, (K,), generator=generator) / 32 * (torch.rand(K, generator=generator) - 0.5).sign()
        largest = 1 + torch.randint(0, 128, (1,), generator=generator) / 128
        x[row] = largest * steps * torch.exp2(-torch.randint(0, 20, (K,), generator=generator).float())
        x[row, row % K] = largest
    x[0], x[1], x[2], x[3] = 0.0, -0.0, torch.finfo(dtype).smallest_normal / 64, torch.finfo(dtype).max
    return x


@pytest.mark.parametrize(("target", "dtype"), [*((target, torch.bfloat16) for target in TARGETS), ("metal", torch.float16)])
def test_rows(target, dtype):
    x = values(dtype)
    want, want_scale = quantization.quantize(x, formats.E4M3, L.per_row())
    codes, scale = torch.full((ROWS, K // 32, 32), 0x5A, dtype=torch.uint8), torch.full((ROWS,), torch.nan)
    compiled(quantize_rows, (str(dtype).removeprefix("torch."),), target)(x.view(ROWS, -1, 32), codes, scale)
    assert torch.equal(scale, want_scale.flatten())
    assert torch.equal(codes.view(ROWS, K), want.view(torch.uint8))


def test_a_row_with_nan_or_infinity_has_the_scale_nan():
    x = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0, 0, 5], x[2, 0, 31] = torch.inf, torch.nan
    codes, scale = torch.zeros(3, 1, 32, dtype=torch.uint8), torch.zeros(3)
    compiled(quantize_rows, ("bfloat16",), "c")(x, codes, scale)
    assert scale.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize(("a_format", "target"), [("mxfp8", "c"), ("mxfp4", "metal")])
def test_groups(a_format, target):
    x = values(torch.bfloat16).view(-1, 32)
    want, want_scale = quantization.quantize(x, {"mxfp8": formats.E4M3, "mxfp4": formats.E2M1}[a_format], L.e8m0_k32())
    codes, scale = torch.full(want.shape, 0x5A, dtype=torch.uint8), torch.full(want_scale.shape, 0x5A, dtype=torch.uint8)
    compiled(quantize_groups, (a_format, "bfloat16"), target)(x, codes, scale)
    assert torch.equal(scale, want_scale)
    assert torch.equal(codes, want.view(torch.uint8))

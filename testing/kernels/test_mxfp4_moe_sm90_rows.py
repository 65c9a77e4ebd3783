"""Rows of the mixture of experts on Hopper: every quotient, and rows of any length, by running the CUDA text on the CPU."""

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.hopper import execute
from kernels.test_mxfp4_moe_sm90 import ARCH, quantized, text_of

from tilelang_ext.kernels import mxfp4_moe_sm90_rows as rows


def quantize_sorted(x):
    """(codes, scale) of every row of x, by the kernel."""
    count, columns = x.shape
    codes, scale = torch.full(x.shape, torch.nan).to(torch.float8_e4m3fn), torch.full((count,), torch.nan)
    tensors = {"x": x, "positions": torch.arange(count, dtype=torch.int32), "codes": codes, "scale": scale}
    execute(text_of(rows, rows.quantize_sorted(columns)), (count, 1), tensors, {}, {"slots": count, "rows": count})
    return codes, scale


@needs_compiler
def test_every_quotient():
    """All significands under all largest significands, to what rounds to zero: the bits of a division rounded once."""
    significands = 1 + torch.arange(128) / 128
    largest = significands * torch.exp2(torch.arange(128) * 7 % 160 - 80.0)
    x = significands * torch.exp2(-torch.arange(20.0))[:, None] * torch.tensor([1, -1])[:, None, None]
    x = torch.minimum(x.flatten().abs(), significands[:, None]) * x.flatten().sign()  # a row for each of `largest`
    x = (x * (largest / significands)[:, None]).bfloat16()
    x[:, 5] = -0.0
    codes, scale = quantize_sorted(x)
    want_codes, want_scale = quantized(x)
    assert torch.equal(scale, want_scale)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))


@needs_compiler
@pytest.mark.parametrize("columns", [32, 2048, 2080, 8224])
def test_length(columns):
    """The largest element first, in the middle and last: less than a warp, whole steps, one more than them."""
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(columns)).bfloat16()
    x[0, 0], x[1, columns // 2], x[2, -1] = 9, -9, 9
    codes, scale = quantize_sorted(x)
    want_codes, want_scale = quantized(x)
    assert torch.equal(scale, want_scale)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))


@needs_nvcc
def test_machine_code():
    """A division for the scale, one for its inverse, and none for an element; no spills."""
    texts = {
        "scattered": text_of(rows, rows.scatter_quantized(7168), "scattered"),
        "sorted": text_of(rows, rows.quantize_sorted(2048), "sorted"),
    }
    for name, program in compile_texts(texts, ARCH).items():
        assert program.spilled == 0, name
        assert program.count("CALL") == 2, name

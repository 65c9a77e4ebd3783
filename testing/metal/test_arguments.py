"""Tensors whose memory is not one element after another: the views that a kernel declares, and two FP4 codes in a byte."""

import pytest
import torch

from tilelang_ext import language as T
from tilelang_ext import metal, simulate

CODES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@T.prim_func
def views(
    rows: T.StridedTensor((16, 64), (128, 1), "float32"),
    columns: T.StridedTensor((64, 16), (1, 64), "float32"),
    out: T.StridedTensor((16, 64), (96, 1), "float32"),
):
    """out = rows + columns transposed, each with a pitch of its own."""
    with T.Kernel(1, threads=64):
        for i, j in T.Parallel(16, 64):
            out[i, j] = rows[i, j] + columns[j, i]


@T.prim_func
def codes(
    packed: T.Tensor((16, 64), "float4_e2m1fn"),
    values: T.Tensor((16, 64), "float32"),
    again: T.Tensor((16, 64), "float4_e2m1fn"),
):
    with T.Kernel(1, threads=32):
        p, v = T.alloc_fragment((16, 64), "float4_e2m1fn"), T.alloc_fragment((16, 64), "float32")
        T.copy(packed, p)
        T.copy(p, v)
        T.copy(v, values)
        T.copy(v, again)


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx942"])
def test_views(target):
    wide, tall, out = torch.randn(16, 128), torch.randn(16, 64).t(), torch.full((16, 96), 7.0)
    report = simulate(views, wide[:, 64:], tall, out[:, 8:72], target=target)
    assert not report.findings, str(report)
    assert torch.equal(out[:, 8:72], wide[:, 64:] + tall.t())
    assert (out[:, :8] == 7).all()
    assert (out[:, 72:] == 7).all()


def test_other_strides_are_refused():
    program = metal.lower(views)
    rows, columns, out = torch.randn(16, 128)[:, :64], torch.randn(16, 64).t(), torch.zeros(16, 96)[:, :64]
    for wrong in (rows.contiguous(), torch.randn(16, 130)[:, :64]):
        with pytest.raises(ValueError, match=r"rows must have strides \(128, 1\); got \(\d+, 1\); pass a view that has them"):
            program.bind([wrong, columns, out], device="cpu")
    with pytest.raises(ValueError, match=r"columns must have strides \(1, 64\); got \(16, 1\)"):
        program.bind([rows, columns.contiguous(), out], device="cpu")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float4_e2m1fn_x2])
def test_packed_codes(dtype):
    packed, again = torch.randint(0, 256, (16, 32), dtype=torch.uint8), torch.zeros(16, 32, dtype=torch.uint8)
    values = torch.zeros(16, 64)
    report = simulate(codes, packed.view(dtype), values, again.view(dtype))
    assert not report.findings, str(report)
    low, high = CODES[(packed & 15).long()], CODES[(packed >> 4).long()]
    assert torch.equal(values, torch.stack([low, high], -1).flatten(-2))
    assert torch.equal(again, packed)


@pytest.mark.parametrize("shape", [(16, 64), (32, 32), (16, 16)])
def test_codes_in_another_shape_are_refused(shape):
    program = metal.lower(codes)
    wrong, right = torch.zeros(shape, dtype=torch.uint8), torch.zeros(16, 32, dtype=torch.uint8)
    message = rf"packed must have shape \(16, 32\); got \({shape[0]}, {shape[1]}\)"
    with pytest.raises(ValueError, match=message):
        program.bind([wrong, torch.zeros(16, 64), right], device="cpu")

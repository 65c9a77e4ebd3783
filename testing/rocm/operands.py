"""Operands of the fp8 products that the ROCm room's tests run in the simulator and on a device."""

import torch
from language.fp8_cases import operand
from rocm.kernels import LAYOUTS

from tilelang_ext import formats, quantization


def codes(rows, K, dtype, seed):
    """Random finite codes of every magnitude, subnormals included, as the type; and their values."""
    format = formats.format_of(dtype)
    finite = torch.tensor([c for c, v in enumerate(format.values) if abs(v) <= 4.0], dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    drawn = finite[torch.randint(len(finite), (rows, K), generator=generator)]
    return drawn.view(getattr(torch, format.torch_dtype)), quantization.decode(drawn, format, dtype=torch.float64)


def quantized(layout, M, N, K):
    """A, its scales, B and its scales; scales differ in every row and group."""
    a, b = LAYOUTS[layout]
    (A, SA), (B, SB) = operand(M, K, a, seed=0), operand(N, K, b, seed=1)
    return A, SA.reshape(a.scale_shape(M, K)), B, SB.reshape(b.scale_shape(N, K))

"""What tests of the kernels for Hopper share: their CUDA text, and rows quantised by the host."""

import torch
from cuda.kernels import lower

from tilelang_ext import quantization
from tilelang_ext.formats import E4M3, BlockScaledLayout

ARCH = "sm_90a"


def text_of(prim_func, pass_configs, name="kernel"):
    """The CUDA text of a prim_func that is called `name`."""
    return lower(prim_func.with_attr("global_symbol", name), ARCH, **pass_configs)


def quantized(x):
    """The rows of x as (codes, scale)."""
    codes, scale = quantization.quantize(x, E4M3, BlockScaledLayout.per_row())
    return codes.view(torch.float8_e4m3fn), scale.flatten()

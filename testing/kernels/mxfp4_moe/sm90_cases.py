"""What tests of the kernels for Hopper share: their CUDA text, and rows quantised by the host."""

import torch
from cuda.kernels import lower
from tilelang import tvm

from tilelang_ext import quantization
from tilelang_ext.formats import E4M3, BlockScaledLayout

ARCH = "sm_90a"


_texts: dict = {}  # by structural hash and configs: (prim_func, text) of each


def text_of(prim_func, pass_configs, name="kernel"):
    """The CUDA text of a prim_func that is called `name`; prim_funcs that are equal are lowered once."""
    prim_func = prim_func.with_attr("global_symbol", name)
    alike = _texts.setdefault((tvm.ir.structural_hash(prim_func), repr(pass_configs)), [])
    for other, text in alike:
        if tvm.ir.structural_equal(prim_func, other):
            return text
    alike.append((prim_func, lower(prim_func, ARCH, **pass_configs)))
    return alike[-1][1]


def quantized(x):
    """The rows of x as (codes, scale)."""
    codes, scale = quantization.quantize(x, E4M3, BlockScaledLayout.per_row())
    return codes.view(torch.float8_e4m3fn), scale.flatten()

"""What the tests of the Hopper kernels share: their CUDA text, and rows as they are quantised for them."""

import torch
from tilelang import tvm
from tilelang.engine.lower import lower
from tvm.target import Target

from tilelang_ext import quantization
from tilelang_ext.formats import E4M3, BlockScaledLayout

ARCH = "sm_90a"


def text_of(module, prim_func, name="product"):
    target = Target({"kind": "cuda", "arch": ARCH})
    with tvm.transform.PassContext(config=module.PASS_CONFIGS), target:
        return lower(prim_func.with_attr("global_symbol", name), target=target, enable_device_compile=False).kernel_source


def quantized(x):
    """(codes, scale) of rows."""
    codes, scale = quantization.quantize(x, E4M3, BlockScaledLayout.per_row())
    return codes.view(torch.float8_e4m3fn), scale.flatten()

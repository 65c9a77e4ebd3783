"""Operands of scaled matmuls for tests: recipes, codes and scales, as kernels and as torch take them."""

import torch
import torch.nn.functional as F
from torch.nn.functional import ScalingType

from tilelang_ext import formats, quantization, reference
from tilelang_ext.kernels.scaled_mm.arguments import LAYOUTS
from tilelang_ext.kernels.scaled_mm.problem import Problem, bucket_of

TENSOR, ROW, MX = ScalingType.TensorWise, ScalingType.RowWise, ScalingType.BlockWise1x32
ROW_BLOCK, SQUARE_BLOCK = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
PAIRS = [(TENSOR, TENSOR), (ROW, ROW), (MX, MX), (ROW_BLOCK, ROW_BLOCK), (ROW_BLOCK, SQUARE_BLOCK), (SQUARE_BLOCK, ROW_BLOCK)]
E4M3, E5M2 = formats.E4M3, formats.E5M2


def operand(rows, K, recipe, format=E4M3, seed=0):
    """Codes (rows, K) and scales by blocks; magnitudes differ in every row and group of K."""
    generator = torch.Generator().manual_seed(seed)
    layout = LAYOUTS[recipe.value]
    spread = torch.exp2(torch.randint(-1, 2, (rows, -(-K // 32)), generator=generator).float())
    values = torch.randn(rows, K, generator=generator) * spread.repeat_interleave(32, 1)[:, :K]
    codes, scale = quantization.quantize(values, format, layout)
    return codes, scale


def as_torch(scale, recipe, side):
    """Scales by blocks in the orientation and strides that torch documents for a recipe."""
    if recipe == ROW:
        return scale if side == "a" else scale.t()
    if recipe == ROW_BLOCK:
        return scale.t().contiguous().t()
    if recipe == SQUARE_BLOCK:
        groups = scale.shape[1]
        return F.pad(scale, (0, -groups % 4), value=torch.nan).t()
    return scale.view(torch.float8_e8m0fnu) if recipe == MX else scale


def operands(M, N, K, recipes, format_a=E4M3, format_b=E4M3):
    """a, scale_a, b, scale_b as kernels take them, and the float64 product."""
    layouts = [LAYOUTS[recipe.value] for recipe in recipes]
    (a, scale_a), (b, scale_b) = operand(M, K, recipes[0], format_a, 1), operand(N, K, recipes[1], format_b, 2)
    return (a, scale_a, b, scale_b), reference.scaled_matmul(a, scale_a, b, scale_b, *layouts)


def case(M, N, K, recipes, format_a=E4M3, format_b=E4M3):
    """Arguments of scaled_mm up to the recipes, and the float64 product."""
    (a, scale_a, b, scale_b), expected = operands(M, N, K, recipes, format_a, format_b)
    scales = as_torch(scale_a, recipes[0], "a"), as_torch(scale_b, recipes[1], "b")
    return (a, b.t(), scales[0], recipes[0], scales[1], recipes[1]), expected


def problem(M, N, K, recipes, *, kind="metal", arch="", a=E4M3, b=E4M3, bias=None, out="float32", fast_accum=False):
    """What a kernel for these operands is compiled for."""
    layouts = [LAYOUTS[recipe.value] for recipe in recipes]
    num_sms = {"cuda": 132, "hip": 304, "metal": 0}[kind]  # of an H200, of an MI300X
    return Problem(kind, arch, num_sms, bucket_of(M), N, K, a.dtype, b.dtype, *layouts, bias, out, fast_accum)

"""The plan of `mxfp4_moe`: its arguments, its key, and what stands in for tensors that kernels cannot read.

The arguments are those of the function, with the fields of `HopperWeights`; those of the torch operator `mxfp4_moe_out` become
them by `to_plan`. Needs torch alone: an exported folder holds a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.arguments import Operands
from tilelang_ext.kernels.mxfp4_moe.problem import GENERAL_LAYOUT, HOPPER_LAYOUTS
from tilelang_ext.launch.expression import fact, recipe_of, shape

# What a_dtype may be beside the dtype of x, and the formats of activations that they are.
A_FORMATS = {
    torch.float8_e4m3fn: "fp8",
    torch.float4_e2m1fn_x2: "mxfp4",
    **{name: name for name in ("fp8", "mxfp8", "mxfp4")},
}
_SIXTEEN_BITS = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
TYPES = {
    **dict.fromkeys(("x", "topk_ids", "topk_weights"), "tensor"),
    **{"w13": "tensor", "scale13": "tensor", "bias13": "tensor", "rows13": "int", "k13": "int", "tiles13": "str"},
    **{"gated13": "int", "w2": "tensor", "scale2": "tensor", "bias2": "tensor", "rows2": "int", "k2": "int", "tiles2": "str"},
    **{"gated2": "int"},
    **{"activation": "str", "alpha": "float", "limit": "float", "a_format": "str", "epilogue": "str"},
    **{"expert_mask": "tensor", "out": "tensor"},
}
_TILES_OF = {GENERAL_LAYOUT: GENERAL_LAYOUT, **{layout: a_format for a_format, layout in HOPPER_LAYOUTS.items()}}
_KEY = (
    *(fact("value", name) for name, type in TYPES.items() if type != "tensor"),
    *(fact("dtype", name) for name in ("x", "topk_ids", "topk_weights", "expert_mask", "out")),
    fact("device", "x"),
    shape("topk_ids", 1),
    shape("w13", 0),
    shape("expert_mask", 0),
)
RECIPE = {
    "name": "mxfp4_moe",
    "arguments": [{"name": name, "type": type} for name, type in TYPES.items()],
    "key": [recipe_of(value) for value in _KEY],
    "size": recipe_of(shape("x", 0)),
}


def options_of(activation: Activation, a_dtype: torch.dtype | str | None, x: Tensor) -> tuple[str, float, float, str | None]:
    """Return the plan's arguments that are no tensors, but the epilogue; the format is None where `a_dtype` is none of them."""
    a_format = A_FORMATS.get(a_dtype) or _SIXTEEN_BITS.get(x.dtype if a_dtype is None else a_dtype)
    return activation.name, activation.alpha, activation.limit, a_format


def to_plan(arguments: tuple) -> tuple:
    """Return the plan's arguments from those of `mxfp4_moe_out`: weights become the fields of `HopperWeights`."""
    *w13, layout13 = arguments[3:9]
    *w2, layout2 = arguments[9:15]
    return (*arguments[:3], *w13, _TILES_OF[layout13], True, *w2, _TILES_OF[layout2], False, *arguments[15:])


def readable(operands: Operands) -> Operands:
    """Return the operands with copies in place of tensors that kernels cannot read."""
    x, topk_ids, topk_weights, w13, w2, expert_mask = operands
    mask = None if expert_mask is None else expert_mask.int()
    return Operands(x.contiguous(), topk_ids.contiguous(), topk_weights.float().contiguous(), w13, w2, mask)

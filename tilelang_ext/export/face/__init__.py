"""`scaled_mm` and `mxfp4_moe` from kernels that were compiled before: needs torch and apache-tvm-ffi alone.

    import torch, tilelang_ext_aot
    tilelang_ext_aot.scaled_mm(a, weight.t(), scale_a, RowWise, scale_b, RowWise)

The functions are those of tilelang_ext, with its checks, its plans and its machine code, for the sizes that were exported:
`exported()` lists them. They are no operators of torch: torch.compile does not trace them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from tilelang_ext.export.face.table import Table, exported
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.arguments import Operands
from tilelang_ext.kernels.mxfp4_moe.arguments import check as check_moe
from tilelang_ext.kernels.mxfp4_moe.signature import options_of as options_of_moe
from tilelang_ext.kernels.mxfp4_moe.signature import readable
from tilelang_ext.kernels.mxfp4_moe.signature import to_plan as to_plan_of_moe
from tilelang_ext.kernels.mxfp4_moe.weights import (
    HopperWeights,
    MXFP4Weights,
    prepare_mxfp4_weights,
    tile_for_hopper,
    to_arguments,
)
from tilelang_ext.kernels.scaled_mm.arguments import (
    check,
    check_matrices,
    check_output_dtype,
    only_scale,
    options_of,
    unpack,
)
from tilelang_ext.kernels.scaled_mm.signature import MEMBERS, to_plan, with_memory_of_kernels
from tilelang_ext.launch.gradient import without_gradient

__all__ = [
    "Activation",
    "HopperWeights",
    "MXFP4Weights",
    "exported",
    "mxfp4_moe",
    "prepare_mxfp4_weights",
    "scaled_mm",
    "tile_for_hopper",
]
_MATMUL, _MOE = Table("scaled_mm", MEMBERS), Table("mxfp4_moe")
_CONTRACTIONS = ((), (1, 0), (-1, -2), (-1, 0), (1, -2))


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor,
    scale_recipe_a: ScalingType,
    scale_b: Tensor,
    scale_recipe_b: ScalingType,
    swizzle_a: SwizzleType | None = None,
    swizzle_b: SwizzleType | None = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
    contraction_dim: tuple[int, ...] | list[int] = (),
    use_fast_accum: bool = False,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply fp8 matrices, each times its scales: tilelang_ext.scaled_mm, for the sizes that were exported.

    Raises as that does, and NotImplementedError for arguments whose kernel was not exported.
    """
    if out is not None and _MATMUL.launch_directly(
        mat_a, mat_b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, swizzle_a, swizzle_b, bias, use_fast_accum, out
    ):
        return out
    if contraction_dim and tuple(contraction_dim) not in _CONTRACTIONS:
        raise ValueError(
            f"scaled_mm: contraction_dim must be () or (1, 0); got {tuple(contraction_dim)}; transpose the operand"
        )
    check_output_dtype("output_dtype", output_dtype)
    packed = options_of(scale_recipe_a, swizzle_a, scale_recipe_b, swizzle_b, use_fast_accum)
    scale_a, scale_b = only_scale("scale_a", scale_a), only_scale("scale_b", scale_b)
    if out is None:
        check_matrices(mat_a, mat_b)
        out = mat_a.new_empty((mat_a.shape[0], mat_b.shape[1]), dtype=output_dtype)
    scales = check(mat_a, mat_b, scale_a, scale_b, bias, unpack(packed), out)
    _check_device("scaled_mm", "mat_a", mat_a)
    if out.numel():
        if mat_a.shape[1] == 0:
            out.zero_()
        else:
            arguments = mat_a, mat_b, scale_a, scale_b, bias, packed, out
            _MATMUL.launch(*to_plan(with_memory_of_kernels(arguments, scales)))
    return without_gradient("scaled_mm", out, mat_a, mat_b, scale_a, scale_b, bias)


def mxfp4_moe(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: HopperWeights,
    w2: HopperWeights,
    *,
    activation: Activation,
    a_dtype: torch.dtype | str | None = None,
    epilogue: str = "reduce",
    expert_mask: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Compute the experts of every token and add their results, weighted: tilelang_ext.mxfp4_moe, for what was exported.

    Raises as that does, and NotImplementedError for arguments whose kernels were not exported.
    """
    for name, weights in (("w13", w13), ("w2", w2)):
        if type(weights) is not HopperWeights:
            raise TypeError(
                f"mxfp4_moe: {name} must be HopperWeights; got {type(weights).__name__}; call prepare_mxfp4_weights, then "
                "tile_for_hopper"
            )
    options = *options_of_moe(activation, a_dtype, x), epilogue, expert_mask
    if out is not None and _MOE.launch_directly(x, topk_ids, topk_weights, *w13, *w2, *options, out):
        return out
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    *_, a_format, _, _ = options
    if a_format is None or not w13.gated or w2.gated:
        raise ValueError(
            f"mxfp4_moe: a_dtype must be None, x's dtype or an fp8 dtype, w13 with gate and w2 without; got {a_dtype}, "
            f"{w13.gated} and {w2.gated}; see prepare_mxfp4_weights"
        )
    operands = Operands(x, topk_ids, topk_weights, w13, w2, expert_mask)
    check_moe(operands, activation, a_format, epilogue, out)
    _check_device("mxfp4_moe", "x", x)
    if not topk_ids.numel():
        out.zero_()
    else:
        given = readable(operands)
        weights = *to_arguments(w13), *to_arguments(w2)
        _MOE.launch(*to_plan_of_moe((*given[:3], *weights, *options[:-1], given.expert_mask, out)))
    return without_gradient("mxfp4_moe", out, x, topk_weights)


def _check_device(operator: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_cuda:
        raise NotImplementedError(
            f"{operator}: {name} must be on an NVIDIA GPU, for which kernels were exported; got {tensor.device.type}; "
            "move the tensors, or install tilelang_ext"
        )

"""The checks of `scaled_mm`: which arguments torch's scaled_mm takes, and scales as kernels read them.

Kernels read scales as (row blocks, groups of K), whatever orientation torch gives a recipe: as views of the caller's memory,
except for swizzled scales, which are copied. Source of shapes and strides:
torch 2.13, torch._meta_registrations, _scaled_mm_v2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType

from tilelang_ext.formats import FP8_OPERANDS, MX_GROUP, OCP_OF_FNUZ, BlockScaledLayout

# Operators take enums by their values.
TENSOR, ROW, MX = ScalingType.TensorWise.value, ScalingType.RowWise.value, ScalingType.BlockWise1x32.value
ROW_BLOCK, SQUARE_BLOCK = ScalingType.BlockWise1x128.value, ScalingType.BlockWise128x128.value
LAYOUTS = {
    TENSOR: BlockScaledLayout.per_tensor(),
    ROW: BlockScaledLayout.per_row(),
    MX: BlockScaledLayout.e8m0_k32(),
    ROW_BLOCK: BlockScaledLayout.block(1, 128),
    SQUARE_BLOCK: BlockScaledLayout.block(128, 128),
}
# Members of torch's enums, which live as long as torch does, and what they are to the operator.
RECIPES = {
    member: member.value
    for member in (
        ScalingType.TensorWise,
        ScalingType.RowWise,
        ScalingType.BlockWise1x32,
        ScalingType.BlockWise1x128,
        ScalingType.BlockWise128x128,
    )
}
SWIZZLES = {member: member.value for member in (SwizzleType.NO_SWIZZLE, SwizzleType.SWIZZLE_32_4_4)}
SWIZZLES[None] = SwizzleType.NO_SWIZZLE.value
_RECIPE_BITS = {id(member): value for member, value in RECIPES.items()}
_SWIZZLE_BITS = {id(member): value for member, value in SWIZZLES.items()}
_PAIRS = (*((recipe, recipe) for recipe in (TENSOR, ROW, MX, ROW_BLOCK)), (ROW_BLOCK, SQUARE_BLOCK), (SQUARE_BLOCK, ROW_BLOCK))
_OPERANDS = tuple(getattr(torch, format.torch_dtype) for format in FP8_OPERANDS)
FNUZ = tuple(getattr(torch, format.torch_dtype) for format in OCP_OF_FNUZ)
OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)
_MX_SCALES = (torch.float8_e8m0fnu, torch.uint8)
_SWIZZLE_ROWS, _SWIZZLE_GROUPS, _SWIZZLE_LANES = 128, 4, 32  # SWIZZLE_32_4_4: tiles of 128 rows by 4 groups, 32 rows a lane
_PADDING = 4  # torch pads the groups of 128x128 scales to a multiple of it


class Options(NamedTuple):
    """The operator's arguments that are not tensors, by their values. They reach it as one integer, since each costs time."""

    recipe_a: int
    swizzle_a: int
    recipe_b: int
    swizzle_b: int
    use_fast_accum: bool

    def pack(self) -> int:
        """Return one integer, four bits for each option."""
        return sum(value << 4 * i for i, value in enumerate(self))


def unpack(options: int) -> Options:
    """Return what `Options.pack` has packed."""
    *values, use_fast_accum = (options >> 4 * i & 15 for i in range(len(Options._fields)))
    return Options(*values, bool(use_fast_accum))


def options_of(recipe_a, swizzle_a, recipe_b, swizzle_b, use_fast_accum: bool) -> int:
    """Return the packed options of a call. Raises for recipes and swizzles that are not torch's, or for fp4."""
    try:  # members of torch's enums, as themselves: their own hash and value take longer than all else here
        return (
            _RECIPE_BITS[id(recipe_a)]
            | _SWIZZLE_BITS[id(swizzle_a)] << 4
            | _RECIPE_BITS[id(recipe_b)] << 8
            | _SWIZZLE_BITS[id(swizzle_b)] << 12
            | bool(use_fast_accum) << 16
        )
    except KeyError:
        return Options(
            recipe_value("scale_recipe_a", recipe_a),
            swizzle_value("swizzle_a", swizzle_a),
            recipe_value("scale_recipe_b", recipe_b),
            swizzle_value("swizzle_b", swizzle_b),
            bool(use_fast_accum),
        ).pack()


def recipe_value(name: str, recipe) -> int:
    """Return the value of a ScalingType; torch also takes a list of one."""
    recipe = _only(name, recipe)
    if not isinstance(recipe, ScalingType):
        raise TypeError(f"scaled_mm: {name} must be a torch.nn.functional.ScalingType; got {type(recipe).__name__}; pass one")
    if recipe.value not in LAYOUTS:
        raise NotImplementedError(f"scaled_mm: {name} must not be {recipe.name}, which is for fp4; got it; use BlockWise1x32")
    return recipe.value


def swizzle_value(name: str, swizzle) -> int:
    """Return the value of a SwizzleType; torch also takes a list of one. None and an empty list are NO_SWIZZLE."""
    swizzle = SwizzleType.NO_SWIZZLE if swizzle is None or swizzle == [] else _only(name, swizzle)
    if not isinstance(swizzle, SwizzleType):
        raise TypeError(f"scaled_mm: {name} must be a torch.nn.functional.SwizzleType; got {type(swizzle).__name__}; pass one")
    return swizzle.value


def only_scale(name: str, scale) -> Tensor:
    """Return the tensor of scales; torch also takes a list of one."""
    scale = _only(name, scale)
    if not isinstance(scale, Tensor):
        raise TypeError(f"scaled_mm: {name} must be a torch tensor; got {type(scale).__name__}; convert it")
    return scale


def _only(name: str, value):
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) != 1:
        raise NotImplementedError(f"scaled_mm: {name} must be one, since two levels are for fp4; got {len(value)}; pass one")
    return value[0]


def check_output_dtype(name: str, dtype: torch.dtype | None) -> None:
    if dtype not in OUTPUTS:
        raise TypeError(f"scaled_mm: {name} must be float32, float16 or bfloat16; got {dtype}; convert the result")


def check_matrices(mat_a: Tensor, mat_b: Tensor) -> None:
    """Check dtypes and shapes of (M, K) and (K, N)."""
    for name, matrix in (("mat_a", mat_a), ("mat_b", mat_b)):
        if matrix.dtype not in _OPERANDS:
            names = ", ".join(format.torch_dtype for format in FP8_OPERANDS)
            raise TypeError(f"scaled_mm: {name} must be one of {names}; got {matrix.dtype}; quantise it")
        if matrix.dim() != 2:
            raise ValueError(f"scaled_mm: {name} must have 2 dimensions; got shape {tuple(matrix.shape)}; reshape it")
    if mat_a.shape[1] != mat_b.shape[0]:
        raise ValueError(
            f"scaled_mm: mat_a (M, K) and mat_b (K, N) must agree on K; got {tuple(mat_a.shape)} and {tuple(mat_b.shape)}; "
            "pass a weight (N, K) as weight.t()"
        )


def check(mat_a, mat_b, scale_a, scale_b, bias, options: Options, out) -> tuple[Tensor, Tensor]:
    """Check every argument and return the scales as kernels read them: (row blocks, groups of K)."""
    check_matrices(mat_a, mat_b)
    recipe_a, swizzle_a, recipe_b, swizzle_b, _ = options
    (M, K), N = mat_a.shape, mat_b.shape[1]
    if (recipe_a, recipe_b) not in _PAIRS:
        pairs = "the same for both, or BlockWise1x128 with BlockWise128x128"
        got = f"{ScalingType(recipe_a).name} and {ScalingType(recipe_b).name}"
        raise ValueError(f"scaled_mm: recipes must be {pairs}; got {got}; rescale one operand")
    check_output_dtype("out", out.dtype)
    if out.shape != (M, N) or not out.is_contiguous():
        raise ValueError(
            f"scaled_mm: out must be contiguous of shape {(M, N)}; got {tuple(out.shape)} with strides {out.stride()}; "
            "pass torch.empty of that shape"
        )
    if bias is not None:
        check_output_dtype("bias", bias.dtype)
        if bias.shape != (N,):
            raise ValueError(f"scaled_mm: bias must have shape {(N,)}; got {tuple(bias.shape)}; reshape it")
    device = mat_a.device
    for name, tensor in (("mat_b", mat_b), ("scale_a", scale_a), ("scale_b", scale_b), ("bias", bias), ("out", out)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"scaled_mm: {name} must be on {device} as mat_a is; got {tensor.device}; move it")
    return (
        _by_blocks("scale_a", scale_a, recipe_a, swizzle_a, M, K),
        _by_blocks("scale_b", scale_b, recipe_b, swizzle_b, N, K),
    )


def _by_blocks(name: str, scale: Tensor, recipe: int, swizzle: int, rows: int, K: int) -> Tensor:
    """Return scales as (row blocks, groups of K), for an operand of `rows` rows."""
    if recipe == MX:
        if scale.dtype not in _MX_SCALES:
            raise TypeError(f"scaled_mm: {name} must be float8_e8m0fnu or uint8; got {scale.dtype}; pass the stored bytes")
        if K % MX_GROUP:
            raise ValueError(f"scaled_mm: K must be a multiple of {MX_GROUP} for BlockWise1x32; got {K}; pad K with zeros")
        if swizzle != SwizzleType.NO_SWIZZLE.value:
            return _unswizzled(name, scale.view(torch.uint8), rows, K // MX_GROUP)
        _check_shape(name, scale, (rows, K // MX_GROUP))
        return scale.view(torch.uint8)
    if scale.dtype != torch.float32:
        raise TypeError(f"scaled_mm: {name} must be float32; got {scale.dtype}; convert it")
    if swizzle != SwizzleType.NO_SWIZZLE.value:
        raise ValueError(f"scaled_mm: scales of {ScalingType(recipe).name} must be NO_SWIZZLE; got another; leave it out")
    if recipe == TENSOR:
        if scale.numel() != 1:
            raise ValueError(f"scaled_mm: {name} must be one element for TensorWise; got {tuple(scale.shape)}; pass one")
        return scale.reshape(1, 1)
    if recipe == ROW:
        if scale.shape == (rows, 1):
            return scale
        if name == "scale_b" and scale.shape == (1, rows):
            return scale.t()
        _check_shape(name, scale, (rows, 1), (rows,), *([(1, rows)] if name == "scale_b" else []))
        return scale.unsqueeze(1)
    groups = -(-K // LAYOUTS[recipe].k)
    if recipe == ROW_BLOCK:
        _check_shape(name, scale, (rows, groups))
        return scale
    row_blocks = -(-rows // LAYOUTS[recipe].rows)
    _check_shape(name, scale, (groups, row_blocks), (-(-groups // _PADDING) * _PADDING, row_blocks))
    return scale.t()[:, :groups]


def _check_shape(name: str, scale: Tensor, *shapes: tuple[int, ...]) -> None:
    if scale.shape in shapes:
        return
    transposed = tuple(scale.shape[::-1]) in shapes
    hint = "pass its .t()" if transposed else "check its recipe"
    allowed = " or ".join(map(str, dict.fromkeys(shapes)))
    raise ValueError(f"scaled_mm: {name} must have shape {allowed}; got {tuple(scale.shape)}; {hint}")


def _unswizzled(name: str, scale: Tensor, rows: int, groups: int) -> Tensor:
    """Return (rows, groups) scales from SWIZZLE_32_4_4.

    Scale (row, group) lies in tile (row / 128, group / 4) at byte row % 32 * 16 + row % 128 / 32 * 4 + group % 4.
    """
    row_tiles, group_tiles = -(-rows // _SWIZZLE_ROWS), -(-groups // _SWIZZLE_GROUPS)
    size = row_tiles * group_tiles * _SWIZZLE_ROWS * _SWIZZLE_GROUPS
    if scale.numel() != size or not scale.is_contiguous():
        raise ValueError(
            f"scaled_mm: {name} must be {size} contiguous bytes for SWIZZLE_32_4_4; got {scale.numel()} with strides "
            f"{scale.stride()}; pad rows to 128 and groups to 4"
        )
    tiles = scale.reshape(row_tiles, group_tiles, _SWIZZLE_LANES, _SWIZZLE_ROWS // _SWIZZLE_LANES, _SWIZZLE_GROUPS)
    whole = tiles.permute(0, 3, 2, 1, 4).reshape(row_tiles * _SWIZZLE_ROWS, group_tiles * _SWIZZLE_GROUPS)
    return whole[:rows, :groups]

"""The plan of `scaled_mm`: its arguments, its key, and what stands in for tensors that kernels cannot read.

The arguments are those of the function, which calls the plan without torch's dispatcher where that has nothing to do; those of
the torch operator `scaled_mm_out`, which has the options as one integer, become them by `to_plan`. Needs torch alone: an
exported folder holds a copy.
"""

from __future__ import annotations

from torch import Tensor

from tilelang_ext.kernels.scaled_mm.arguments import LAYOUTS, RECIPES, SQUARE_BLOCK, SWIZZLES, unpack
from tilelang_ext.launch.expression import fact, recipe_of, select, shape

ALIGNMENT = 16  # bytes: of TMA and of the widest loads
_TENSORS = ("mat_a", "mat_b", "scale_a", "scale_b", "bias", "out")
_RECIPES, _SWIZZLES = ("scale_recipe_a", "scale_recipe_b"), ("swizzle_a", "swizzle_b")
_ARGUMENTS = (
    *("mat_a", "mat_b", "scale_a", "scale_recipe_a", "scale_b", "scale_recipe_b"),
    *("swizzle_a", "swizzle_b", "bias", "use_fast_accum", "out"),
)
_KEY = (
    *(fact("value", name) for name in (*_RECIPES, *_SWIZZLES, "use_fast_accum")),
    fact("device", "mat_a"),
    shape("mat_b", 0),
    shape("mat_b", 1),
    *(fact("dtype", name) for name in _TENSORS),
    *(fact("rank", name) for name in ("scale_a", "scale_b")),
    # The extents that tell apart the forms of one recipe: (1, N) from (N, 1), and those that torch pads.
    shape("scale_b", 0),
    select(fact("value", "scale_recipe_a") == SQUARE_BLOCK, shape("scale_a", 0), 0),
)
RECIPE = {
    "name": "scaled_mm",
    "arguments": [{"name": name, "type": "tensor" if name in _TENSORS else "int"} for name in _ARGUMENTS],
    "key": [recipe_of(value) for value in _KEY],
    "size": recipe_of(shape("mat_a", 0)),
}
MEMBERS = {**dict.fromkeys(_RECIPES, RECIPES), **dict.fromkeys(_SWIZZLES, SWIZZLES)}
_RECIPE_OF, _SWIZZLE_OF = ({value: member for member, value in members.items()} for members in (RECIPES, SWIZZLES))


def to_plan(arguments: tuple) -> tuple:
    """Return the plan's arguments from those of `scaled_mm_out`."""
    mat_a, mat_b, scale_a, scale_b, bias, packed, out = arguments
    recipe_a, swizzle_a, recipe_b, swizzle_b, use_fast_accum = unpack(packed)
    return (
        *(mat_a, mat_b, scale_a, _RECIPE_OF[recipe_a], scale_b, _RECIPE_OF[recipe_b]),
        *(_SWIZZLE_OF[swizzle_a], _SWIZZLE_OF[swizzle_b], bias, use_fast_accum, out),
    )


def with_memory_of_kernels(arguments: tuple, scales: tuple[Tensor, Tensor]) -> tuple:
    """Return the arguments with copies in place of tensors whose memory kernels cannot read.

    `scales` are the scales by blocks; those that were swizzled take the place of the caller's.
    """
    mat_a, mat_b, scale_a, scale_b, bias, packed, out = arguments
    options = unpack(packed)
    by_group = LAYOUTS[options.recipe_a].k is not None

    def readable(scale: Tensor, by_blocks: Tensor, swizzle: int) -> Tensor:
        scale = by_blocks if swizzle else scale
        scale = scale if by_group else scale.contiguous()
        return scale.clone() if scale.data_ptr() % ALIGNMENT else scale

    return (
        mat_a.contiguous(),
        mat_b,
        readable(scale_a, scales[0], options.swizzle_a),
        readable(scale_b, scales[1], options.swizzle_b),
        None if bias is None else bias.contiguous(),
        options._replace(swizzle_a=0, swizzle_b=0).pack(),
        out,
    )

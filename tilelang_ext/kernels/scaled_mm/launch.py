"""The plan of `scaled_mm` on NVIDIA GPUs: which variant a call finds, and what a variant demands of the caller's tensors.

The arguments of the plan are those of the function, which calls it without torch's dispatcher where that has nothing to do
(`directly`); those of the torch operator `scaled_mm_out`, which has the options as one integer, become them by `to_plan`. A
variant is compiled for the sizes N and K, the dtypes, the recipes and the forms of the scales, and serves the batches of one
bucket (`problem.bucket_of`).
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from tilelang_ext.kernels.scaled_mm.arguments import (
    LAYOUTS,
    MX,
    RECIPES,
    ROW,
    ROW_BLOCK,
    SQUARE_BLOCK,
    SWIZZLES,
    TENSOR,
    unpack,
)
from tilelang_ext.kernels.scaled_mm.problem import VECMAT_MAX_M, Problem, bucket_of
from tilelang_ext.launch.cache import until_reload
from tilelang_ext.launch.expression import ceildiv, fact, recipe_of, select, shape, stride
from tilelang_ext.launch.plan import Plan, launcher
from tilelang_ext.launch.recipe import ALIGNMENT
from tilelang_ext.launch.record import Extent, Recorder, View

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


def takes_plans() -> bool:
    """Return whether this build of torch is for NVIDIA GPUs; for AMD's it calls them cuda too."""
    return torch.version.hip is None


@until_reload
def plan() -> Plan:
    """Return the plan of this process, with the variants that calls have added."""
    return launcher().plan(RECIPE, MEMBERS)


@until_reload
def directly() -> Callable[..., bool]:
    """Return the plan's `launch_directly`; where there is no NVIDIA GPU, what never launches."""
    return plan().launch_directly if takes_plans() and torch.cuda.is_available() else lambda *arguments: False


def to_plan(arguments: tuple) -> tuple:
    """Return the plan's arguments from those of `scaled_mm_out`."""
    mat_a, mat_b, scale_a, scale_b, bias, packed, out = arguments
    recipe_a, swizzle_a, recipe_b, swizzle_b, use_fast_accum = unpack(packed)
    return (
        *(mat_a, mat_b, scale_a, _RECIPE_OF[recipe_a], scale_b, _RECIPE_OF[recipe_b]),
        *(_SWIZZLE_OF[swizzle_a], _SWIZZLE_OF[swizzle_b], bias, use_fast_accum, out),
    )


def add_variant(plan: Plan, arguments: tuple, problem: Problem, implementation: ModuleType) -> None:
    """Compile the kernel of one file for arguments that have been checked, and add it to the plan."""
    mat_a, _, scale_a, scale_b, bias, packed, _ = arguments
    options = unpack(packed)
    recorder = Recorder("scaled_mm", problem.arch)
    M, N, K = shape("mat_a", 0), problem.N, problem.K
    a = recorder.argument("mat_a", problem.a_dtype, (M, K))
    b = _transposed(recorder.argument("mat_b", problem.b_dtype, (K, N), (1, K)))
    scales = (
        _scale(recorder, "scale_a", scale_a, options.recipe_a, M, K),
        _scale(recorder, "scale_b", scale_b, options.recipe_b, N, K),
    )
    biases = [] if bias is None else [recorder.argument("bias", problem.bias_dtype, (N,))]
    out = recorder.argument("out", problem.out_dtype, (M, N))
    implementation.compile_kernel(problem, recorder.compile)(a, scales[0], b, scales[1], *biases, out)
    key, _ = plan.key(*to_plan(arguments))
    plan.add(recorder.variant(key, sizes_of_bucket(len(mat_a))), recorder.cubins)


def sizes_of_bucket(M: int) -> tuple[int, int]:
    """Return the fewest and the most rows of the batches that share a kernel with M rows."""
    most = bucket_of(M)
    if most <= VECMAT_MAX_M:
        return most, most
    return (VECMAT_MAX_M if bucket_of(most // 2) == most else most // 2) + 1, most


def _scale(recorder: Recorder, name: str, scale: Tensor, recipe: int, rows: Extent, K: int) -> View:
    """Return scales by blocks, (row blocks, groups of K), as `arguments.check` does of the caller's tensor."""
    dtype = str(scale.dtype).removeprefix("torch.")
    any_strides = stride(name, 0), stride(name, 1)
    if recipe == TENSOR:
        recorder.argument(name, dtype, (1,) * scale.dim())
        return View(name, dtype, (1, 1), (1, 1))
    if recipe == ROW:
        is_turned = scale.dim() == 2 and scale.shape[1] != 1
        recorder.argument(name, dtype, (rows,) if scale.dim() == 1 else (1, rows) if is_turned else (rows, 1))
        return View(name, dtype, (rows, 1), (1, 1))
    groups = -(-K // LAYOUTS[recipe].k)
    if recipe == SQUARE_BLOCK:
        blocks = ceildiv(rows, LAYOUTS[recipe].rows)
        padded = recorder.argument(name, dtype, (scale.shape[0], blocks), any_strides)
        return View(name, dtype, (blocks, groups), padded.strides[::-1])
    assert recipe in (ROW_BLOCK, MX)
    recorder.argument(name, dtype, (rows, groups), any_strides)
    return View(name, "uint8" if recipe == MX else dtype, (rows, groups), any_strides)


def _transposed(view: View) -> View:
    return View(view.buffer, view.dtype, view.shape[::-1], view.strides[::-1])


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

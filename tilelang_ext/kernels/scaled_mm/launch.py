"""The plan of `scaled_mm` on NVIDIA GPUs (`signature`) with its variants, and what a variant demands of the caller's tensors.

A variant is compiled for the sizes N and K, the dtypes, the recipes and the forms of the scales, and serves the batches that
have its kernel and configuration: on Hopper those of one choice (`selection`), elsewhere those of one bucket
(`problem.bucket_of`).
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from tilelang_ext.kernels.scaled_mm.arguments import LAYOUTS, MX, ROW, ROW_BLOCK, SQUARE_BLOCK, TENSOR, unpack
from tilelang_ext.kernels.scaled_mm.problem import VECMAT_MAX_M, Problem, bucket_of
from tilelang_ext.kernels.scaled_mm.signature import MEMBERS, RECIPE, to_plan
from tilelang_ext.launch.cache import UntilReload, until_reload
from tilelang_ext.launch.device import is_for_nvidia
from tilelang_ext.launch.expression import ceildiv, shape, stride
from tilelang_ext.launch.plan import Plan, launcher
from tilelang_ext.launch.record import Extent, Recorder, View


@until_reload
def plan() -> Plan:
    """Return the plan of this process, with the variants that calls have added."""
    return launcher().plan(RECIPE, MEMBERS)


def _find_directly() -> Callable[..., bool]:
    takes_plans = is_for_nvidia() and torch.cuda.is_available()
    return plan().launch_directly if takes_plans else lambda *arguments: False


directly = UntilReload(_find_directly)  # its value: the plan's `launch_directly`; where no NVIDIA GPU is, what never launches


def add_variant(plan: Plan, arguments: tuple, problem: Problem, implementation: ModuleType) -> None:
    """Compile the kernel of one file for arguments that have been checked, and add it to the plan."""
    _, _, scale_a, scale_b, bias, packed, _ = arguments
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
    memory_of = getattr(implementation, "memory_of", lambda problem: ())
    memory = [recorder.empty(*shape, dtype=dtype) for shape, dtype in memory_of(problem)]
    implementation.compile_kernel(problem, recorder.compile)(a, scales[0], b, scales[1], *biases, *memory, out)
    key, _ = plan.key(*to_plan(arguments))
    sizes_of = getattr(implementation, "sizes_served", sizes_of_bucket)
    plan.add(recorder.variant(key, sizes_of(problem)), recorder.cubins)


def sizes_of_bucket(problem: Problem) -> tuple[int, int]:
    """Return the fewest and the most rows of the batches that share a kernel, where its file does not say so itself."""
    most = bucket_of(problem.max_M)
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

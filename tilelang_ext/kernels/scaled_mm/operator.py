"""`scaled_mm`: torch.nn.functional.scaled_mm for fp8 on CUDA, ROCm, the CPU and Metal, from kernels of this package.

out[i, j] = sum over k of (scale_a mat_a)[i, k] * (scale_b mat_b)[k, j] + bias[j]

On NVIDIA GPUs the operator launches by its plan (`launch`), elsewhere it finds the kernel in a table. With `out` the function
calls the plan itself where the dispatcher would do no more: without a mode, transform, trace, profiler, subclass or gradient.
Names, shapes and strides are those of torch 2.13, torch.nn.functional.scaled_mm and torch._meta_registrations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn.functional import ScalingType, SwizzleType

from tilelang_ext import reference
from tilelang_ext.kernels.scaled_mm import launch, selection, tiled, vecmat
from tilelang_ext.kernels.scaled_mm.arguments import (
    FNUZ,
    LAYOUTS,
    OUTPUTS,
    check,
    check_matrices,
    check_output_dtype,
    only_scale,
    options_of,
    unpack,
)
from tilelang_ext.kernels.scaled_mm.problem import Problem, bucket_of
from tilelang_ext.kernels.scaled_mm.signature import ALIGNMENT, to_plan, with_memory_of_kernels
from tilelang_ext.launch.compile import compiled
from tilelang_ext.launch.device import Target, current, is_for_nvidia, target_of
from tilelang_ext.launch.gradient import without_gradient
from tilelang_ext.launch.plan import Plan
from tilelang_ext.launch.prepared import Prepared

KERNELS = (selection, vecmat, tiled)  # the first that takes a problem compiles it
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
    """Multiply fp8 matrices, each times its scales: torch.nn.functional.scaled_mm, with an optional `out`.

    mat_a (M, K) row-major and mat_b (K, N) column-major, that is `weight.t()`; any fp8 dtypes. Result (M, N) of
    `output_dtype` (float32, float16, bfloat16), rounded once. bias (N,) of these dtypes; ignored, as torch does, if K is 0.

    | recipe | scale_a | scale_b |
    | --- | --- | --- |
    | TensorWise | one float32 | one float32 |
    | RowWise | float32 (M, 1) or (M,) | float32 (1, N), (N, 1) or (N,) |
    | BlockWise1x128 | float32 (M, ceil(K/128)) | float32 (N, ceil(K/128)) |
    | BlockWise128x128 | float32 (ceil(K/128), ceil(M/128)) | float32 (ceil(K/128), ceil(N/128)) |
    | BlockWise1x32 | e8m0 or uint8 (M, K/32) | e8m0 or uint8 (N, K/32) |

    Both operands share a recipe, or pair 1x128 with 128x128. float32 scales may have any strides; of 128x128 the first
    extent may be padded, as torch pads it to a multiple of 4. SWIZZLE_32_4_4 is torch's padded 1-D or 2-D layout of 1x32
    scales, which costs a small copy per call; NO_SWIZZLE costs none. `use_fast_accum` lets the accumulators of TensorWise
    and RowWise stay in the tensor core, which keeps fewer bits on Hopper; elsewhere it changes nothing.

    On CUDA a mat_a that is not contiguous is copied. TypeError for dtypes, ValueError for shapes and values,
    NotImplementedError for recipes that this package lacks, and in a backward pass that reaches the result.
    """
    can_skip_dispatcher = out is not None and not contraction_dim and output_dtype in OUTPUTS and not is_dynamo_compiling()
    if can_skip_dispatcher and launch.directly.value(
        mat_a, mat_b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, swizzle_a, swizzle_b, bias, use_fast_accum, out
    ):
        return out
    if contraction_dim and tuple(contraction_dim) not in _CONTRACTIONS:
        raise ValueError(
            f"scaled_mm: contraction_dim must be () or (1, 0); got {tuple(contraction_dim)}; transpose the operand"
        )
    check_output_dtype("output_dtype", output_dtype)
    options = options_of(scale_recipe_a, swizzle_a, scale_recipe_b, swizzle_b, use_fast_accum)
    scale_a, scale_b = only_scale("scale_a", scale_a), only_scale("scale_b", scale_b)
    if out is None:
        out = _scaled_mm_op(mat_a, mat_b, scale_a, scale_b, bias, options, output_dtype)
    else:
        _scaled_mm_out_op(mat_a, mat_b, scale_a, scale_b, bias, options, out)
    return without_gradient("scaled_mm", out, mat_a, mat_b, scale_a, scale_b, bias)


def prepare(
    mat_b: Tensor,
    scale_b: Tensor,
    scale_recipe_a: ScalingType,
    scale_recipe_b: ScalingType,
    *,
    bias: Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
    use_fast_accum: bool = False,
) -> Prepared:
    """Return `scaled_mm` with its weight and options fixed, which are described there; it is `scaled_mm.prepare`.

    linear = scaled_mm.prepare(weight.t(), scale_b, ScalingType.RowWise, ScalingType.RowWise)
    y = linear(mat_a, scale_a)                      or out=y: checks the tensors, launches
    step = linear.bind(mat_a, scale_a, out=y)       the tensors fixed too
    step()
    """
    options = options_of(scale_recipe_a, None, scale_recipe_b, None, use_fast_accum)

    def call(mat_a, scale_a, out=None):
        recipes = scale_recipe_a, scale_b, scale_recipe_b
        return scaled_mm(
            mat_a, mat_b, scale_a, *recipes, bias=bias, output_dtype=output_dtype, use_fast_accum=use_fast_accum, out=out
        )

    def bind(mat_a, scale_a, out):
        return _bind(mat_a, mat_b, only_scale("scale_a", scale_a), only_scale("scale_b", scale_b), bias, options, out)

    return Prepared(call, bind)


scaled_mm.prepare = prepare  # type: ignore[attr-defined]


def _bind(*arguments) -> Callable[[], None] | None:
    """Return the launch of the torch operator's arguments, None where no plan launches them."""
    mat_a, mat_b, *_, packed, out = arguments
    check(*arguments[:5], unpack(packed), out)
    if not (out.numel() and mat_a.numel()) or not mat_a.is_cuda or not is_for_nvidia():
        return None
    _check_memory(mat_a, mat_b.t())
    plan, given = launch.plan(), to_plan(arguments)
    try:
        return plan.bind(*given)
    except LookupError:
        problem = _problem_of(_key_of(*arguments, mat_a.shape[0]), unpack(packed).use_fast_accum)
        launch.add_variant(plan, arguments, problem, implementation_of(problem))
        return plan.bind(*given)


# --- operators -------------------------------------------------------------------------------------------------------
# Defined by their schema: torch.library.custom_op would cost ten times as much per call.

_ARGUMENTS = "Tensor mat_a, Tensor mat_b, Tensor scale_a, Tensor scale_b, Tensor? bias, int options"
_TAGS = (torch.Tag.needs_exact_strides,)  # a compiler must not transpose mat_b in memory
torch.library.define("tilelang_ext::scaled_mm", f"({_ARGUMENTS}, ScalarType output_dtype) -> Tensor", tags=_TAGS)
torch.library.define("tilelang_ext::scaled_mm_out", f"({_ARGUMENTS}, Tensor(a!) out) -> ()", tags=_TAGS)


def _scaled_mm_out(*arguments) -> None:
    # The plan checks its arguments too. What it does not take goes the long way, which says why, copies, or compiles.
    if arguments[0].is_cuda and is_for_nvidia():
        try:
            if launch.plan().launch(*to_plan(arguments)):
                return
        except (TypeError, ValueError):
            pass
    _check_and_launch(*arguments)


def _check_and_launch(mat_a, mat_b, scale_a, scale_b, bias, packed, out) -> None:
    arguments, options = (mat_a, mat_b, scale_a, scale_b, bias, packed, out), unpack(packed)
    scale_a, scale_b = check(mat_a, mat_b, scale_a, scale_b, bias, options, out)
    (M, K), N = mat_a.shape, mat_b.shape[1]
    if M == 0 or N == 0:
        return
    if K == 0:
        out.zero_()
    elif mat_a.device.type == "cpu":
        product = reference.scaled_matmul(
            mat_a, scale_a, mat_b.t(), scale_b, LAYOUTS[options.recipe_a], LAYOUTS[options.recipe_b]
        )
        out.copy_(product if bias is None else product + bias.double())
    else:
        is_cuda = target_of("scaled_mm", mat_a.device).kind == "cuda"
        key = _key_of(*arguments, M if is_cuda else bucket_of(M))
        if is_cuda:
            _check_memory(mat_a.contiguous(), mat_b.t())
            _launch_plan(launch.plan(), key, with_memory_of_kernels(arguments, (scale_a, scale_b)))
        else:
            run = _launchers.get((key, options.use_fast_accum)) or _compile(key, options.use_fast_accum)
            _launch(run, mat_a, scale_a, mat_b.t(), scale_b, bias, out)


def _scaled_mm(*arguments) -> Tensor:
    *arguments, output_dtype = arguments
    out = _empty(*arguments[:2], output_dtype)
    _scaled_mm_out(*arguments, out)
    return out


def _fake_out(mat_a, mat_b, scale_a, scale_b, bias, options, out) -> None:
    check(mat_a, mat_b, scale_a, scale_b, bias, unpack(options), out)


def _fake(*arguments) -> Tensor:
    *arguments, output_dtype = arguments
    out = _empty(*arguments[:2], output_dtype)
    _fake_out(*arguments, out)
    return out


def _empty(mat_a: Tensor, mat_b: Tensor, output_dtype: torch.dtype) -> Tensor:
    check_matrices(mat_a, mat_b)
    return mat_a.new_empty((mat_a.shape[0], mat_b.shape[1]), dtype=output_dtype)


for _name_of_op, _implementation, _shape_of in (("scaled_mm", _scaled_mm, _fake), ("scaled_mm_out", _scaled_mm_out, _fake_out)):
    torch.library.impl(f"tilelang_ext::{_name_of_op}", "CompositeExplicitAutograd", _implementation)
    torch.library.register_fake(f"tilelang_ext::{_name_of_op}", _shape_of)

_scaled_mm_op, _scaled_mm_out_op = torch.ops.tilelang_ext.scaled_mm.default, torch.ops.tilelang_ext.scaled_mm_out.default


# --- launch ----------------------------------------------------------------------------------------------------------

_launchers: dict[tuple, Callable] = {}


def _key_of(mat_a, mat_b, scale_a, scale_b, bias, packed, out, max_M: int) -> tuple:
    """Return device, max_M, N, K, dtypes, recipes and dtypes of bias and result."""
    options, bias_dtype = unpack(packed), None if bias is None else bias.dtype
    sizes = max_M, mat_b.shape[1], mat_b.shape[0]
    return mat_a.device, *sizes, mat_a.dtype, mat_b.dtype, options.recipe_a, options.recipe_b, bias_dtype, out.dtype


def _problem_of(key: tuple, use_fast_accum: bool) -> Problem:
    """Return the problem of a key."""
    target = target_of("scaled_mm", key[0])
    for name, dtype in (("mat_a", key[4]), ("mat_b", key[5])):
        if dtype in FNUZ and target.kind != "hip":
            raise NotImplementedError(
                f"scaled_mm: {name} must be float8_e4m3fn or float8_e5m2 on {key[0].type}; got {_name(dtype)}; convert it with "
                "quantization.fnuz_to_ocp, or move the tensors to the CPU"
            )
    return problem_for(target, key, use_fast_accum)


def problem_for(target: Target, key: tuple, use_fast_accum: bool) -> Problem:
    """Return the problem of such a key for a target that need not be here."""
    _, max_M, N, K, a_dtype, b_dtype, recipe_a, recipe_b, bias_dtype, out_dtype = key
    return Problem(
        target_kind=target.kind,
        arch=target.arch,
        num_sms=target.num_sms,
        max_M=max_M,
        N=N,
        K=K,
        a_dtype=_name(a_dtype),
        b_dtype=_name(b_dtype),
        layout_a=LAYOUTS[recipe_a],
        layout_b=LAYOUTS[recipe_b],
        bias_dtype=None if bias_dtype is None else _name(bias_dtype),
        out_dtype=_name(out_dtype),
        fast_accum=use_fast_accum,
    )


def implementation_of(problem: Problem) -> ModuleType:
    return next(file for file in KERNELS if file.takes(problem))


def _launch_plan(plan: Plan, key: tuple, arguments: tuple) -> None:
    """Launch on an NVIDIA GPU; a variant that the plan lacks is compiled first."""
    given = to_plan(arguments)
    if not plan.launch(*given):
        problem = _problem_of(key, unpack(arguments[-2]).use_fast_accum)
        launch.add_variant(plan, arguments, problem, implementation_of(problem))
        plan(*given)


def _compile(key: tuple, use_fast_accum: bool) -> Callable:
    """Compile the kernel of a new key for AMD or Metal and keep it."""
    problem, target = _problem_of(key, use_fast_accum), target_of("scaled_mm", key[0])

    def compile(make: Callable, *arguments, pass_configs: Mapping[str, bool] | None = None) -> Callable:
        return compiled(make, arguments, target, tuple((pass_configs or {}).items()))

    kernel = implementation_of(problem).compile_kernel(problem, compile)

    def run(a, scale_a, b, scale_b, bias, out):
        biases = [] if bias is None else [bias.contiguous()]
        kernel(a, scale_a.contiguous(), b, scale_b.contiguous(), *biases, out)

    _launchers[key, use_fast_accum] = run
    return run


def _check_memory(a: Tensor, b: Tensor) -> None:
    """Raise for operands (M, K) and (N, K) whose memory no kernel reads."""
    if not b.is_contiguous():
        raise ValueError(
            f"scaled_mm: mat_b must be column-major, as weight.t() is; got strides {tuple(b.stride()[::-1])}; pass "
            "mat_b.t().contiguous().t(), made once"
        )
    for name, tensor in (("mat_a", a), ("mat_b", b)):
        if tensor.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"scaled_mm: {name} must start at a multiple of {ALIGNMENT} bytes; got a slice that does not; clone it"
            )


def _launch(run: Callable, a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Launch a kernel on AMD or Metal."""
    a = a.contiguous()
    _check_memory(a, b)
    with current(a.device):
        run(a, scale_a, b, scale_b, bias, out)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

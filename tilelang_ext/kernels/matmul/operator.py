"""`matmul`: the product of two matrices of 16-bit floats and what follows it, on CUDA, ROCm, the CPU and Metal.

out[i, j] = activation(row_scale[i] * column_scale[j] * (sum over k of a[i, k] * b[k, j]) + bias[j]) + residual[i, j]

On NVIDIA GPUs the operator launches by its plan (`launch`), elsewhere it finds the kernel in a table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from tilelang_ext import reference
from tilelang_ext.kernels.matmul import launch, sm90_persistent, sm90_vecmat, tiled
from tilelang_ext.kernels.matmul.arguments import (
    check,
    check_matrices,
    check_output_dtype,
    is_row_major,
    name_of,
    number_of,
    with_memory_of_kernels,
)
from tilelang_ext.kernels.matmul.problem import Epilogue, Problem
from tilelang_ext.launch.compile import compiled
from tilelang_ext.launch.device import Target, current, is_for_nvidia, target_of
from tilelang_ext.launch.gradient import without_gradient
from tilelang_ext.launch.recipe import ALIGNMENT

KERNELS = (sm90_vecmat, sm90_persistent, tiled)  # the first that takes a problem compiles it


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply two float16 or two bfloat16 matrices, and do what follows in the same kernel.

    out[i, j] = activation(row_scale[i] * column_scale[j] * (a @ b)[i, j] + bias[j]) + residual[i, j]

    | argument | shape | dtype |
    | --- | --- | --- |
    | a | (M, K) | float16, bfloat16 |
    | b | (K, N) | the same |
    | row_scale, column_scale | (M,), (N,) | float32 |
    | bias | (N,) | float32, float16, bfloat16 |
    | residual, out | (M, N) | float32, float16, bfloat16 |

    `activation` is None, "relu", "gelu", "gelu_tanh" or "silu", as torch.nn.functional has them. Sums and all that follows are
    float32; the result is rounded once, to `output_dtype`, or the dtype of `out` or of `a`. `residual` may be `out` itself.

    a and b may be row-major or column-major, in every combination: a linear layer's weight (N, K) is passed as weight.t().
    Other strides, and tensors that start between multiples of 16 bytes, are copied first; out must be contiguous.

    TypeError for dtypes, ValueError for shapes and values, NotImplementedError for devices, and in a backward pass that reaches
    the result.
    """
    number = number_of(activation)
    if out is None:
        dtype = a.dtype if output_dtype is None else output_dtype
        check_output_dtype("output_dtype", dtype)
        out = _matmul_op(a, b, row_scale, column_scale, bias, residual, number, dtype)
    else:
        if output_dtype not in (None, out.dtype):
            raise TypeError(f"matmul: output_dtype must be that of out, {out.dtype}; got {output_dtype}; leave it out")
        _matmul_out_op(a, b, row_scale, column_scale, bias, residual, number, out)
    return without_gradient("matmul", out, a, b, row_scale, column_scale, bias, residual)


# --- operators -------------------------------------------------------------------------------------------------------
# Defined by their schema: torch.library.custom_op would cost ten times as much per call.

_ARGUMENTS = "Tensor a, Tensor b, Tensor? row_scale, Tensor? column_scale, Tensor? bias, Tensor? residual, int activation"
_TAGS = (torch.Tag.needs_exact_strides,)  # a compiler must not transpose an operand in memory
torch.library.define("tilelang_ext::matmul", f"({_ARGUMENTS}, ScalarType output_dtype) -> Tensor", tags=_TAGS)
torch.library.define("tilelang_ext::matmul_out", f"({_ARGUMENTS}, Tensor(a!) out) -> ()", tags=_TAGS)


def _matmul_out(*arguments) -> None:
    # The plan checks its arguments too. What it does not take goes the long way, which says why, copies, or compiles.
    if arguments[0].is_cuda and is_for_nvidia():
        try:
            if launch.plan().launch(*arguments):
                return
        except (TypeError, ValueError):
            pass
    _check_and_launch(*arguments)


def _check_and_launch(*arguments) -> None:
    check(*arguments)
    a, b, row_scale, column_scale, bias, residual, activation, out = arguments
    if out.numel() == 0:
        return
    if a.device.type == "cpu":
        out.copy_(reference.matmul(a, b, row_scale, column_scale, bias, name_of(activation), residual))
        return
    if a.shape[1] == 0:  # what follows the product is computed even so
        arguments = (a.new_zeros(len(a), 8), b.new_zeros(8, b.shape[1]), *arguments[2:])
    target = target_of("matmul", a.device)
    arguments = with_memory_of_kernels(arguments, ALIGNMENT)
    problem = _problem_of(target, *arguments)
    if target.kind == "cuda":
        plan = launch.plan()
        if not plan.launch(*arguments):
            launch.add_variant(plan, arguments, problem, _implementation_of(problem))
            plan(*arguments)
    else:
        _launch(problem, target, *arguments)


def _matmul(*arguments) -> Tensor:
    *arguments, output_dtype = arguments
    out = _empty(*arguments[:2], output_dtype)
    _matmul_out(*arguments, out)
    return out


def _fake_out(*arguments) -> None:
    check(*arguments)


def _fake(*arguments) -> Tensor:
    *arguments, output_dtype = arguments
    out = _empty(*arguments[:2], output_dtype)
    check(*arguments, out)
    return out


def _empty(a: Tensor, b: Tensor, output_dtype: torch.dtype) -> Tensor:
    check_matrices(a, b)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=output_dtype)


for _name_of_op, _implementation, _shape_of in (("matmul", _matmul, _fake), ("matmul_out", _matmul_out, _fake_out)):
    torch.library.impl(f"tilelang_ext::{_name_of_op}", "CompositeExplicitAutograd", _implementation)
    torch.library.register_fake(f"tilelang_ext::{_name_of_op}", _shape_of)

_matmul_op, _matmul_out_op = torch.ops.tilelang_ext.matmul.default, torch.ops.tilelang_ext.matmul_out.default


# --- launch ----------------------------------------------------------------------------------------------------------


def _problem_of(target: Target, a, b, row_scale, column_scale, bias, residual, activation, out) -> Problem:
    """Return the problem of arguments that kernels can read."""
    return Problem(
        target_kind=target.kind,
        arch=target.arch,
        num_sms=target.num_sms,
        M=a.shape[0],
        N=b.shape[1],
        K=a.shape[1],
        dtype=_name(a),
        out_dtype=_name(out),
        a_is_k_major=is_row_major(a),
        b_is_k_major=not is_row_major(b),
        epilogue=Epilogue(
            row_scale is not None,
            column_scale is not None,
            None if bias is None else _name(bias),
            name_of(activation),
            None if residual is None else _name(residual),
        ),
    )


def _implementation_of(problem: Problem) -> ModuleType:
    return next(file for file in KERNELS if file.takes(problem))


@dataclass(frozen=True)
class _Device:
    """Where kernels for AMD and Metal are compiled."""

    target: Target

    def compile(self, make: Callable, *arguments, pass_configs: Mapping[str, bool] | None = None) -> Callable:
        """Return the prim_func make(*arguments) as a function of tensors."""
        return compiled(make, arguments, self.target, tuple((pass_configs or {}).items()))


def _launch(problem: Problem, target: Target, a, b, row_scale, column_scale, bias, residual, _, out) -> None:
    """Launch a kernel on AMD or Metal: operands lie in memory as it names them."""
    run = _implementation_of(problem).compile_kernel(problem, _Device(target))
    a = a if problem.a_is_k_major else a.t()
    b = b.t() if problem.b_is_k_major else b
    others = [a if operand is None else operand for operand in (row_scale, column_scale, bias, residual)]
    with current(a.device):
        run(a, b, *others, out)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

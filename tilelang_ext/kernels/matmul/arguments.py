"""The checks of `matmul`, and its tensors as kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

from tilelang_ext.kernels.matmul.epilogue import ACTIVATIONS

_OPERANDS = (torch.float16, torch.bfloat16)
_OTHERS = (torch.float16, torch.bfloat16, torch.float32)
_NUMBERS = {None: 0, **{name: number for number, name in enumerate(ACTIVATIONS, 1)}}  # operators take them as integers
_NAMES = {number: name for name, number in _NUMBERS.items()}


def number_of(activation: str | None) -> int:
    """Return the number of an activation."""
    if activation not in _NUMBERS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"matmul: activation must be None or one of {names}; got {activation!r}; apply it to the result")
    return _NUMBERS[activation]


def name_of(activation: int) -> str | None:
    """Return the name of an activation's number."""
    return _NAMES[activation]


def check_output_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in _OTHERS:
        raise TypeError(f"matmul: {name} must be float32, float16 or bfloat16; got {dtype}; convert it")


def check_matrices(a: Tensor, b: Tensor) -> None:
    """Check dtypes and shapes of (M, K) and (K, N)."""
    for name, matrix in (("a", a), ("b", b)):
        if matrix.dtype not in _OPERANDS:
            raise TypeError(f"matmul: {name} must be float16 or bfloat16; got {matrix.dtype}; convert it")
        if matrix.dim() != 2:
            raise ValueError(f"matmul: {name} must have 2 dimensions; got shape {tuple(matrix.shape)}; reshape it")
    if a.dtype != b.dtype:
        raise TypeError(f"matmul: a and b must have one dtype; got {a.dtype} and {b.dtype}; convert one")
    if a.shape[1] != b.shape[0]:
        raise ValueError(
            f"matmul: a (M, K) and b (K, N) must agree on K; got {tuple(a.shape)} and {tuple(b.shape)}; transpose one"
        )


def check(a, b, row_scale, column_scale, bias, residual, activation, out) -> None:
    """Check every argument."""
    check_matrices(a, b)
    (M, _), N = a.shape, b.shape[1]
    number_of(name_of(activation))
    check_output_dtype("out", out.dtype)
    if out.shape != (M, N) or not out.is_contiguous():
        raise ValueError(
            f"matmul: out must be contiguous of shape {(M, N)}; got {tuple(out.shape)} with strides {out.stride()}; "
            "pass torch.empty of that shape"
        )
    for name, scale, shape in (("row_scale", row_scale, (M,)), ("column_scale", column_scale, (N,))):
        if scale is not None:
            if scale.dtype != torch.float32:
                raise TypeError(f"matmul: {name} must be float32; got {scale.dtype}; convert it")
            _check_shape(name, scale, shape)
    for name, added, shape in (("bias", bias, (N,)), ("residual", residual, (M, N))):
        if added is not None:
            check_output_dtype(name, added.dtype)
            _check_shape(name, added, shape)
    others = {"b": b, "row_scale": row_scale, "column_scale": column_scale, "bias": bias, "residual": residual, "out": out}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != a.device:
            raise ValueError(f"matmul: {name} must be on {a.device} as a is; got {tensor.device}; move it")


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"matmul: {name} must have shape {shape}; got {tuple(tensor.shape)}; reshape it")


def is_row_major(matrix: Tensor) -> bool:
    """Return whether rows of a matrix that kernels can read are contiguous, and not its columns."""
    return matrix.stride(1) == 1


def readable(tensor: Tensor | None, alignment: int) -> Tensor | None:
    """Return a tensor as it is where kernels can read it, row by row or column by column, and a row-major copy elsewhere."""
    if tensor is None:
        return None
    is_dense = tensor.is_contiguous() or (tensor.dim() == 2 and tensor.t().is_contiguous())
    if not is_dense or tensor.data_ptr() % alignment:
        return tensor.clone(memory_format=torch.contiguous_format)
    if tensor.is_contiguous() and tensor.dim() == 2:  # a dimension of one element may have any stride
        return tensor.as_strided(tensor.shape, (tensor.shape[1], 1))
    return tensor


def with_memory_of_kernels(arguments: tuple, alignment: int) -> tuple:
    """Return the arguments with copies in place of tensors whose memory kernels cannot read."""
    a, b, row_scale, column_scale, bias, residual, activation, out = arguments
    if out.data_ptr() % alignment:
        raise ValueError(f"matmul: out must start at a multiple of {alignment} bytes; got a slice that does not; pass another")
    others = [readable(None if x is None else x.contiguous(), alignment) for x in (row_scale, column_scale, bias, residual)]
    return (readable(a, alignment), readable(b, alignment), *others, activation, out)

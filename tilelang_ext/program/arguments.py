"""What one call passes, checked: tensors, scalars, and the symbolic extents and strides that follow from them."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tilelang import language as T
from tvm import DataType, arith, tirx

_SCALAR_FORMATS = {"bool": "?", "int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I"}
_SCALAR_FORMATS |= {"int64": "q", "uint64": "Q", "float16": "e", "float32": "f", "float64": "d"}

Values = Mapping[tirx.Var, object]  # the number that each scalar and symbolic extent has in one call


@dataclass(frozen=True)
class Parameter:
    """A tensor (with a shape, symbolic extents allowed) or a scalar: a parameter of the user's function, or scratch memory."""

    name: str
    dtype: str
    shape: tuple | None  # None for a scalar
    var: tirx.Var  # by which shapes and grids refer to a scalar
    strides: tuple | None = None  # in elements, as the function declares them; None for a contiguous tensor

    @property
    def per_element(self) -> int:
        """How many of the shape's elements one element of the tensor that is passed holds: a byte is two FP4 codes."""
        return max(1, 8 // DataType(self.dtype).bits) if self.dtype != "bool" else 1


def pack_scalar(value: int | float, dtype: str) -> bytes:
    """Return the bytes of a number of `dtype`, little-endian; struct.error or OverflowError where it does not fit."""
    return struct.pack("<" + _SCALAR_FORMATS[dtype], value)


def torch_dtype(parameter: Parameter) -> torch.dtype:
    """Return the dtype of the torch tensor that is passed for a parameter."""
    return T.dtype(parameter.dtype).as_torch()


def check_scalar(kernel: str, parameter: Parameter, argument):
    """Return a number that is passed for a scalar; TypeError or ValueError where it is none of the parameter's dtype."""
    if parameter.dtype not in _SCALAR_FORMATS:
        raise TypeError(
            f"{kernel}: {parameter.name} must have one of the dtypes {', '.join(_SCALAR_FORMATS)}; got {parameter.dtype}; "
            "pass a float32 and cast it in the kernel"
        )
    if isinstance(argument, torch.Tensor) or not isinstance(argument, (bool, int, float)):
        raise TypeError(
            f"{kernel}: {parameter.name} must be a {parameter.dtype} scalar; got {type(argument).__name__}; pass a number"
        )
    if not parameter.dtype.startswith("float") and isinstance(argument, float):
        raise TypeError(f"{kernel}: {parameter.name} must be {parameter.dtype}; got the float {argument}; pass an int")
    try:
        pack_scalar(argument, parameter.dtype)
    except (struct.error, OverflowError):
        raise ValueError(
            f"{kernel}: {parameter.name} must fit {parameter.dtype}; got {argument}; pass a value in its range"
        ) from None
    return argument


def check_tensor(kernel: str, parameter: Parameter, argument, device: str) -> torch.Tensor:
    """Return a tensor that is passed for a parameter; TypeError or ValueError for another dtype, device or order in memory."""
    if not isinstance(argument, torch.Tensor):
        raise TypeError(f"{kernel}: {parameter.name} must be a torch tensor; got {type(argument).__name__}; convert it")
    expected = torch_dtype(parameter)
    is_bytes_of_codes = parameter.per_element > 1 and argument.dtype in (torch.uint8, torch.int8)
    if argument.dtype != expected and not is_bytes_of_codes:
        raise TypeError(f"{kernel}: {parameter.name} must be {expected}; got {argument.dtype}; convert it with .to({expected})")
    if argument.device.type != device:
        raise ValueError(f"{kernel}: {parameter.name} must be on {device}; got {argument.device}; move it with .to({device!r})")
    if parameter.strides is None and not argument.is_contiguous():
        raise ValueError(f"{kernel}: {parameter.name} must be contiguous; got strides {argument.stride()}; call .contiguous()")
    return argument


def unpacked(parameter: Parameter, shape: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the shape in the function's elements of a tensor that is passed."""
    return (*shape[:-1], shape[-1] * parameter.per_element) if shape else shape


def packed(parameter: Parameter, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the tensor that is passed for one of `shape` in the function's elements."""
    return (*shape[:-1], shape[-1] // parameter.per_element) if shape else tuple(shape)


def bind_sizes(kernel: str, parameter: Parameter, what: str, sizes: Sequence[int], values: dict[tirx.Var, object]) -> None:
    """Give the variables of a parameter's "shape" or "strides" their values, from the `sizes` of the tensor that is passed.

    An extent may be a variable or a linear expression of one, such as `n * 4` or `n + 1`.
    """
    declared = getattr(parameter, what)
    if len(sizes) != len(declared):
        raise ValueError(
            f"{kernel}: {parameter.name} must have {len(declared)} dimensions; got shape {packed(parameter, sizes)}; reshape it"
        )
    for axis, (extent, size) in enumerate(zip(declared, sizes, strict=True)):
        if isinstance(extent, int):
            continue
        unknown = [var for var in tirx.analysis.undefined_vars(extent) if var not in values]
        if not unknown and isinstance(extent, tirx.Var) and values[extent] != size:
            raise ValueError(
                f"{kernel}: {parameter.name} must have {what}[{axis}] = {extent.name} = {values[extent]}; "
                f"got {size}; all tensors must agree on {extent.name}"
            )
        if len(unknown) == 1:
            value = _solve(extent, unknown[0], size, values)
            if value is not None:
                values[unknown[0]] = value


def _solve(extent: tirx.PrimExpr, var: tirx.Var, size: int, values: Values) -> int | None:
    """Return the value of `var` with which `extent` is `size`; None where there is none, or it is not linear in `var`."""
    if isinstance(extent, tirx.Var):
        return size
    factor_and_rest = arith.detect_linear_equation(_with_values(extent, values), [var])
    if len(factor_and_rest) != 2:
        return None
    factor, rest = (arith.Analyzer().simplify(e) for e in factor_and_rest)
    if not isinstance(factor, tirx.IntImm) or not isinstance(rest, tirx.IntImm) or not int(factor):
        return None
    value, remainder = divmod(size - int(rest), int(factor))
    return None if remainder or value < 0 else value


def evaluate(kernel: str, expression, values: Values) -> int:
    """Return the number that an extent has under `values`."""
    if isinstance(expression, int):
        return expression
    if isinstance(expression, tirx.Var) and expression in values:
        return values[expression]
    missing = [var.name for var in tirx.analysis.undefined_vars(expression) if var not in values]
    if missing:
        raise ValueError(
            f"{kernel}: extent {expression} must follow from the shapes given; got no value for {', '.join(missing)}; "
            f"add a tensor that has {missing[0]} as an extent, or pass it as a scalar"
        )
    return int(arith.Analyzer().simplify(_with_values(expression, values)))


def _with_values(expression: tirx.PrimExpr, values: Values) -> tirx.PrimExpr:
    known = [var for var in tirx.analysis.undefined_vars(expression) if var in values]
    return tirx.stmt_functor.substitute(expression, {var: tirx.const(values[var], var.dtype) for var in known})

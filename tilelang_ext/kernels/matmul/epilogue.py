"""The epilogue of `matmul`, element by element, in float32: what all its kernels do between the product and the rounding.

out = activation(row_scale * column_scale * product + bias) + residual
"""

from __future__ import annotations

import math

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.problem import Epilogue, Operands


def _relu(x):
    return T.if_then_else(x < T.float32(0), T.float32(0), x)  # NaN stays NaN


def _gelu(x):
    return x * (T.float32(0.5) + T.float32(0.5) * T.erf(x * T.float32(math.sqrt(0.5))))


def _gelu_tanh(x):
    # 0.5 (1 + tanh(y)) is the sigmoid of 2 y.
    y = T.float32(math.sqrt(2 / math.pi)) * (x + T.float32(0.044715) * x * x * x)
    return x / (T.float32(1) + T.exp(T.float32(-2) * y))


def _silu(x):
    return x / (T.float32(1) + T.exp(-x))


ACTIVATIONS = {"relu": _relu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu}


def finished(epilogue: Epilogue, operands: Operands, value, row, column, row_scale=None, column_scale=None, bias=None):
    """Return the element (row, *column) of the result, float32, from its product; it lies inside the matrix.

    `column` is a tuple, since the caller's tensors may have columns in groups; `row_scale`, `column_scale` and `bias` are those
    of its row and column where the caller has loaded them.
    """
    if epilogue.row_scale:
        value = value * (operands.row_scale[row] if row_scale is None else row_scale)
    if epilogue.column_scale:
        value = value * (operands.column_scale[column] if column_scale is None else column_scale)
    if epilogue.bias_dtype:
        value = value + T.cast(operands.bias[column] if bias is None else bias, "float32")
    if epilogue.activation:
        value = ACTIVATIONS[epilogue.activation](value)
    if epilogue.residual_dtype:
        value = value + T.cast(operands.residual[(row, *column)], "float32")
    return value


def finish(epilogue: Epilogue, operands: Operands, sizes: tuple, accumulator, row, column, is_swapped: bool = False) -> None:
    """Do the epilogue of an accumulator (rows, columns) that begins at (row, column) of a result of sizes (M, N).

    With `is_swapped`, that result is the transpose of `out`. All elements come before the first store: the compiler moves no
    load across a store.
    """
    (M, N), (rows, columns) = sizes, map(int, accumulator.shape)
    bias_dtype = "float32" if epilogue.bias_dtype is None else epilogue.bias_dtype

    @T.macro
    def emit():
        row_scales = T.alloc_fragment((rows,), "float32")
        if epilogue.row_scale:
            for i in T.Parallel(rows):
                row_scales[i] = operands.row_scale[T.min(row + i, M - 1)]
        # Rows and columns past the end are not stored: any element of the epilogue's operands will do for them.
        for i, j in T.Parallel(rows, columns):
            accumulator[i, j] = finished(
                epilogue, operands, accumulator[i, j], T.min(row + i, M - 1), (T.min(column + j, N - 1),), row_scales[i]
            )

    @T.macro
    def emit_swapped():
        column_scales, biases = T.alloc_fragment((rows,), "float32"), T.alloc_fragment((rows,), bias_dtype)
        if epilogue.column_scale:
            for i in T.Parallel(rows):
                column_scales[i] = operands.column_scale[T.min(row + i, M - 1)]
        if epilogue.bias_dtype is not None:
            for i in T.Parallel(rows):
                biases[i] = operands.bias[T.min(row + i, M - 1)]
        for i, j in T.Parallel(rows, columns):
            accumulator[i, j] = finished(
                epilogue,
                operands,
                accumulator[i, j],
                T.min(column + j, N - 1),
                (T.min(row + i, M - 1),),
                None,
                column_scales[i],
                biases[i],
            )

    emit_swapped() if is_swapped else emit()

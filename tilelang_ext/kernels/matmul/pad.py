"""Operands whose rows are no multiples of 16 bytes, as TMA demands: copies with longer rows, ahead of a matmul of those.

padded[r, c] = matrix[r, c], and 0 from the last column on to a multiple of 32 bytes, the unit of the L2 cache.
"""

import math
from collections.abc import Callable

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.problem import TMA_ALIGNMENT as GROUP
from tilelang_ext.kernels.matmul.problem import Problem
from tilelang_ext.kernels.sm90 import pdl

ROW = 16  # elements of whose multiples rows of a copy are
_THREADS = 128


def pad(dtype: str, granule: int):
    """The prim_func (matrix, padded), of (R, C) and (R, groups, GROUP), where C is a multiple of the granule."""
    matrix_type, padded_type = _types(dtype, granule, "")

    @T.prim_func
    def pad(matrix: matrix_type, padded: padded_type):
        with T.Kernel(T.ceildiv(padded.shape[0] * padded.shape[1], _THREADS), threads=_THREADS) as bx:
            pdl.trigger()
            pdl.wait()
            _copy(matrix, padded, granule, bx)

    return pad


def pad_both(dtype: str, granules: tuple[int, int]):
    """The prim_func (a, padded_a, b, padded_b): `pad` of two matrices."""
    (a_type, padded_a_type), (b_type, padded_b_type) = (
        _types(dtype, granule, name) for granule, name in zip(granules, ("a_", "b_"), strict=True)
    )

    @T.prim_func
    def pad_both(a: a_type, padded_a: padded_a_type, b: b_type, padded_b: padded_b_type):
        of_a = T.ceildiv(padded_a.shape[0] * padded_a.shape[1], _THREADS)
        of_b = T.ceildiv(padded_b.shape[0] * padded_b.shape[1], _THREADS)
        with T.Kernel(of_a + of_b, threads=_THREADS) as bx:
            pdl.trigger()
            pdl.wait()
            if bx < of_a:
                _copy(a, padded_a, granules[0], bx)
            else:
                _copy(b, padded_b, granules[1], bx - of_a)

    return pad_both


def _types(dtype: str, granule: int, name: str) -> tuple:
    rows, groups = T.dynamic(f"{name}rows"), T.dynamic(f"{name}groups")
    return (
        T.Tensor((rows, T.dynamic(f"{name}granules") * granule), dtype),
        T.Tensor((rows, groups, GROUP), dtype),
    )


@T.macro
def _copy(matrix, padded, granule, block):
    """Copy a group with each thread of a block."""
    number = T.alloc_var("int32", block * _THREADS + T.get_thread_binding())
    if number < padded.shape[0] * padded.shape[1]:
        row = T.alloc_var("int32", T.truncdiv(number, padded.shape[1]))
        group = T.alloc_var("int32", number - row * padded.shape[1])
        values = T.alloc_local((GROUP,), matrix.dtype)
        for i in T.unroll(GROUP // granule):
            for v in T.vectorized(granule):
                values[i * granule + v] = T.cast(0, matrix.dtype)
            if group * GROUP + i * granule < matrix.shape[1]:
                for v in T.vectorized(granule):
                    values[i * granule + v] = matrix[row, group * GROUP + i * granule + v]
        for v in T.vectorized(GROUP):
            padded[row, group, v] = values[v]


def is_padded(row: int) -> bool:
    """Return whether an operand with rows of so many elements in memory is copied."""
    return row % GROUP > 0


def after_pad(problem: Problem, device, multiply: Callable, pass_configs: dict) -> Callable:
    """Return a function of the problem's tensors that launches the copies that they need, and `multiply` with those."""

    operands = [is_padded(problem.a_row), is_padded(problem.b_row)]
    granules = [math.gcd(row, GROUP) for row in (problem.a_row, problem.b_row)]
    if all(operands):
        copy = device.compile(pad_both, problem.dtype, tuple(granules), pass_configs=pass_configs)
    else:
        copy = device.compile(pad, problem.dtype, granules[operands.index(True)], pass_configs=pass_configs)

    def longer(matrix):
        rows, columns = matrix.shape
        return device.empty(rows, (columns + ROW - 1) // ROW * (ROW // GROUP), GROUP, dtype=problem.dtype)

    def run(a, b, *others):
        copies = [longer(matrix) if is_copied else None for matrix, is_copied in zip((a, b), operands, strict=True)]
        copy(*(tensor for pair in zip((a, b), copies, strict=True) if pair[1] is not None for tensor in pair))
        read = [matrix if of is None else of.flatten(1) for matrix, of in zip((a, b), copies, strict=True)]
        multiply(*read, *(read[0] if operand is a else operand for operand in others))

    return run

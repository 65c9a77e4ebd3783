"""The end of a matmul whose K was split: the sum of the accumulators of all splits, in order, and the epilogue.

out[i, j] = activation(row_scale[i] * column_scale[j] * (sum over s of partial[s, i, j]) + bias[j]) + residual[i, j]

Every split writes its own part of `partial`: the order of additions, and with it every bit of the result, is always the same.
"""

from collections.abc import Callable
from dataclasses import replace

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.epilogue import finished
from tilelang_ext.kernels.matmul.problem import Operands, Problem
from tilelang_ext.kernels.sm90 import pdl

GROUP = 8  # neighbouring columns of a thread: two loads of 16 bytes
_ROWS, _GROUPS = 4, 32  # of a block
_LOADS = 4  # splits whose loads are in flight together


def sum_splits(problem: Problem):
    """The prim_func (partial, row_scale, column_scale, bias, residual, out), with columns as (N / GROUP, GROUP).

    partial (splits, M, N / GROUP, GROUP) stands for what the problem lacks. Where problem.N is not 0, N is no multiple of
    GROUP: rows of partial are longer, and columns of the other tensors are no groups.
    """
    splits, M, groups = T.dynamic("splits"), T.dynamic("M"), T.dynamic("groups")
    columns = (T.dynamic("N"),) if problem.N else (groups, GROUP)
    partial = (splits, M, groups, GROUP), "float32"
    partial_type, *types = (T.Tensor(*of) for of in (partial, *problem.types_of_epilogue(M, columns, partial)))
    row_scale_type, column_scale_type, bias_type, residual_type, out_type = types
    shape = _ROWS, _GROUPS, GROUP

    def column_of(group, v) -> tuple:
        """Return the indices of a column, or of the last one where there is none."""
        group = T.min(group, groups - 1)
        return (T.min(group * GROUP + v, columns[0] - 1),) if problem.N else (group, v)

    def is_inside(group, v):
        return group * GROUP + v < columns[0] if problem.N else group < groups

    @T.prim_func
    def sum_splits(
        partial: partial_type,
        row_scale: row_scale_type,
        column_scale: column_scale_type,
        bias: bias_type,
        residual: residual_type,
        out: out_type,
    ):
        with T.Kernel(T.ceildiv(groups, _GROUPS), T.ceildiv(M, _ROWS), threads=_ROWS * _GROUPS) as (bx, by):
            pdl.trigger()
            pdl.wait()
            total_f = T.alloc_fragment(shape, "float32")
            out_f = T.alloc_fragment(shape, problem.out_dtype)
            operands = Operands(None, None, row_scale, column_scale, bias, residual, out)
            T.clear(total_f)
            # Threads past the end read what the last row and group read, and store nothing.
            for s in T.unroll(splits, unroll_factor=_LOADS):
                for i, g, v in T.Parallel(*shape):
                    total_f[i, g, v] += partial[s, T.min(by * _ROWS + i, M - 1), T.min(bx * _GROUPS + g, groups - 1), v]
            for i, g, v in T.Parallel(*shape):
                row, column = T.min(by * _ROWS + i, M - 1), column_of(bx * _GROUPS + g, v)
                out_f[i, g, v] = T.cast(finished(problem.epilogue, operands, total_f[i, g, v], row, column), problem.out_dtype)
            for i, g, v in T.Parallel(*shape):
                if by * _ROWS + i < M and is_inside(bx * _GROUPS + g, v):
                    out[(by * _ROWS + i, *column_of(bx * _GROUPS + g, v))] = out_f[i, g, v]

    return sum_splits


def before_sum(problem: Problem, splits: int, device, multiply: Callable, pass_configs: dict) -> Callable:
    """Return a function of the problem's tensors that launches `multiply`, of a, b and the accumulators, and the sum."""
    of_result = replace(problem, dtype="float32", a_is_k_major=True, b_is_k_major=True, M=0, K=0)  # all that this kernel has
    add = device.compile(sum_splits, of_result, pass_configs=pass_configs)

    def with_groups(tensor):
        return tensor if problem.N else _grouped(tensor)

    def run(a, b, row_scale, column_scale, bias, residual, out):
        M, N = out.shape
        partial = device.empty(splits, M, (N + GROUP - 1) // GROUP * GROUP, dtype="float32")
        multiply(a, b, partial)
        grouped = _grouped(partial)
        others = [grouped if operand is a else with_groups(operand) for operand in (column_scale, bias, residual)]
        add(grouped, grouped if row_scale is a else row_scale, *others, with_groups(out))

    return run


def _grouped(tensor):
    return tensor.unflatten(len(tensor.shape) - 1, (-1, GROUP))

"""The end of a matmul whose K was split: the sum of the accumulators of all splits, in order, and the epilogue.

out[i, j] = activation(row_scale[i] * column_scale[j] * (sum over s of partial[s, i, j]) + bias[j]) + residual[i, j]

Every split writes its own part of `partial`: the order of additions, and with it every bit of the result, is always the same.
"""

from collections.abc import Callable
from dataclasses import replace

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.epilogue import finished
from tilelang_ext.kernels.matmul.problem import TMA_ALIGNMENT, Operands, Problem
from tilelang_ext.kernels.sm90 import pdl

GROUP = 4  # neighbouring columns of a thread: a load of 16 bytes
THREADS = 128
_LOADS = (4, 8, 16)  # that a thread has in flight together


def loads_of(splits: int) -> int:
    """Return the loads of the kernel for so many splits: what a thread takes is mostly latency, once for all of them."""
    return next((loads for loads in _LOADS if loads >= splits), _LOADS[-1])


def sum_splits(problem: Problem, loads: int):
    """The prim_func (partial, row_scale, column_scale, bias, residual, out), with columns as (N / GROUP, GROUP).

    partial (splits, M, N / GROUP, GROUP) stands for what the problem lacks. Where problem.N is not 0, N is no multiple of
    GROUP: rows of partial are longer, and columns of the other tensors are no groups.
    """
    splits, M, groups = T.dynamic("splits"), T.dynamic("M"), T.dynamic("groups")
    columns = (T.dynamic("N"),) if problem.N else (groups, GROUP)
    partial = (splits, M, groups, GROUP), "float32"
    partial_type, *types = (T.Tensor(*of) for of in (partial, *problem.types_of_epilogue(M, columns, partial)))
    row_scale_type, column_scale_type, bias_type, residual_type, out_type = types

    def column_of(group, v) -> tuple:
        """Return the indices of a column, or of the last one where there is none."""
        return (T.min(group * GROUP + v, columns[0] - 1),) if problem.N else (group, v)

    @T.macro
    def store(out, row, group, values):
        if problem.N:
            for v in T.unroll(GROUP):
                if group * GROUP + v < columns[0]:
                    out[row, group * GROUP + v] = values[v]
        else:
            for v in T.vectorized(GROUP):
                out[row, group, v] = values[v]

    @T.prim_func
    def sum_splits(
        partial: partial_type,
        row_scale: row_scale_type,
        column_scale: column_scale_type,
        bias: bias_type,
        residual: residual_type,
        out: out_type,
    ):
        with T.Kernel(T.ceildiv(M * groups, THREADS), threads=THREADS) as bx:
            pdl.trigger()
            pdl.wait()
            operands = Operands(None, None, row_scale, column_scale, bias, residual, out)
            number = T.alloc_var("int32", bx * THREADS + T.get_thread_binding())
            if number < M * groups:
                row = T.alloc_var("int32", T.truncdiv(number, groups))
                group = T.alloc_var("int32", number - row * groups)
                total, values = T.alloc_local((GROUP,), "float32"), T.alloc_local((GROUP,), problem.out_dtype)
                loaded = T.alloc_local((loads, GROUP), "float32")
                for v in T.unroll(GROUP):
                    total[v] = 0
                for first in T.serial(T.ceildiv(splits, loads)):
                    # Past the last split it is loaded again: a predicate for each load would put additions between them.
                    for s in T.unroll(loads):
                        for v in T.vectorized(GROUP):
                            loaded[s, v] = partial[T.min(first * loads + s, splits - 1), row, group, v]
                    for s in T.unroll(loads):
                        for v in T.unroll(GROUP):
                            total[v] = total[v] + T.if_then_else(first * loads + s < splits, loaded[s, v], 0)
                for v in T.unroll(GROUP):
                    values[v] = T.cast(
                        finished(problem.epilogue, operands, total[v], row, column_of(group, v)), problem.out_dtype
                    )
                store(out, row, group, values)

    return sum_splits


def before_sum(problem: Problem, splits: int, device, multiply: Callable, pass_configs: dict) -> Callable:
    """Return a function of the problem's tensors that launches `multiply`, of a, b and the accumulators, and the sum."""
    of_result = replace(problem, dtype="float32", a_is_k_major=True, b_is_k_major=True, M=0, K=0)  # all that this kernel has
    add = device.compile(sum_splits, of_result, loads_of(splits), pass_configs=pass_configs)

    def with_groups(tensor):
        return tensor if problem.N else _grouped(tensor)

    def run(a, b, row_scale, column_scale, bias, residual, out):
        M, N = out.shape
        partial = device.empty(splits, M, (N + TMA_ALIGNMENT - 1) // TMA_ALIGNMENT * TMA_ALIGNMENT, dtype="float32")
        multiply(a, b, partial)
        grouped = _grouped(partial)
        others = [grouped if operand is a else with_groups(operand) for operand in (column_scale, bias, residual)]
        add(grouped, grouped if row_scale is a else row_scale, *others, with_groups(out))

    return run


def _grouped(tensor):
    return tensor.unflatten(len(tensor.shape) - 1, (-1, GROUP))

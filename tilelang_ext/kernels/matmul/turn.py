"""The transpose of an M-major operand of few rows, ahead of a matmul that reads its rows.

TMA takes long to fill what lies past the end of a row of 64 elements with zeros; of few rows the copy costs less.
"""

from collections.abc import Callable

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.problem import TMA_ALIGNMENT as GROUP
from tilelang_ext.kernels.matmul.problem import Problem
from tilelang_ext.kernels.sm90 import pdl

_THREADS = 128


def turn(dtype: str):
    """The prim_func (a, turned): turned[g, v, k] = a[k, g, v], with rows of the matmul as (M / GROUP, GROUP)."""
    K, groups = T.dynamic("K"), T.dynamic("groups")

    @T.prim_func
    def turn(a: T.Tensor((K, groups, GROUP), dtype), turned: T.Tensor((groups, GROUP, K), dtype)):
        with T.Kernel(T.ceildiv(K, _THREADS), groups, threads=_THREADS) as (bx, by):
            pdl.trigger()
            pdl.wait()
            values_f = T.alloc_fragment((_THREADS, GROUP), dtype)
            for i, v in T.Parallel(_THREADS, GROUP):
                values_f[i, v] = a[T.min(bx * _THREADS + i, K - 1), by, v]
            for i, v in T.Parallel(_THREADS, GROUP):
                if bx * _THREADS + i < K:
                    turned[by, v, bx * _THREADS + i] = values_f[i, v]

    return turn


def after_turn(problem: Problem, device, multiply: Callable, pass_configs: dict) -> Callable:
    """Return a function of the problem's tensors that launches the transpose, and `multiply` with its result."""
    copy = device.compile(turn, problem.dtype, pass_configs=pass_configs)

    def run(a, b, *others):
        turned = device.empty(*reversed(a.shape), dtype=problem.dtype)
        copy(a.unflatten(1, (-1, GROUP)), turned.unflatten(0, (-1, GROUP)))
        multiply(turned, b, *(turned if operand is a else operand for operand in others))

    return run

"""Values of 8 bits, transposed for Hopper's MMA, which reads its right operand along K: here, the keys.

    v_transposed[batch, head, channel, column] = v[batch, key_of(column), head, channel];  0 past the last key

In this order a thread's four codes of P in one register of the left operand are those that it computed
(`probabilities.key_of`).
"""

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.probabilities import KEY_UNIT, key_of
from tilelang_ext.kernels.attention.problem import Problem

_KEYS, _THREADS = 128, 128  # of a block


def transpose(problem: Problem):
    """The prim_func (v, v_transposed), whose keys are (units, KEY_UNIT)."""
    types, D, units = problem.types(), problem.head_dim, T.dynamic("units")
    transposed = T.Tensor((*types.v_transposed.shape[:3], units, KEY_UNIT), problem.dtype)

    @T.prim_func
    def transpose(v: types.v, v_transposed: transposed):
        with T.Kernel(T.ceildiv(v_transposed.shape[3], _KEYS // KEY_UNIT), v.shape[2], v.shape[0], threads=_THREADS) as (
            bx,
            head,
            batch,
        ):
            v_s = T.alloc_shared((_KEYS, D), problem.dtype)
            for i, j in T.Parallel(_KEYS, D):
                v_s[i, j] = T.if_then_else(
                    bx * _KEYS + i < v.shape[1],
                    v[batch, T.min(bx * _KEYS + i, v.shape[1] - 1), head, j],
                    T.cast(0, problem.dtype),
                )
            # A thread has 16 keys of a channel, and the threads beside it the next channels: they read the same words.
            codes = T.alloc_local((KEY_UNIT,), problem.dtype)
            for turn in T.serial(D * _KEYS // KEY_UNIT // _THREADS):
                channel = T.truncmod(turn * _THREADS + T.get_thread_binding(), D)
                unit = T.truncdiv(turn * _THREADS + T.get_thread_binding(), D)
                for i in T.unroll(KEY_UNIT):
                    codes[i] = v_s[unit * KEY_UNIT + key_of(i), channel]
                if bx * (_KEYS // KEY_UNIT) + unit < v_transposed.shape[3]:
                    for i in T.vectorized(KEY_UNIT):
                        v_transposed[batch, head, channel, bx * (_KEYS // KEY_UNIT) + unit, i] = codes[i]

    return transpose

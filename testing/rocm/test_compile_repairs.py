"""AMD's compiler takes what the repairs of passes and generator write into a text."""

import pytest
from passes import meeting_kernels, operator_kernels
from rocm.fp8_kernels import CODES, FOREIGN, conversions
from rocm.kernels import lower

from tilelang_ext import language as T
from tilelang_ext.rocm import compile_hip


def quad_sums():
    @T.prim_func
    def sums(X: T.Tensor((256,), "float16"), C: T.Tensor((256,), "float16")):
        with T.Kernel(1, threads=64):
            for i in T.Parallel(64):
                T.atomic_addx4(C[i * 4], X[i * 4])
                T.atomic_addx2(C[i * 4], X[i * 4])

    return sums


def ramps():
    @T.prim_func
    def ramps(A: T.Tensor((64,), "int8"), B: T.Tensor((64,), "uint8")):
        with T.Kernel(1, threads=16):
            for i in T.vectorized(4):
                A[T.get_thread_binding() * 4 + i] = T.cast(T.get_thread_binding() + i, "int8")
                B[T.get_thread_binding() * 4 + i] = T.cast(T.get_thread_binding() + i, "uint8")

    return ramps


KERNELS = {
    "reduction from any thread": lambda: meeting_kernels.normalized_row(48),
    "float64": lambda: operator_kernels.floats("float64"),
    "booleans": operator_kernels.booleans,
    "narrow integers": operator_kernels.narrow_integers,
    "atomic sums of four halves": quad_sums,
    "ramps of eight bits": ramps,
    "fp8": lambda: conversions([format.dtype for format in FOREIGN["gfx942"]], CODES),
}


@pytest.mark.hip
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name):
    compile_hip(lower(KERNELS[name](), "gfx942").source, "gfx942")

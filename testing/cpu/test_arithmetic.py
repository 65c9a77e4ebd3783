"""Operators mean what they mean in the language, as on Metal."""

import pytest
import torch
from cpu.run import compile_c
from passes import operator_kernels as kernels
from passes import thread_kernels

from tilelang_ext import language as T


def check(kernel, arguments, pairs):
    compile_c(kernel)(*arguments)
    for output, want in pairs:
        torch.testing.assert_close(output, want.to(output.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_floats(dtype):
    arguments, want = kernels.float_case(dtype)
    check(kernels.floats(dtype), arguments, [(arguments[-1], want)])


# The exact value of each needs more than the seven digits that TVM prints.
CONSTANTS = (0.12345678901, 1.0000001, -3.1415927, 1.1754944e-38, 16777217.0, 1e-45, 2.0**-30)


def constants(dtype, tiled):
    numbered, number = tuple(enumerate(CONSTANTS)), getattr(T, dtype)

    @T.prim_func
    def kernel(C: T.Tensor((len(CONSTANTS), 4), dtype)):
        with T.Kernel(1):
            if tiled:  # our pass list; else upstream's
                tile = T.alloc_fragment((len(CONSTANTS), 4), dtype)
                T.clear(tile)
            for i, value in numbered:
                C[i, 0] = number(value)

    return kernel


@pytest.mark.parametrize(("dtype", "tiled"), [("float32", True), ("float32", False), ("float64", False)])
def test_constants(dtype, tiled):
    C = torch.zeros(len(CONSTANTS), 4, dtype=getattr(torch, dtype))
    compile_c(constants(dtype, tiled))(C)
    assert C[:, 0].tolist() == torch.tensor(CONSTANTS, dtype=C.dtype).tolist()


def test_infinity_of_e5m2():
    C, D = (torch.zeros(64).to(torch.float8_e5m2) for _ in range(2))
    compile_c(thread_kernels.infinities("float8_e5m2"))(C, D)
    assert (C.float() == float("inf")).all()
    assert (D.float() == float("-inf")).all()


def test_indices_of_more_than_32_bits():
    """A tensor of 5.6e9 elements, of which two are read: by our pass list."""

    @T.prim_func
    def kernel(A: T.Tensor((70000, 80000), "int8"), C: T.Tensor((2,), "int8")):
        with T.Kernel(1):
            C[0] = A[69999, 79999]
            C[1] = A[26843, 43648]

    source = compile_c(kernel).get_kernel_source()
    assert str(69999 * 80000 + 79999) in source
    assert str(26843 * 80000 + 43648) in source

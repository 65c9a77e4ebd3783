"""Operators mean what they mean in the language, as on Metal."""

import pytest
import torch
from cpu.run import compile_c
from passes import operator_kernels as kernels


def check(kernel, arguments, pairs):
    compile_c(kernel)(*arguments)
    for output, want in pairs:
        torch.testing.assert_close(output, want.to(output.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_floats(dtype):
    arguments, want = kernels.float_case(dtype)
    check(kernels.floats(dtype), arguments, [(arguments[-1], want)])

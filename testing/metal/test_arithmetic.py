"""Operators mean what they mean in the language: floats are no integers, booleans neither, and narrow integers are narrow."""

import pytest
import torch
from passes import operator_kernels as kernels

from tilelang_ext import metal, simulate


def check(kernel, arguments, pairs):
    report = simulate(kernel, *arguments)
    assert not report.findings, str(report)
    for output, want in pairs:
        torch.testing.assert_close(output, want.to(output.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_floats(dtype):
    arguments, want = kernels.float_case(dtype)
    check(kernels.floats(dtype), arguments, [(arguments[-1], want)])


def test_what_asks_for_nan_says_so():
    """Apple's compiler, with fast math, takes x != x for false."""
    source = metal.lower(kernels.floats("float32")).get_kernel_source()
    assert "!=" not in source.replace("!is_nan", "")
    assert source.count("is_nan(") >= 2


def test_booleans():
    arguments, *wants = kernels.boolean_case()
    check(kernels.booleans(), arguments, zip(arguments[-2:], wants, strict=True))


def test_narrow_integers():
    arguments, outputs, wants = kernels.narrow_case()
    check(kernels.narrow_integers(), arguments, zip(outputs, wants, strict=True))

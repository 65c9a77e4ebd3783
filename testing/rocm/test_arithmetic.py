"""Operators mean what they mean in the language, as on Metal."""

import pytest
import torch
from passes import operator_kernels as kernels

from tilelang_ext import simulate


def check(kernel, arguments, pairs, arch):
    report = simulate(kernel, *arguments, target=f"hip -mcpu={arch}")
    assert not report.findings, str(report)
    for output, want in pairs:
        torch.testing.assert_close(output, want.to(output.dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "arch"), [("float32", "gfx942"), ("float16", "gfx1100"), ("float64", "gfx950")])
def test_floats(dtype, arch):
    arguments, want = kernels.float_case(dtype)
    check(kernels.floats(dtype), arguments, [(arguments[-1], want)], arch)


def test_booleans():
    arguments, *wants = kernels.boolean_case()
    check(kernels.booleans(), arguments, zip(arguments[-2:], wants, strict=True), "gfx942")


def test_narrow_integers():
    arguments, outputs, wants = kernels.narrow_case()
    check(kernels.narrow_integers(), arguments, zip(outputs, wants, strict=True), "gfx1201")

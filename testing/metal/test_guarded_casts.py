"""Elements that conditions exclude keep their values when a store converts: on every target, as here on Metal."""

import pytest
import torch
from passes import operator_kernels as kernels

from tilelang_ext import simulate


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_guarded_casts(dtype):
    arguments, outputs, wants = kernels.guarded_case(dtype)
    report = simulate(kernels.guarded_casts(dtype), *arguments)
    assert not report.findings, str(report)
    for output, want in zip(outputs, wants, strict=True):
        assert torch.equal(output.float(), want)

"""Elements that conditions exclude keep their values when a store converts, as on Metal."""

import pytest
import torch
from passes import operator_kernels as kernels

from tilelang_ext import simulate


@pytest.mark.parametrize(("arch", "dtype"), [("gfx942", "int8"), ("gfx1201", "bfloat16")])
def test_guarded_casts(arch, dtype):
    arguments, outputs, wants = kernels.guarded_case(dtype)
    report = simulate(kernels.guarded_casts(dtype), *arguments, target=f"hip -mcpu={arch}")
    assert not report.findings, str(report)
    for output, want in zip(outputs, wants, strict=True):
        assert torch.equal(output.float(), want)

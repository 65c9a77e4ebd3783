"""What is each thread's own, and what a rounding mode, an index or a constant says, as on Metal."""

import re

import pytest
import torch
from passes import thread_kernels as kernels
from rocm.kernels import lower

from tilelang_ext import simulate


def check(kernel, arguments, outputs, wants, arch):
    report = simulate(kernel, *arguments, target=f"hip -mcpu={arch}")
    assert not report.findings, str(report)
    for output, want in zip(outputs, wants, strict=True):
        torch.testing.assert_close(output, want, rtol=0, atol=0)


def test_lanes_of_a_size():
    C = torch.zeros(5, kernels.COUNT, dtype=torch.int32)
    check(kernels.lanes, (C,), [C], [kernels.lanes_case()], "gfx942")


def test_atomics():
    check(kernels.atomics, *kernels.atomics_case(), "gfx942")


def test_powers_and_ieee_functions():
    arguments, (powers, rows), (want, want_rows) = kernels.powers_case()
    check(kernels.powers, arguments, [rows], [want_rows], "gfx1100")
    torch.testing.assert_close(powers, want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", kernels.IEEE)
def test_directed_rounding_is_refused_by_name(name):
    with pytest.raises(
        NotImplementedError, match=rf"T\.{name}: the rounding mode must be 'rn' on AMD, which has no other; got 'rz'"
    ):
        lower(kernels.ieee("rz", name), "gfx942")


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_infinities(arch):
    C, D = (torch.zeros(64).to(torch.float8_e5m2) for _ in range(2))
    check(kernels.infinities("float8_e5m2"), (C, D), (), (), arch)
    assert (C.float() == float("inf")).all()
    assert (D.float() == float("-inf")).all()
    with pytest.raises(
        ValueError, match=r"T\.infinity: dtype must be one with infinity; got float8_e4m3fnuz; use T\.max_value"
    ):
        lower(kernels.infinities("float8_e4m3fnuz"), arch)


def test_far_elements():
    numbers = set(map(int, re.findall(r"\d{9,}", lower(kernels.far_elements(), "gfx942").source)))
    assert numbers >= set(kernels.FAR)
    assert min(numbers) >= 2**31

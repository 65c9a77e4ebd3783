"""What is each thread's own, and what a rounding mode, an index or a constant says, on Metal."""

import re

import pytest
import torch
from passes import thread_kernels as kernels

from tilelang_ext import metal, simulate


def check(kernel, arguments, outputs, wants):
    report = simulate(kernel, *arguments)
    assert not report.findings, str(report)
    for output, want in zip(outputs, wants, strict=True):
        torch.testing.assert_close(output, want, rtol=0, atol=0)


def test_lanes_of_a_size():
    C = torch.zeros(5, kernels.COUNT, dtype=torch.int32)
    check(kernels.lanes, (C,), [C], [kernels.lanes_case()])


def test_atomics():
    check(kernels.atomics, *kernels.atomics_case())


def test_values_of_threads_for_a_tile_are_refused():
    with pytest.raises(
        NotImplementedError, match=r"T\.atomic_add: a thread's own value goes to one element; got the tile tile"
    ):
        metal.lower(kernels.values_of_threads_for_a_tile())


@pytest.mark.parametrize("name", kernels.IEEE)
def test_directed_rounding_is_refused_by_name(name):
    message = rf"T\.{name}: the rounding mode must be 'rn' on Metal, which has no other; got 'ru'"
    with pytest.raises(NotImplementedError, match=message):
        metal.lower(kernels.ieee("ru", name))


def test_infinities():
    C, D = (torch.zeros(64).to(torch.float8_e5m2) for _ in range(2))
    check(kernels.infinities("float8_e5m2"), (C, D), (), ())
    assert (C.float() == float("inf")).all()
    assert (D.float() == float("-inf")).all()
    with pytest.raises(ValueError, match=r"T\.infinity: dtype must be one with infinity; got float8_e4m3fn; use T\.max_value"):
        metal.lower(kernels.infinities("float8_e4m3fn"))


def test_far_elements():
    numbers = set(map(int, re.findall(r"\d{9,}", metal.lower(kernels.far_elements()).source)))
    assert numbers >= set(kernels.FAR)
    assert not [number for number in numbers if number < 2**31 and number not in (2147483647,)]

"""Operators mean what they mean in the language, as on Metal."""

import pytest
import torch
from passes import operator_kernels as kernels

from tilelang_ext import language as T
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


def counted(dtype):
    """Consecutive numbers of 8 bits, by vectors: plain, wrapping, and with other operands."""

    @T.prim_func
    def kernel(X: T.Tensor((64,), dtype), A: T.Tensor((64,), dtype), B: T.Tensor((64,), dtype)):
        with T.Kernel(1, threads=16):
            t = T.get_thread_binding()
            for i in T.vectorized(4):
                A[t * 4 + i] = T.cast(t * 8 + i * 3, dtype)
            for i in T.vectorized(4):
                B[t * 4 + i] = X[t * 4 + i] * T.cast(3, dtype) + T.cast(t + i, dtype)

    return kernel


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_ramps_of_eight_bits(dtype):
    to, t, i = getattr(torch, dtype), torch.arange(64) // 4, torch.arange(64) % 4
    x, a, b = torch.randint(0, 100, (64,)).to(to), torch.full((64,), 77, dtype=to), torch.full((64,), 77, dtype=to)
    simulate(counted(dtype), x, a, b, target="hip -mcpu=gfx942")
    assert torch.equal(a, (t * 8 + i * 3).to(to))
    assert torch.equal(b, (x.long() * 3 + t + i).to(to))


def chosen(dtype):
    """Clamped between constants, and the greater of two by a Select, eight elements of a thread."""

    @T.prim_func
    def kernel(
        X: T.Tensor((512,), dtype),
        Y: T.Tensor((512,), dtype),
        Clamped: T.Tensor((512,), dtype),
        Chosen: T.Tensor((512,), dtype),
    ):
        with T.Kernel(1, threads=64):
            for i in T.Parallel(512):
                Clamped[i] = T.clamp(X[i], T.cast(0, dtype), T.cast(1, dtype))
            for i in T.Parallel(512):
                Chosen[i] = T.Select(X[i] > Y[i], X[i], Y[i])

    return kernel


@pytest.mark.parametrize(("dtype", "arch"), [("float16", "gfx942"), ("bfloat16", "gfx1201")])
def test_choices_between_halves(dtype, arch):
    to, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)
    x, y = (torch.randn(512, generator=generator).to(to) for _ in range(2))
    x[3] = torch.nan
    clamped, chosen_of = (torch.full((512,), -7, dtype=to) for _ in range(2))
    pairs = [(clamped, x.clamp(0, 1)), (chosen_of, torch.where(x > y, x, y))]
    check(chosen(dtype), (x, y, clamped, chosen_of), pairs, arch)

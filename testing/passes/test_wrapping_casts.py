"""Casts of integers that wrap, on every target: what simplifiers conclude of the value before them does not hold after."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import pytest
import tilelang
import torch
from cuda.kernels import lower
from tvm import IRModule, tirx

from tilelang_ext import language as T
from tilelang_ext import simulate
from tilelang_ext.passes.wrapping_casts import KeepWrappingCasts

SIZE = 512


def cast(x, *dtypes):
    for dtype in dtypes:
        x = T.cast(x, dtype) if not isinstance(x, torch.Tensor) else x.to(getattr(torch, dtype))
    return x


def positive(x):
    return T.max(x, 0) if not isinstance(x, torch.Tensor) else x.clamp(min=0)


def choose(condition):
    return T.if_then_else(condition, 1, 0) if not isinstance(condition, torch.Tensor) else condition.int()


def modulo(x, n):
    return x % n


# Of x, an int32 of any value, and u, the same as uint8.
FORMS = [
    lambda x, u: positive(cast(x & 255, "int8", "int32")),
    lambda x, u: choose(cast(u, "int8", "int32") < 0),
    lambda x, u: choose(cast(u, "int8") < 0),
    lambda x, u: modulo(cast((x & 4095) * 3, "int8", "int32"), 3),
    lambda x, u: choose(cast(x % 300, "uint8", "int32") == x % 300),
    lambda x, u: positive(cast(cast(u, "int8"), "uint8", "int32")) + choose(cast(x & 65535, "int16", "int32") > 40000),
    lambda x, u: cast((cast(u, "int32") - 128), "uint8", "int32") // 2,
]


@T.prim_func
def kernel(X: T.Tensor((SIZE,), "int32"), U: T.Tensor((SIZE,), "uint8"), C: T.Tensor((7, SIZE), "int32")):
    with T.Kernel(1, threads=128):
        for i in T.Parallel(SIZE):
            C[0, i] = FORMS[0](X[i], U[i])
            C[1, i] = FORMS[1](X[i], U[i])
            C[2, i] = FORMS[2](X[i], U[i])
            C[3, i] = FORMS[3](X[i], U[i])
            C[4, i] = FORMS[4](X[i], U[i])
            C[5, i] = FORMS[5](X[i], U[i])
            C[6, i] = FORMS[6](X[i], U[i])


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx1100", "c"])
def test_values(target):
    x = torch.randint(-1000, 1000, (SIZE,), dtype=torch.int32)
    u, out = x.to(torch.uint8), torch.full((7, SIZE), -77, dtype=torch.int32)
    if target == "c":
        tilelang.compile(kernel, target="c")(x, u, out)
    else:
        report = simulate(kernel, x, u, out, target=target)
        assert not report.findings, str(report)
    for form, got in zip(FORMS, out, strict=True):
        assert torch.equal(got, form(x, u).int())


def test_text_for_cuda():
    text = lower(kernel, "sm_90")
    assert text.count("(signed char)") >= 5, "no cast is lost"
    assert text.count("max(") >= 1


def kept(expr):
    x, y = tirx.Var("x", "int32"), tirx.Var("y", "uint8")
    func = tirx.PrimFunc([x, y], tirx.Evaluate(expr(x, y)))
    return "keep" in str(KeepWrappingCasts(IRModule({"main": func}))["main"])


def test_which_casts_are_hidden():
    assert kept(lambda x, y: tirx.Cast("int8", y))
    assert kept(lambda x, y: tirx.Cast("int8", tirx.bitwise_and(x, 255)))
    assert kept(lambda x, y: tirx.Cast("uint32", x))
    assert not kept(lambda x, y: tirx.Cast("int8", tirx.bitwise_and(x, 127)))
    assert not kept(lambda x, y: tirx.Cast("int32", y))
    assert not kept(lambda x, y: tirx.Cast("int64", x))
    assert not kept(lambda x, y: tirx.Cast("float32", x))

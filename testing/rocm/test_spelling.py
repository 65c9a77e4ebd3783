"""Vectors of one byte and constants of E5M2, which tilelang's generator cannot spell: masked copies and fills, executed and
compiled."""

# Without `from __future__ import annotations`: this file holds kernels.

import pytest
import torch
from rocm.kernels import lower
from tvm import IRModule, tirx

from tilelang_ext import language as T
from tilelang_ext import simulate
from tilelang_ext.rocm import compile_hip, pipeline
from tilelang_ext.rocm.spelling import SpellEightBits

THREADS = 64
LANES = {
    "uint8": (4, 8, 16),
    "int8": (4, 16),
    "float8_e5m2": (2, 4, 8, 16),
    "float8_e5m2fnuz": (16,),
    "float8_e4m3fn": (2,),
}
TORCH = {"float8_e5m2": torch.float8_e5m2, "float8_e5m2fnuz": torch.float8_e5m2fnuz, "float8_e4m3fn": torch.float8_e4m3fn}


def masked_copy(dtype, lanes):
    """y (rows, 64) = the rows of x, and zeros below, with `lanes` elements per thread."""
    rows = lanes * THREADS // 64

    @T.prim_func
    def kernel(x: T.Tensor((T.dynamic("m"), 64), dtype), y: T.Tensor((rows, 64), dtype)):
        with T.Kernel(1, threads=THREADS) as _:
            x_s = T.alloc_shared((rows, 64), dtype)
            T.copy(x[0:rows, :], x_s)
            T.copy(x_s, y)

    return kernel


def fill(dtype, value, lanes):
    @T.prim_func
    def kernel(y: T.Tensor((lanes * THREADS,), dtype)):
        with T.Kernel(1, threads=THREADS) as _:
            y_f = T.alloc_fragment((lanes * THREADS,), dtype)
            T.fill(y_f, T.cast(value, dtype))
            T.copy(y_f, y)

    return kernel


def repeat(lanes):
    """y[16 i ...] = x[i], repeated `lanes` times; the repeated value is not a constant."""

    @T.prim_func
    def kernel(x: T.Tensor((THREADS,), "uint8"), y: T.Tensor((THREADS, lanes), "uint8")):
        with T.Kernel(1, threads=THREADS) as _:
            for i, j in T.Parallel(THREADS, lanes):
                y[i, j] = x[i]

    return kernel


def run(kernel, *arguments, arch):
    report = simulate(kernel, *arguments, target={"kind": "hip", "mcpu": arch})
    assert not report.findings, str(report)


@pytest.mark.parametrize(("dtype", "lanes"), [(dtype, n) for dtype, lanes in LANES.items() for n in lanes])
def test_masked_copy(dtype, lanes):
    kernel = masked_copy(dtype, lanes)
    x = torch.randint(0, 256, (lanes - 1, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    y = torch.full((lanes, 64), 77, dtype=torch.uint8)
    as_type = TORCH.get(dtype, getattr(torch, dtype))
    run(kernel, x.view(as_type), y.view(as_type), arch="gfx942")
    assert torch.equal(y[:-1], x)
    assert not y[-1].any()


@pytest.mark.parametrize(
    ("dtype", "value", "code"),
    [("uint8", 200, 200), ("int8", -3, 253), ("float8_e5m2", -1.5, 0xBE), ("float8_e5m2fnuz", 1.0, 0x40)],
)
@pytest.mark.parametrize("lanes", [1, 16])
def test_fill(dtype, value, code, lanes):
    y = torch.zeros(lanes * THREADS, dtype=torch.uint8)
    run(fill(dtype, value, lanes), y.view(TORCH.get(dtype, getattr(torch, dtype))), arch="gfx1100")
    assert (y == code).all()


@pytest.mark.parametrize("lanes", [4, 16])
def test_what_is_no_constant(lanes):
    x, y = torch.arange(100, 100 + THREADS).to(torch.uint8), torch.zeros(THREADS, lanes, dtype=torch.uint8)
    run(repeat(lanes), x, y, arch="gfx942")
    assert (y == x[:, None]).all()


@pytest.mark.hip
@pytest.mark.parametrize(("dtype", "arch"), [("uint8", "gfx942"), ("float8_e5m2", "gfx1201")])
def test_compiles(dtype, arch):
    compile_hip(lower(masked_copy(dtype, 16), arch).source, arch)


@pytest.mark.parametrize(("dtype", "lanes"), [("int8", 2), ("float8_e4m3fn", 4), ("float8_e4m3fn", 16), ("float16", 4)])
def test_what_the_generator_can_spell_stays(dtype, lanes, monkeypatch):
    text = lower(masked_copy(dtype, lanes), "gfx942").source
    monkeypatch.setattr(pipeline, "SpellEightBits", lambda mod: mod)
    assert lower.__wrapped__(masked_copy(dtype, lanes), "gfx942").source == text


@pytest.mark.parametrize(("value", "code"), [(0.0, 0x00), (-0.0, 0x80), (57344.0, 0x7B), (float("inf"), 0x7C)])
def test_constants_of_e5m2(value, code):
    func = tirx.PrimFunc([], tirx.Evaluate(tirx.FloatImm("float8_e5m2", value)))
    (spelled,) = SpellEightBits(IRModule({"main": func})).functions.values()
    assert spelled.body.value.op.name == "tirx.reinterpret"
    assert spelled.body.value.args[0].value == code


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_repeated_values_of_operators(dtype):
    """What operators make of narrow integers is an int in C; a row of it has the type's bits alone."""

    @T.prim_func
    def kernel(x: T.Tensor((THREADS,), dtype), y: T.Tensor((THREADS, 16), dtype)):
        with T.Kernel(1, threads=THREADS) as _:
            for i, j in T.Parallel(THREADS, 16):
                y[i, j] = T.max(x[i] >> 1, x[i] ^ 5)

    x = torch.arange(-20, THREADS - 20).to(getattr(torch, dtype))
    y = torch.zeros(THREADS, 16, dtype=x.dtype)
    report = simulate(kernel, x, y, target="hip -mcpu=gfx942")
    assert not report.findings, str(report)
    wide = x.int()
    expected = torch.maximum(wide >> 1, wide ^ 5).to(x.dtype)
    assert torch.equal(y, expected[:, None].expand(THREADS, 16))

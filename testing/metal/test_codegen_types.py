"""Types in generated Metal text: conversions, vectors of every width, integers that wrap, scalars, math."""

import itertools
import math

import pytest
import torch

from tilelang_ext import language as T
from tilelang_ext import simulate
from tilelang_ext.metal.program import lower

NATIVE = ["bool", "int8", "uint8", "int16", "uint16", "int32", "int64", "float16", "bfloat16", "float32"]


def run(kernel, *arguments):
    report = simulate(lower(kernel), *arguments)
    assert report.findings == ()


def elementwise(function, *dtypes, n: int = 64):
    """out = function(a, ...) over n elements; the last dtype is the output's."""
    *sources, out = dtypes
    a, b = sources if len(sources) == 2 else (sources[0], sources[0])

    @T.prim_func
    def kernel(
        A: T.Tensor((n,), a),
        B: T.Tensor((n,), b),
        C: T.Tensor((n,), out),
    ):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(n):
                C[i] = function(A[i], B[i])

    return kernel


def values_of(dtype: str, n: int = 64) -> torch.Tensor:
    """Small numbers that every type but bool and the unsigned ones holds exactly."""
    steps = torch.arange(n) - n // 2
    if dtype.startswith("u"):
        steps = steps.abs()
    if dtype == "bool":
        return steps % 3 == 0
    if "float" in dtype:
        return (steps * 0.5).to(getattr(torch, dtype))
    return steps.to(getattr(torch, dtype))


@pytest.mark.parametrize("source", NATIVE)
def test_convert_to_every_type_at_every_width(source):
    n = 32
    widths = [1, 2, 4, 8, 16] if source in ("bool", "uint8", "float16", "float32") else [1, 4, 8]
    shape = (len(widths), n)

    @T.macro
    def convert_one(A, C, k, lanes, target):
        for i in T.serial(n // lanes):
            for j in T.vectorized(lanes):
                C[k, i * lanes + j] = A[i * lanes + j].astype(target)

    def convert(A, C, target):
        for k, lanes in enumerate(widths):
            convert_one(A, C, k, lanes, target)

    @T.prim_func
    def kernel(
        A: T.Tensor((n,), source),
        C0: T.Tensor(shape, NATIVE[0]),
        C1: T.Tensor(shape, NATIVE[1]),
        C2: T.Tensor(shape, NATIVE[2]),
        C3: T.Tensor(shape, NATIVE[3]),
        C4: T.Tensor(shape, NATIVE[4]),
        C5: T.Tensor(shape, NATIVE[5]),
        C6: T.Tensor(shape, NATIVE[6]),
        C7: T.Tensor(shape, NATIVE[7]),
        C8: T.Tensor(shape, NATIVE[8]),
        C9: T.Tensor(shape, NATIVE[9]),
    ):
        with T.Kernel(1, threads=1):
            convert(A, C0, NATIVE[0])
            convert(A, C1, NATIVE[1])
            convert(A, C2, NATIVE[2])
            convert(A, C3, NATIVE[3])
            convert(A, C4, NATIVE[4])
            convert(A, C5, NATIVE[5])
            convert(A, C6, NATIVE[6])
            convert(A, C7, NATIVE[7])
            convert(A, C8, NATIVE[8])
            convert(A, C9, NATIVE[9])

    values = values_of(source, n)
    if not source.startswith(("bool", "u")):
        values = values.abs()  # C++ leaves a negative float to an unsigned integer open
    outs = [torch.zeros(shape, dtype=getattr(torch, target)) for target in NATIVE]
    run(kernel, values, *outs)
    for target, out in zip(NATIVE, outs, strict=True):
        for lanes, row in zip(widths, out, strict=True):
            assert torch.equal(row.double(), values.to(out.dtype).double()), f"{source} -> {target}, {lanes} at a time"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8", "int64"])
def test_arithmetic_at_every_width(dtype):
    n, widths = 48, [1, 2, 3, 4, 8, 16]

    @T.macro
    def compute(A, B, C, k, lanes):
        for i in T.serial(n // lanes):
            for j in T.vectorized(lanes):
                a = A[i * lanes + j]
                b = B[i * lanes + j]
                C[k, i * lanes + j] = T.if_then_else(a < b, a * b + a, T.max(a, b) - b)

    def compute_at_every_width(A, B, C):
        for k, lanes in enumerate(widths):
            compute(A, B, C, k, lanes)

    @T.prim_func
    def kernel(
        A: T.Tensor((n,), dtype),
        B: T.Tensor((n,), dtype),
        C: T.Tensor((len(widths), n), dtype),
    ):
        with T.Kernel(1, threads=1):
            compute_at_every_width(A, B, C)

    a = values_of(dtype, n) % 5
    b = (values_of(dtype, n) % 3).flip(0)
    out = torch.zeros(len(widths), n, dtype=a.dtype)
    run(kernel, a, b, out)
    expected = torch.where(a < b, a * b + a, torch.maximum(a, b) - b)
    assert torch.equal(out, expected.expand_as(out))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("n", [32, 512], ids=["scalar", "vector"])
def test_narrow_integers_wrap_before_they_widen(dtype, n):
    kernel = elementwise(lambda a, b: (a + b).astype("int32") + (a * b).astype("int32") * 3, dtype, dtype, "int32", n=n)
    info = torch.iinfo(getattr(torch, dtype))
    a = torch.randint(info.min, info.max, (n,), generator=torch.Generator().manual_seed(1))
    b = torch.randint(info.min, info.max, (n,), generator=torch.Generator().manual_seed(2))
    out = torch.zeros(n, dtype=torch.int32)
    run(kernel, a.to(getattr(torch, dtype)), b.to(getattr(torch, dtype)), out)

    def wrap(x):
        return (x - info.min) % (info.max - info.min + 1) + info.min

    assert torch.equal(out, (wrap(a + b) + wrap(a * b) * 3).to(torch.int32))


BITWISE = {
    "and": (lambda a, b: a & b, lambda a, b: a & b),
    "or": (lambda a, b: a | b, lambda a, b: a | b),
    "xor": (lambda a, b: a ^ b, lambda a, b: a ^ b),
    "not": (lambda a, b: ~a, lambda a, b: ~a),
    "shift": (lambda a, b: (a << 3) >> 2, lambda a, b: (a << 3) >> 2),
}


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
@pytest.mark.parametrize("n", [32, 512], ids=["scalar", "vector"])
def test_bit_operations(dtype, n):
    @T.macro
    def compute(A, B, C, k, function):
        for i in T.Parallel(n):
            C[k, i] = function(A[i], B[i])

    def compute_all(A, B, C):
        for k, (function, _) in enumerate(BITWISE.values()):
            compute(A, B, C, k, function)

    @T.prim_func
    def kernel(A: T.Tensor((n,), dtype), B: T.Tensor((n,), dtype), C: T.Tensor((len(BITWISE), n), dtype)):
        with T.Kernel(1, threads=32):
            compute_all(A, B, C)

    torch_dtype = getattr(torch, dtype)
    info = torch.iinfo(torch_dtype)
    low, high = max(info.min, -(2**62)), min(info.max, 2**62)
    a, b = (torch.randint(low, high, (n,), generator=torch.Generator().manual_seed(s)).to(torch_dtype) for s in (1, 2))
    out = torch.zeros(len(BITWISE), n, dtype=torch_dtype)
    run(kernel, a, b, out)
    for (name, (_, reference)), row in zip(BITWISE.items(), out, strict=True):
        assert torch.equal(row, reference(a, b)), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_literals_are_exact(dtype):
    value = 1.00048828125 if dtype == "float16" else 1.0078125 if dtype == "bfloat16" else 1.0000001192092896
    kernel = elementwise(lambda a, b: a * T.Cast(dtype, T.float32(value)) + T.Cast(dtype, 1e-6), dtype, dtype)
    a = torch.ones(64, dtype=getattr(torch, dtype))
    out = torch.zeros_like(a)
    run(kernel, a, a, out)
    assert torch.equal(out, a * value + torch.tensor(1e-6).to(a.dtype))


SCALARS = {
    "bool": True, "int8": -100, "uint8": 200, "int16": -30000, "uint16": 60000, "int32": -(2**31), "uint32": 2**32 - 1,
    "int64": -(2**40) - 1, "uint64": 2**40 + 1, "float16": 1.5, "float32": 3.25,
}  # TVM's host code has no bfloat16 scalars  # fmt: skip


@pytest.mark.parametrize("order", [list(SCALARS), list(reversed(SCALARS))], ids=["narrow first", "wide first"])
def test_scalar_arguments_of_every_type(order):
    """Each takes one slot of 8 bytes, whatever its neighbours."""
    types = [getattr(T, dtype) for dtype in order]

    @T.prim_func
    def kernel(
        C: T.Tensor((11,), "float32"),
        D: T.Tensor((11,), "int64"),
        a: types[0], b: types[1], c: types[2], d: types[3], e: types[4], f: types[5],
        g: types[6], h: types[7], i: types[8], j: types[9], k: types[10],
    ):  # fmt: skip
        with T.Kernel(1, threads=1):
            C[0] = a.astype("float32")
            D[0] = a.astype("int64")
            C[1] = b.astype("float32")
            D[1] = b.astype("int64")
            C[2] = c.astype("float32")
            D[2] = c.astype("int64")
            C[3] = d.astype("float32")
            D[3] = d.astype("int64")
            C[4] = e.astype("float32")
            D[4] = e.astype("int64")
            C[5] = f.astype("float32")
            D[5] = f.astype("int64")
            C[6] = g.astype("float32")
            D[6] = g.astype("int64")
            C[7] = h.astype("float32")
            D[7] = h.astype("int64")
            C[8] = i.astype("float32")
            D[8] = i.astype("int64")
            C[9] = j.astype("float32")
            D[9] = j.astype("int64")
            C[10] = k.astype("float32")
            D[10] = k.astype("int64")

    floats, integers = torch.zeros(11), torch.zeros(11, dtype=torch.int64)
    given = [SCALARS[dtype] for dtype in order]
    run(kernel, floats, integers, *given)
    assert floats.tolist() == [float(torch.tensor(float(v)).float()) for v in given]
    assert integers.tolist() == [int(v) for v in given]


MATH = {
    "exp": (T.exp, torch.exp),
    "exp2": (T.exp2, torch.exp2),
    "log": (lambda x: T.log(T.abs(x) + 0.1), lambda x: torch.log(x.abs() + 0.1)),
    "log2": (lambda x: T.log2(T.abs(x) + 0.1), lambda x: torch.log2(x.abs() + 0.1)),
    "sqrt": (lambda x: T.sqrt(T.abs(x)), lambda x: x.abs().sqrt()),
    "rsqrt": (lambda x: T.rsqrt(T.abs(x) + 1.0), lambda x: (x.abs() + 1).rsqrt()),
    "tanh": (lambda x: T.tanh(x * 20.0), lambda x: torch.tanh(x * 20)),
    "erf": (T.erf, torch.erf),
    "sigmoid": (T.sigmoid, torch.sigmoid),
    "sin": (T.sin, torch.sin),
    "tan": (T.tan, torch.tan),
    "atan": (T.atan, torch.atan),
    "atan2": (lambda x: T.atan2(x, x + 1.0), lambda x: torch.atan2(x, x + 1)),
    "pow": (lambda x: T.pow(T.abs(x) + 0.5, x), lambda x: (x.abs() + 0.5) ** x),
    "log1p": (lambda x: T.log1p(x * x * 0.001), lambda x: torch.log1p(x * x * 0.001)),
    "hypot": (lambda x: T.hypot(x, x * 2.0), lambda x: torch.hypot(x, x * 2)),
    "floor": (T.floor, torch.floor),
    "ceil": (T.ceil, torch.ceil),
    "trunc": (T.trunc, torch.trunc),
    "round": (T.round, torch.round),
    "fabs": (T.abs, torch.abs),
    "clamp": (lambda x: T.clamp(x, -1.0, 1.0), lambda x: x.clamp(-1, 1)),
    "isnan": (lambda x: T.if_then_else(T.isnan(x), 1.0, 0.0), lambda x: x.isnan().float()),
    "__exp": (T.__exp, torch.exp),
    "fmod": (lambda x: T.fmod(x, 1.5), lambda x: torch.fmod(x, 1.5)),
}


def apply_all(functions, dtype: str, n: int, lanes: int):
    """C[k] = functions[k](A), `lanes` elements at a time."""

    @T.macro
    def apply(A, C, k, function):
        for i in T.serial(n // lanes):
            for j in T.vectorized(lanes):
                C[k, i * lanes + j] = function(A[i * lanes + j])

    def apply_each(A, C):
        for k, function in enumerate(functions):
            apply(A, C, k, function)

    @T.prim_func
    def kernel(
        A: T.Tensor((n,), dtype),
        C: T.Tensor((len(functions), n), dtype),
    ):
        with T.Kernel(1, threads=1):
            apply_each(A, C)

    return kernel


@pytest.mark.parametrize("lanes", [1, 4])
def test_math(lanes):
    x = torch.linspace(-4, 4, 128)
    out = torch.zeros(len(MATH), 128)
    run(apply_all([function for function, _ in MATH.values()], "float32", 128, lanes), x, out)
    for name, row in zip(MATH, out, strict=True):
        expected = MATH[name][1](x.double()).float()
        torch.testing.assert_close(row, expected, rtol=2e-6, atol=2e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_math_of_halves(dtype, lanes):
    names = ["exp", "tanh", "erf", "sqrt", "clamp"]
    x = torch.linspace(-4, 4, 256).to(getattr(torch, dtype))
    out = torch.zeros(len(names), 256, dtype=x.dtype)
    run(apply_all([MATH[name][0] for name in names], dtype, 256, lanes), x, out)
    error = 2**-9 if dtype == "float16" else 2**-7
    for name, row in zip(names, out, strict=True):
        torch.testing.assert_close(row.float(), MATH[name][1](x.double()).float(), rtol=error, atol=error)


def test_nan_and_infinity():
    special = torch.tensor([math.nan, math.inf, -math.inf, 1.0] * 16)
    out = torch.zeros(64)
    kernel = elementwise(lambda a, b: T.max(T.if_then_else(T.isnan(a), -T.infinity("float32"), a), 0.5), "float32", "float32")
    run(kernel, special, special, out)
    assert out.tolist() == [0.5, math.inf, 0.5, 1.0] * 16


def test_reinterpret():
    a = torch.randn(64)
    out = torch.zeros(64, dtype=torch.int32)
    run(elementwise(lambda x, y: T.reinterpret(x, "int32") + 1, "float32", "int32"), a, a, out)
    assert torch.equal(out, a.view(torch.int32) + 1)


def test_variables_and_loops():
    @T.prim_func
    def kernel(C: T.Tensor((32,), "int32")):
        with T.Kernel(1, threads=32):
            tx = T.get_thread_binding()
            total = T.alloc_var("int32", init=5)
            step = T.alloc_var("int32")
            step = 1
            while step < 40:
                total = total + step * tx
                step = step * 3
            for i in T.unroll(3):
                total = total - i
            C[tx] = total

    out = torch.zeros(32, dtype=torch.int32)
    run(kernel, out)
    assert out.tolist() == [5 + (1 + 3 + 9 + 27) * t - 3 for t in range(32)]


@pytest.mark.parametrize(("a", "b"), itertools.permutations(["float16", "bfloat16", "float32"], 2))
def test_shared_memory_of_two_types(a, b):
    """Buffers of two types that share the merged array keep their own alignment and places."""

    @T.prim_func
    def kernel(
        A: T.Tensor((64,), a),
        B: T.Tensor((64,), b),
        C: T.Tensor((64,), "float32"),
    ):
        with T.Kernel(1, threads=32):
            A_s = T.alloc_shared((64,), a)
            B_s = T.alloc_shared((64,), b)
            T.copy(A, A_s)
            T.copy(B, B_s)
            for i in T.Parallel(64):
                C[i] = A_s[63 - i].astype("float32") + B_s[63 - i].astype("float32")

    x, y = values_of(a), values_of(b)
    out = torch.zeros(64)
    run(kernel, x, y, out)
    assert torch.equal(out, (x.float() + y.float()).flip(0))

"""Functions and operators of one element: a row of the output for each name, in one kernel of vectors."""

import math

import numpy as np
from language.table import dtypes
from language.table.rows import Recorder, Row

from tilelang_ext import language

N = 256  # elements of a row
THREADS = 64  # so that a thread has four, which the vectoriser puts into one vector


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    """x in (0, 1), y normal, n small integers of either sign, m in 1 to 30."""
    random = np.random.default_rng(seed)
    return {
        "x": random.uniform(0.05, 0.95, N).astype(np.float32),
        "y": (random.normal(size=N) * 2).astype(np.float32),
        "n": random.integers(-1000, 1000, N).astype(np.int32),
        "m": random.integers(1, 31, N).astype(np.int32),
    }


def _unary(name: str, function, **more) -> Row:
    return Row(name, lambda T, x, y, n, m: getattr(T, name)(x), lambda x, y, n, m: function(x), **more)


def _signed(name: str, function, **more) -> Row:
    return Row(name, lambda T, x, y, n, m: getattr(T, name)(y), lambda x, y, n, m: function(y), **more)


def _floats(name: str, function, **more) -> Row:
    return Row(name, lambda T, x, y, n, m: getattr(T, name)(y, x), lambda x, y, n, m: function(y, x), **more)


def _integers(name: str, function, **more) -> Row:
    return Row(name, lambda T, x, y, n, m: getattr(T, name)(n, m), lambda x, y, n, m: function(n, m), **more)


def _compared(name: str, function, **more) -> Row:
    return Row(
        name,
        lambda T, x, y, n, m: language.if_then_else(getattr(T, name)(n, m * 20), 1, 0),
        lambda x, y, n, m: function(n, m * 20).astype(np.int32),
        **more,
    )


def _logical(name: str, function, **more) -> Row:
    return Row(
        name,
        lambda T, x, y, n, m: language.if_then_else(getattr(T, name)(n > 0, m > 15), 1, 0),
        lambda x, y, n, m: function(n > 0, m > 15).astype(np.int32),
        **more,
    )


def _tested(name: str, function) -> Row:
    """Of y where it is positive; else an infinity, or NaN below -1."""
    odd = lambda y: language.if_then_else(y > 0, y, language.if_then_else(y > -1, y * 1e38 * 1e38, (y - y) / (y - y)))  # noqa: E731
    want = lambda y: np.where(y > 0, y, np.where(y > -1, -np.inf, np.nan))  # noqa: E731
    return Row(
        name,
        lambda T, x, y, n, m: language.if_then_else(getattr(T, name)(odd(y)), 1, 0),
        lambda x, y, n, m: function(want(y)).astype(np.int32),
    )


def _bits(x):
    return x.astype(np.float32).view(np.int32)


erf = np.vectorize(math.erf)

MATH = [
    _unary("acos", np.arccos), _unary("asin", np.arcsin), _signed("atan", np.arctan), _unary("atanh", np.arctanh),
    _signed("asinh", np.arcsinh),
    Row("acosh", lambda T, x, y, n, m: T.acosh(1 + x), lambda x, y, n, m: np.arccosh(1 + x)),
    _signed("sin", np.sin), _signed("cos", np.cos), _unary("tan", np.tan),
    _signed("sinh", np.sinh), _signed("cosh", np.cosh), _signed("tanh", np.tanh),
    _signed("exp", np.exp), _signed("exp2", np.exp2), _signed("exp10", lambda y: 10.0 ** y), _unary("log", np.log),
    _unary("log2", np.log2), _unary("log10", np.log10), _unary("log1p", np.log1p), _unary("sqrt", np.sqrt),
    _unary("rsqrt", lambda x: 1 / np.sqrt(x)), _signed("erf", erf), _signed("sigmoid", lambda y: 1 / (1 + np.exp(-y))),
    _signed("abs", np.abs), _signed("fabs", np.abs), _signed("ceil", np.ceil), _signed("floor", np.floor),
    _signed("trunc", np.trunc), _signed("nearbyint", np.rint), _signed("round", np.rint),
    _floats("atan2", np.arctan2), _floats("copysign", lambda y, x: np.copysign(y, x)), _floats("fmod", np.fmod),
    _floats("hypot", np.hypot), _floats("nextafter", lambda y, x: np.nextafter(np.float32(y), np.float32(x))),
    Row("ldexp", lambda T, x, y, n, m: T.ldexp(y, m), lambda x, y, n, m: np.ldexp(y, m)),
    Row("pow", lambda T, x, y, n, m: T.pow(x, y), lambda x, y, n, m: np.power(x, y)),
    _floats("max", np.maximum), _floats("min", np.minimum), _floats("Max", np.maximum), _floats("Min", np.minimum),
    Row("clamp", lambda T, x, y, n, m: T.clamp(y, -0.5, x), lambda x, y, n, m: np.minimum(np.maximum(y, -0.5), x)),
    _tested("isnan", np.isnan), _tested("isinf", np.isinf), _tested("isfinite", np.isfinite),
    _unary("fast_rcp", lambda x: 1 / x), _floats("ieee_add", np.add), _floats("ieee_sub", np.subtract),
    _floats("ieee_mul", np.multiply), _floats("ieee_fdiv", np.divide), _unary("ieee_frcp", lambda x: 1 / x),
    _unary("ieee_fsqrt", np.sqrt), _unary("ieee_frsqrt", lambda x: 1 / np.sqrt(x)),
    Row("ieee_fmaf", lambda T, x, y, n, m: T.ieee_fmaf(x, y, x), lambda x, y, n, m: x * y + x),
    Row("fma", lambda T, x, y, n, m: T.fma(x, y, x), lambda x, y, n, m: x * y + x),
    _floats("fmul", np.multiply),
    Row("infinity", lambda T, x, y, n, m: language.max(y, -T.infinity("float32")), lambda x, y, n, m: y),
    Row("max_value", lambda T, x, y, n, m: language.min(y, T.max_value("float32")), lambda x, y, n, m: y),
    Row("min_value", lambda T, x, y, n, m: language.max(n, T.min_value("int32")), lambda x, y, n, m: n),
]  # fmt: skip

INTEGERS = [
    _integers("bitwise_and", np.bitwise_and), _integers("bitwise_or", np.bitwise_or),
    _integers("bitwise_xor", np.bitwise_xor),
    Row("bitwise_not", lambda T, x, y, n, m: T.bitwise_not(n), lambda x, y, n, m: ~n),
    Row("shift_left", lambda T, x, y, n, m: T.shift_left(m, m % 8), lambda x, y, n, m: m << m % 8),
    Row("shift_right", lambda T, x, y, n, m: T.shift_right(n, m % 8), lambda x, y, n, m: n >> m % 8),
    Row("clz", lambda T, x, y, n, m: T.clz(m), lambda x, y, n, m: 32 - np.ceil(np.log2(m + 1)).astype(np.int32)),
    Row("popcount", lambda T, x, y, n, m: T.popcount(m), lambda x, y, n, m: np.array([int(v).bit_count() for v in m])),
    _integers("floordiv", np.floor_divide), _integers("floormod", np.mod),
    _integers("truncdiv", lambda n, m: np.trunc(n / m).astype(np.int32)), _integers("truncmod", np.fmod),
    _integers("ceildiv", lambda n, m: -(-n // m)), _integers("cdiv", lambda n, m: -(-n // m)),
    _integers("align_up", lambda n, m: -(-n // m) * m),
    Row("q_multiply_shift", lambda T, x, y, n, m: T.q_multiply_shift(n, 1395864320, 31, 2),
        lambda x, y, n, m: (n.astype(object) * 1395864320 * 4 + (1 << 30) >> 31).astype(np.int32)),
    Row("q_multiply_shift_per_axis", lambda T, x, y, n, m: T.q_multiply_shift_per_axis(
            n, 1395864320, 0, 2, 31, language.IntImm("bool", 0), language.IntImm("bool", 1)),
        lambda x, y, n, m: (n.astype(object) * 1395864320 + (1 << 32) >> 33).astype(np.int32)),
    _integers("Add", np.add), _integers("Sub", np.subtract), _integers("Mul", np.multiply),
    _integers("FloorDiv", np.floor_divide), _integers("FloorMod", np.mod),
    _integers("Div", lambda n, m: np.trunc(n / m).astype(np.int32)), _integers("Mod", np.fmod),
    _compared("EQ", np.equal), _compared("NE", np.not_equal), _compared("LT", np.less), _compared("LE", np.less_equal),
    _compared("GT", np.greater), _compared("GE", np.greater_equal),
    _logical("And", np.logical_and), _logical("Or", np.logical_or),
    Row("Not", lambda T, x, y, n, m: language.if_then_else(T.Not(n > 0), 1, 0), lambda x, y, n, m: (n <= 0).astype(np.int32)),
]  # fmt: skip

VALUES = [
    Row("if_then_else", lambda T, x, y, n, m: T.if_then_else(n > 0, x, y), lambda x, y, n, m: np.where(n > 0, x, y)),
    Row("Select", lambda T, x, y, n, m: T.Select(n > 0, x, y), lambda x, y, n, m: np.where(n > 0, x, y)),
    Row("likely", lambda T, x, y, n, m: language.if_then_else(T.likely(n > 0), x, y), lambda x, y, n, m: np.where(n > 0, x, y)),
    Row("cast", lambda T, x, y, n, m: T.cast(y, "int32"), lambda x, y, n, m: y.astype(np.int32)),
    Row("Cast", lambda T, x, y, n, m: T.Cast("float32", n), lambda x, y, n, m: n.astype(np.float32)),
    Row("reinterpret", lambda T, x, y, n, m: T.reinterpret(y, "int32"), lambda x, y, n, m: _bits(y)),
    Row("call_intrin", lambda T, x, y, n, m: T.call_intrin("float32", "tirx.sqrt", x), lambda x, y, n, m: np.sqrt(x)),
    Row("call_extern", lambda T, x, y, n, m: T.call_extern("float32", "fabsf", y), lambda x, y, n, m: np.abs(y)),
    Row("call_pure_extern", lambda T, x, y, n, m: T.call_pure_extern("float32", "fabsf", y), lambda x, y, n, m: np.abs(y)),
    Row("IntImm", lambda T, x, y, n, m: n + T.IntImm("int32", 7), lambda x, y, n, m: n + 7),
    Row("FloatImm", lambda T, x, y, n, m: x + T.FloatImm("float32", 7.5), lambda x, y, n, m: x + 7.5),
    Row("Broadcast", lambda T, x, y, n, m: language.extract_lane(T.Broadcast(n, 4), 2), lambda x, y, n, m: n),
    Row("broadcast", lambda T, x, y, n, m: language.extract_lane(T.broadcast(y, 4), 2), lambda x, y, n, m: y),
    Row("Ramp", lambda T, x, y, n, m: language.extract_lane(T.Ramp(n, 3, 4), 2), lambda x, y, n, m: n + 6),
    Row("ramp", lambda T, x, y, n, m: language.extract_lane(T.ramp(n, 3, 4), 2), lambda x, y, n, m: n + 6),
    Row("extract_lane", lambda T, x, y, n, m: T.extract_lane(language.Ramp(n, 5, 4), 3), lambda x, y, n, m: n + 15),
    Row("Shuffle", lambda T, x, y, n, m: language.extract_lane(T.Shuffle([language.Ramp(n, 5, 4)], [3, 1]), 1),
        lambda x, y, n, m: n + 5),
    Row("vectorlow", lambda T, x, y, n, m: language.extract_lane(T.vectorlow("int32x2", language.Ramp(n, 5, 4)), 1),
        lambda x, y, n, m: n + 5),
    Row("vectorhigh", lambda T, x, y, n, m: language.extract_lane(T.vectorhigh("int32x2", language.Ramp(n, 5, 4)), 1),
        lambda x, y, n, m: n + 15),
    Row("vectorcombine", lambda T, x, y, n, m: language.extract_lane(
            T.vectorcombine("int32x4", language.Ramp(n, 5, 2), language.Broadcast(m, 2)), 2), lambda x, y, n, m: m),
]  # fmt: skip


def _pair(name: str, function, arity: int = 2) -> Row:
    def emit(T, x, y, n, m):
        operands = [language.Broadcast(operand, 2) for operand in (y, x, y)[:arity]]
        return language.extract_lane(getattr(T, name)(*operands), 1)

    return Row(name, emit, lambda x, y, n, m: function(*(y, x, y)[:arity]))


def _bit_search(name: str, want, *more) -> Row:
    def emit(T, x, y, n, m):
        return getattr(T, name)(language.cast(m, "uint32"), *more)

    refused = dict.fromkeys(("hip", "c"), rf"T\.{name}: must be an operator that .+")
    return Row(name, emit, lambda x, y, n, m: np.vectorize(want)(m.astype(np.uint32)), refused=refused)


def _first_bit(value: int) -> int:
    return int(value & -value).bit_length() - 1


BITS = [
    _bit_search("__ffs", lambda value: _first_bit(int(value)) + 1),
    _bit_search("__fns", lambda value: _first_bit(int(value)), 0, 1),
]
PAIRS = [
    _pair("add2", np.add), _pair("sub2", np.subtract), _pair("mul2", np.multiply), _pair("max2", np.maximum),
    _pair("min2", np.minimum), _pair("abs2", np.abs, 1), _pair("fma2", lambda y, x, z: y * x + z, 3),
]  # fmt: skip

FAST = [
    *(_signed(f"__{name}", getattr(np, name)) for name in ("exp", "sin", "cos")),
    *(_unary(f"__{name}", getattr(np, name)) for name in ("log", "log2", "log10", "tan")),
    _signed("__exp10", lambda y: 10.0**y),
]

ROWS = [*MATH, *INTEGERS, *VALUES, *PAIRS, *FAST, *BITS, *dtypes.ROWS]


def kernel(rows, T=None):
    """F[k] or I[k], by its type, is what row k computes; the other one stays 0."""
    T = T or Recorder()
    count = len(rows)

    @language.macro
    def store(F, I, k, i, value):
        if value.dtype == "float32":
            F[k, i] = value
        else:
            I[k, i] = value

    def emit(x, y, n, m, F, I, i):
        for k, row in enumerate(rows):
            value = row.emit(T, x[i], y[i], n[i], m[i])
            store(F, I, k, i, value)

    @language.prim_func
    def elementwise(
        X: language.Tensor((N,), "float32"), Y: language.Tensor((N,), "float32"), A: language.Tensor((N,), "int32"),
        B: language.Tensor((N,), "int32"), F: language.Tensor((count, N), "float32"), I: language.Tensor((count, N), "int32"),
    ):  # fmt: skip
        with language.Kernel(1, threads=THREADS):
            for i in language.Parallel(N):
                emit(X, Y, A, B, F, I, i)

    return elementwise

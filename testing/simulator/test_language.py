"""Metal's language and library: each name that generated text may use means here what it means there."""

import numpy as np
import pytest
import torch

from simulator import kernels
from tilelang_ext.simulator import execute_msl


def run(body, outputs, *inputs, before="", threads=32, parameters="", **options):
    """Execute `body` with `y` (float per thread unless given), inputs `x0`.. and thread `i`, `lane`."""
    types = {"float32": "float", "int32": "int", "uint32": "uint", "float16": "half", "uint8": "uchar", "int64": "long"}
    arrays = [outputs, *inputs]
    declared = [
        f"device {types[str(a.dtype)]}* {'y' if n == 0 else f'x{n - 1}'} [[buffer({n})]], " for n, a in enumerate(arrays)
    ]
    source = (
        kernels.HEADER + before + f"kernel void f({''.join(declared)}{parameters}uint i [[thread_position_in_grid]], "
        "uint lane [[thread_index_in_simdgroup]]) {\n" + body + "\n}\n"
    )
    report = execute_msl(source, "f", arrays, grid=(1, 1, 1), threads=(threads, 1, 1), **options)
    assert report.findings == (), str(report)
    return outputs


def floats():
    return np.zeros(32, np.float32)


UNARY = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc, "rint": np.rint,
    "round": lambda x: np.floor(x + 0.5), "fabs": np.abs, "abs": np.abs, "saturate": lambda x: np.clip(x, 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("space", ["", "fast::", "precise::", "metal::"])
def test_math_of_one_argument(space):
    x = np.linspace(0.05, 4.45, 32).astype(np.float32)
    names = list(UNARY)
    y = np.zeros(32 * len(names), np.float32)
    run("\n".join(f"y[{n} * 32 + i] = {space}{name}(x0[i]);" for n, name in enumerate(names)), y, x)
    for n, name in enumerate(names):
        np.testing.assert_allclose(y[n * 32 : n * 32 + 32], UNARY[name](x.astype(np.float64)), rtol=1e-6, err_msg=name)


def test_half_rounds_every_operation():
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float16)
    y = np.zeros(32, np.float16)
    run("half a = x0[i], b = x0[i + 32], c = x0[i + 64]; y[i] = a * b + c * a - b / c;", y, x)
    a, b, c = x
    np.testing.assert_array_equal(y, a * b + c * a - b / c)  # numpy rounds each too


def test_bfloat_rounds_every_operation():
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.zeros(32, dtype=torch.bfloat16)
    source = kernels.HEADER + (
        "kernel void f(device bfloat* y [[buffer(0)]], const device bfloat* x [[buffer(1)]],"
        " uint i [[thread_position_in_grid]]) { bfloat a = x[i], b = x[i + 32], c = x[i + 64]; y[i] = a * b + c * a - b / c; }"
    )
    execute_msl(source, "f", [y, x], grid=(1, 1, 1), threads=(32, 1, 1))
    a, b, c = x
    assert torch.equal(y, a * b + c * a - b / c)


SHUFFLES = {
    "simd_shuffle(v, ushort((lane * 5) & 31))": lambda v: v[np.arange(32) * 5 & 31],
    "simd_shuffle_xor(v, 9)": lambda v: v[np.arange(32) ^ 9],
    "simd_shuffle_up(v, 1)": lambda v: np.concatenate([v[:1], v[:-1]]),
    "simd_shuffle_down(v, 1)": lambda v: np.concatenate([v[1:], v[-1:]]),
    "simd_broadcast(v, 7)": lambda v: np.full(32, v[7]),
    "simd_sum(v)": lambda v: np.full(32, v.sum()),
    "simd_max(v)": lambda v: np.full(32, v.max()),
    "simd_min(v)": lambda v: np.full(32, v.min()),
    "simd_product(v)": lambda v: np.full(32, v.prod()),
    "simd_prefix_inclusive_sum(v)": np.cumsum,
    "simd_prefix_exclusive_sum(v)": lambda v: np.cumsum(v) - v,
    "quad_sum(v)": lambda v: np.repeat(v.reshape(8, 4).sum(1), 4),
    "quad_or(v)": lambda v: np.repeat(np.bitwise_or.reduce(v.reshape(8, 4), 1), 4),
    "quad_xor(v)": lambda v: np.repeat(np.bitwise_xor.reduce(v.reshape(8, 4), 1), 4),
    "quad_and(v)": lambda v: np.repeat(np.bitwise_and.reduce(v.reshape(8, 4), 1), 4),
    "quad_prefix_inclusive_sum(v)": lambda v: v.reshape(8, 4).cumsum(1).ravel(),
    "quad_prefix_exclusive_sum(v)": lambda v: (v.reshape(8, 4).cumsum(1) - v.reshape(8, 4)).ravel(),
    "quad_prefix_inclusive_product(v)": lambda v: v.reshape(8, 4).cumprod(1).ravel(),
    "quad_prefix_exclusive_product(v)": lambda v: (v.reshape(8, 4).cumprod(1) // v.reshape(8, 4)).ravel(),
    "quad_shuffle(v, ushort((lane * 3) & 3))": lambda v: v[np.arange(32) & ~3 | np.arange(32) * 3 & 3],
    "quad_broadcast(v, 2)": lambda v: v[np.arange(32) & ~3 | 2],
    "quad_shuffle_xor(v, 3)": lambda v: v[np.arange(32) ^ 3],
    "quad_shuffle_up(v, 1)": lambda v: v[np.arange(32) - (np.arange(32) % 4 > 0)],
    "quad_shuffle_down(v, 1)": lambda v: v[np.arange(32) + (np.arange(32) % 4 < 3)],
    "quad_shuffle_rotate_up(v, 1)": lambda v: np.roll(v.reshape(8, 4), 1, 1).ravel(),
    "quad_shuffle_rotate_down(v, 1)": lambda v: np.roll(v.reshape(8, 4), -1, 1).ravel(),
    "int(quad_any(v > 30)) + 2 * int(quad_all(v > 0))": lambda v: 2 + np.repeat((v.reshape(8, 4) > 30).any(1), 4),
    "simd_and(v)": lambda v: np.full(32, np.bitwise_and.reduce(v)),
    "simd_or(v)": lambda v: np.full(32, np.bitwise_or.reduce(v)),
    "simd_xor(v)": lambda v: np.full(32, np.bitwise_xor.reduce(v)),
    "int(simd_any(v > 30))": lambda v: np.full(32, int((v > 30).any())),
    "int(simd_all(v > 30))": lambda v: np.full(32, int((v > 30).all())),
    "int(ulong(simd_ballot(v & 1)))": lambda v: np.full(32, np.packbits(v & 1, bitorder="little").view(np.int32)[0]),
    "simd_shuffle_xor(int2(v, -v), 1).y": lambda v: -v[np.arange(32) ^ 1],
    "simd_shuffle_and_fill_up(v, -5, 3)": lambda v: np.concatenate([[-5] * 3, v[:-3]]),
    "simd_shuffle_and_fill_down(v, -5, 3)": lambda v: np.concatenate([v[3:], [-5] * 3]),
    "simd_shuffle_rotate_up(v, 3)": lambda v: np.roll(v, 3),
    "simd_shuffle_rotate_down(v, 3)": lambda v: np.roll(v, -3),
    "simd_broadcast_first(v + int(lane))": lambda v: np.full(32, v[0]),
    "simd_prefix_inclusive_product(v & 3)": lambda v: np.cumprod(v & 3, dtype=np.int32),
    "simd_prefix_exclusive_product(v & 3)": lambda v: np.cumprod([1, *(v & 3)[:-1]], dtype=np.int32),
    "quad_product(v)": lambda v: np.repeat(v.reshape(8, 4).prod(1), 4),
    "quad_min(v + int(lane))": lambda v: np.repeat((v + np.arange(32)).reshape(8, 4).min(1), 4),
    "quad_max(v - int(lane))": lambda v: np.repeat((v - np.arange(32)).reshape(8, 4).max(1), 4),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 3])
def test_simd_operations(seed):
    v = np.random.default_rng(1).integers(1, 3, 32).astype(np.int32)
    v[[5, 17]] = 31, 33
    y = np.zeros(32 * len(SHUFFLES), np.int32)
    run("int v = x0[i];\n" + "\n".join(f"y[{n} * 32 + i] = {e};" for n, e in enumerate(SHUFFLES)), y, v, seed=seed)
    for n, (text, expected) in enumerate(SHUFFLES.items()):
        np.testing.assert_array_equal(y[n * 32 : n * 32 + 32], expected(v), err_msg=text)


VALUES = {
    "popcount(0xf0f1)": 9,
    "clz(1u)": 31,
    "ctz(8u)": 3,
    "as_type<float>(0x40490fdb)": np.float32(np.pi),
    "as_type<ushort>(1.0h)": 0x3C00,
    "float(as_type<bfloat>(ushort(0x3f80)))": 1,
    "half(1.0h) + 0.5h": 1.5,
    "float(bfloat(1.00390625f))": 1.0,  # half way: to even
    "fma(2.0f, 3.0f, 4.0f)": 10,
    "clamp(7, 0, 5)": 5,
    "select(1.0f, 2.0f, true)": 2,
    "min(3u, 2u) + max(4, 9)": 11,
    "float(isnan(NAN)) + float(isinf(INFINITY)) * 2": 3,
    "pow(2.0f, 10.0f)": 1024,
    "float4(1, float2(2, 3), 4).zyx.y": 2,
    "float4(1.0f).w + float3(float2(1, 2), 5).z": 6,
    "dot(float3(1, 2, 3), float3(4, 5, 6))": 32,
    "(float4(1, 2, 3, 4) * 2 + 1)[3]": 9,
    "float(any(int2(1, 2) > 1)) + float(all(int2(1, 2) > 1))": 1,
    "uchar4(250, 1, 2, 3).x + 10": 260,
    "uchar(uchar4(uchar(250)).x + 10)": 4,
    "(ulong(1) << 40) >> 38": 4,
    "extract_bits(0xabcdu, 4, 8)": 0xBC,
    "rotate(0x80000001u, 1u)": 3,
    "1.0 / 3.0": np.float32(1) / np.float32(3),  # a literal without suffix is a float
    "tenth(0.3f)": np.float32(0.3) * np.float32(0.1) + np.float32(0.7),  # in a template too
    "half_of(3.0f) + (2.5e-1 * float2(1)).y": 1.75,
    "(metal::array<float, 2>{1, 2}).size() + two(5)[1]": 7,
    "make_uniform(3.0f) * 2": 6,
    "sum(float4{1, 2, 4})": 7,
    "sum({1, 2, 4})": 7,
    "make_filled_simdgroup_matrix<float, 8>(3.0f).thread_elements()[1]": 3,
    "sizeof(float3) + sizeof(packed_float3)": 28,
    "short(-7) >> 1": -4,
    "int(char(200))": -56,
    "float(bool2(true, false).x)": 1,
    "sinpi(0.5f) + 2 * cospi(1.0f)": -1,
    "fract(2.75f) + fract(-0.25f) * 2": 2.25,
    "powr(2.0f, 3.0f) + fmod(-7.0f, 3.0f) + ldexp(3.0f, 4)": 55,
    "mix(2.0f, 6.0f, 0.25f) + divide(1.0f, 4.0f)": 3.25,
    "step(2.0f, 2.0f) + step(2.0f, 1.0f) * 2 + sign(-3.0f) * 4 + copysign(3.0f, -0.0f) * 8": -27,
    "min3(3.0f, 1.0f, 2.0f) + max3(2.0f, 3.0f, 1.0f) * 10 + fmin(2.0f, 3.0f) * 100 + fmax(2.0f, 3.0f) * 1000": 3231,
    "abs(short(-5)) + abs(-2.5f) + abs(3u)": 10.5,
    "mulhi(1 << 30, -8)": -2,
    "mulhi(0x80000000u, 6u)": 3,
    "insert_bits(0xffffu, 0x100u, 4, 8)": 0xF00F,
    "insert_bits(0u, 0xffffffffu, 0, 32) >> 31": 1,
    "extract_bits(short(0x0f80), 4, 8)": -8,
    "extract_bits(7u, 0, 0)": 0,
    "reverse_bits(uchar(3)) + (reverse_bits(1u) >> 28)": 0xC8,
    "rotate(uchar(0x81), uchar(9)) + rotate(5u, 32u)": 8,
    "clz(ushort(0)) + ctz(uchar(0)) + clz(long(1))": 16 + 8 + 63,
    "dot(select(float2(1, 2), float2(30, 40), bool2(false, true)), float2(1, 1))": 41,
    "(bfloat(3.0f) / 2.0f) + (6.0f / bfloat(2.0f)) * 8": 25.5,
    "(bfloat(3.0f) - 2.0f) + (7.0f - bfloat(2.0f)) * 8 + bfloat(3.0f) * 2.0f * 64 + (bfloat(3.0f) + 2.0f) * 512": 2985,
    "numeric_limits<int>::max() == INT_MAX && numeric_limits<int>::lowest() == INT_MIN": 1,
    "numeric_limits<ulong>::max() == ~ulong(0) && numeric_limits<ulong>::min() == 0": 1,
    "numeric_limits<short>::max() == 32767 && numeric_limits<short>::min() == -32768 && numeric_limits<bool>::max()": 1,
    "numeric_limits<int>::digits + numeric_limits<uchar>::digits + numeric_limits<half>::digits": 31 + 8 + 11,
    "numeric_limits<half>::max() + numeric_limits<half>::lowest() * 2.0f": -65504,
    "numeric_limits<half>::min() * 0x1p14f + numeric_limits<half>::epsilon() * 0x1p11f": 3,
    "numeric_limits<half>::denorm_min() * 0x1p24f + numeric_limits<bfloat>::epsilon() * 0x1p8f": 3,
    "isnan(numeric_limits<half>::quiet_NaN()) && isinf(numeric_limits<bfloat>::infinity())": 1,
}


def test_values():
    y = np.zeros(len(VALUES), np.float32)
    before = """
      template <class T> T tenth(T v) { return v * 0.1 + 0.7; }
      template <class T> T half_of(T v) { vec<T, 2> w(v, v); return (0.5 * w).x; }
      metal::array<float, 2> two(float v) { return {v, v}; }
      float sum(float4 v) { return v.x + v.y + v.z + v.w; }
      """
    run("\n".join(f"y[{n}] = float({e});" for n, e in enumerate(VALUES)), y, before=before, threads=1)
    for got, (text, expected) in zip(y, VALUES.items(), strict=True):
        assert got == np.float32(expected), (text, got, expected)


def test_swizzles_are_assigned():
    y = floats()[:4]
    run("float4 v = float4(1, 2, 3, 4); v.xy = v.wz; v.zw *= 2.0f; v.x += v.y; *(device float4*)y = v;", y, threads=1)
    np.testing.assert_array_equal(y, [7, 3, 6, 8])


def test_threadgroup_declarations():
    before = "template <int N> struct Tile { int v[N]; };\nconstant constexpr int kN = 32;\n"
    body = """
      alignas(16) threadgroup int a[kN] = {0}, b[2][kN + 1];
      threadgroup int scalar = 7;
      threadgroup Tile<kN> tile;
      threadgroup int* p = a;
      p[lane] = i; b[1][lane] = i * 2; tile.v[lane] = i * 3;
      if (lane == 0) scalar = 5;
      threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
      y[i] = a[lane ^ 1] + b[1][lane ^ 2] + tile.v[lane ^ 3] + scalar;"""
    i = np.arange(32)
    y = run(body, np.zeros(32, np.int32), before=before)
    np.testing.assert_array_equal(y, (i ^ 1) + (i ^ 2) * 2 + (i ^ 3) * 3 + 5)


def test_tables_and_function_constants():
    before = "constant float table[4] = {1, 2, 4, 8};\nconstant bool doubled [[function_constant(3)]];\n"
    for value in (False, True):
        y = run("y[i] = table[i & 3] * (doubled ? 2 : 1);", floats(), before=before, constants={3: value})
        np.testing.assert_array_equal(y, 2.0 ** (np.arange(32) & 3) * (1 + value))


def test_entries_by_host_name_and_template_arguments():
    source = kernels.HEADER + (
        "template <typename T, int n> [[kernel]] void scale(device T* y [[buffer(0)]], uint i [[thread_position_in_grid]])"
        " { y[i] *= n; }\n"
        'template [[host_name("scale_half")]] [[kernel]] decltype(scale<half, 3>) scale<half, 3>;\n'
        'template [[host_name("scale_" "float" "_7")]] [[kernel]] void scale<float, 7>(device float* y [[buffer(0)]],'
        " uint i [[thread_position_in_grid]]);\n"
    )
    for entry, dtype, factor in (
        ("scale_half", np.float16, 3), ("scale<float, 5>", np.float32, 5), ("scale_float_7", np.float32, 7)
    ):  # fmt: skip
        y = np.ones(32, dtype)
        execute_msl(source, entry, [y], grid=(1, 1, 1), threads=(32, 1, 1))
        assert (y == factor).all()


def test_array_parameters_constants_and_traits():
    source = kernels.HEADER + (
        "template <class T> constexpr constant bool is_word = _disjunction<is_same<T, int>, is_same<T, float>>::value;\n"
        "kernel void f(device float* y, constant const float factors[3], constant float& last,"
        " uint i [[thread_position_in_grid]]) {"
        " y[i] = factors[i % 3] * M_LN10_F + last * (is_word<float> && !is_word<half>) + float(M_SQRT1_2_H); }"
    )
    y, factors = np.zeros(6, np.float32), np.array([1, 2, 4], np.float32)
    execute_msl(source, "f", [y, factors, np.array([8], np.float32)], grid=(1, 1, 1), threads=(6, 1, 1))
    np.testing.assert_allclose(y, np.tile(factors, 2) * np.log(10) + 8 + np.float32(np.float16(0.5**0.5)), rtol=1e-6)


def test_positions():
    """What a thread is told of where it stands, with extents that are all different."""
    grid, threads = (2, 3, 4), (5, 3, 3)
    told = ["thread_position_in_threadgroup", "threadgroup_position_in_grid", "thread_position_in_grid", "threads_per_grid"]
    told += ["threadgroups_per_grid", "threads_per_threadgroup", "dispatch_threads_per_threadgroup"]
    alone = ["thread_index_in_threadgroup", "simdgroup_index_in_threadgroup", "thread_index_in_simdgroup"]
    alone += ["quadgroup_index_in_threadgroup", "thread_index_in_quadgroup", "simdgroups_per_threadgroup"]
    alone += ["quadgroups_per_threadgroup", "threads_per_simdgroup", "thread_execution_width"]
    alone += ["dispatch_simdgroups_per_threadgroup", "dispatch_quadgroups_per_threadgroup"]
    parameters = [f"{'ushort3' if i % 2 else 'uint3'} a{i} [[{name}]]" for i, name in enumerate(told)]
    parameters += [f"{'ushort' if i % 2 else 'uint'} b{i} [[{name}]]" for i, name in enumerate(alone)]
    values = [f"a{i}.{axis}" for i in range(len(told)) for axis in "xyz"] + [f"b{i}" for i in range(len(alone))]
    source = (
        f"kernel void f(device int* y [[buffer(0)]], {', '.join(parameters)}, uint2 flat [[thread_position_in_grid]]) {{\n"
        f"int at = ((a2.z * 9 + a2.y) * 10 + a2.x) * {len(values) + 1};\n"
        + "".join(f"y[at++] = {value};\n" for value in values)
        + "y[at] = flat.y * 10 + flat.x; }\n"
    )
    y = np.full((12, 9, 10, len(values) + 1), -1, np.int32)
    report = execute_msl(kernels.HEADER + source, "f", [y], grid=grid, threads=threads)
    assert report.findings == (), str(report)
    for z, yy, x in np.ndindex(12, 9, 10):
        thread, group = (x % 5, yy % 3, z % 3), (x // 5, yy // 3, z // 3)
        index = (thread[2] * 3 + thread[1]) * 5 + thread[0]
        expected = [*thread, *group, x, yy, z, 10, 9, 12, *grid, *threads, *threads]
        expected += [index, index // 32, index % 32, index // 4, index % 4, 2, 12, 32, 32, 2, 12, yy * 10 + x]
        assert y[z, yy, x].tolist() == expected


def test_atomics():
    body = """
      device atomic_int* a = (device atomic_int*)y;
      atomic_fetch_add_explicit(&a[0], 2, memory_order_relaxed);
      atomic_fetch_min_explicit(&a[1], int(i), memory_order_relaxed);
      atomic_fetch_max_explicit(&a[2], int(i), memory_order_relaxed);
      atomic_fetch_or_explicit(&a[3], int(i), memory_order_relaxed);
      atomic_fetch_and_explicit(&a[4], int(i), memory_order_relaxed);
      atomic_fetch_xor_explicit(&a[5], int(i), memory_order_relaxed);
      atomic_fetch_sub_explicit(&a[6], 1, memory_order_relaxed);
      atomic_fetch_max_explicit(&a[8], int(i), memory_order_relaxed);
      atomic_fetch_min_explicit(&a[9], int(i), memory_order_relaxed);
      if (i == 5)
        atomic_store_explicit(&a[11], atomic_exchange_explicit(&a[10], 7, memory_order_relaxed), memory_order_relaxed);
      int seen = atomic_load_explicit(&a[7], memory_order_relaxed);
      while (!atomic_compare_exchange_weak_explicit(&a[7], &seen, seen + 1, memory_order_relaxed, memory_order_relaxed)) {}"""
    y = np.array([0, 99, -1, 0, 255, 0, 0, 0, 99, -9, 3, 0], np.int32)
    run(body, y)
    np.testing.assert_array_equal(y, [64, 0, 31, 31, 0, 0, -32, 32, 99, -9, 7, 3])


def test_partial_simdgroup():
    y = np.zeros(40, np.int32)
    run("y[i] = simd_sum(1);", y, threads=40)
    np.testing.assert_array_equal(y, [32] * 32 + [8] * 8)


def test_buffers_without_an_index_take_the_free_ones_in_order():
    source = kernels.HEADER + (
        "kernel void f(constant float& s, device float* y [[buffer(0)]], device const float* x [[buffer(2)]],"
        " device const float* z, uint i [[thread_position_in_grid]]) { y[i] = s * x[i] + z[i]; }"
    )
    y, x, z = floats(), np.arange(32, dtype=np.float32), np.ones(32, np.float32)
    execute_msl(source, "f", [y, np.array([3], np.float32), x, z], grid=(1, 1, 1), threads=(32, 1, 1))
    np.testing.assert_array_equal(y, 3 * x + 1)


def test_initialiser_of_threadgroup_memory_is_no_write():
    source = kernels.HEADER + (
        "kernel void f(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {"
        " threadgroup float a[32] = {0}, b[2] = {1, 2};\n if (i < 2) b[i] = 5;\n"
        " threadgroup_barrier(mem_flags::mem_threadgroup);\n y[i] = a[i] + b[1]; }"
    )
    report = execute_msl(source, "f", [floats()], grid=(1, 1, 1), threads=(32, 1, 1))
    assert [(f.kind, "'a'" in f.message) for f in report.findings] == [("uninitialised", True)]


def test_a_launch_of_no_threadgroups_writes_nothing():
    y = np.full(32, 7, np.float32)
    report = execute_msl(kernels.HEADER + "kernel void f(device float* y [[buffer(0)]]) { y[0] = 1; }", "f", [y],
                         grid=(4, 0, 1), threads=(32, 1, 1))  # fmt: skip
    assert (y == 7).all()
    assert report.counts.device_bytes_written == 0
    assert report.findings == ()

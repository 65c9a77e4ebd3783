"""Floats that C lacks, exact on the CPU: every code decoded, every half encoded, codes moved whole, operations rounded once."""

import numpy as np
import pytest
import torch
from cpu.run import compile_c

from tilelang_ext import formats, quantization
from tilelang_ext import language as T
from tilelang_ext.formats import E8M0

EIGHT_BITS = {format.dtype: format for format in (*formats.FP8_OPERANDS, E8M0)}
HALVES = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
IEEE = ("float16", "bfloat16")


def same_bits(actual, expected):
    """Equal to the bit, zeros' signs too; any NaN for a NaN."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual.isnan(), expected.isnan())
    np.testing.assert_array_equal(actual[~actual.isnan()].view(bits), expected[~expected.isnan()].view(bits))


def convert(size, source, target):
    @T.prim_func
    def kernel(x: T.Tensor((size,), source), y: T.Tensor((size,), target)):
        with T.Kernel(T.ceildiv(size, 256), threads=128) as block:
            x_f, y_f = T.alloc_fragment((256,), source), T.alloc_fragment((256,), target)
            T.copy(x[block * 256], x_f)
            for i in T.Parallel(256):
                y_f[i] = T.cast(x_f[i], target)
            T.copy(y_f, y[block * 256])

    return compile_c(kernel)


def any_floats(size=65536, seed=0):
    """Every exponent of float32, infinities, NaNs and subnormals too: random bits."""
    bits = torch.randint(-(2**31), 2**31, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.int64)
    return bits.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_every_code_is_decoded_and_moved_whole(dtype):
    @T.prim_func
    def kernel(codes: T.Tensor((256,), dtype), values: T.Tensor((256,), "float32"), moved: T.Tensor((300,), dtype)):
        with T.Kernel(1, threads=128) as _:
            tile = T.alloc_fragment((300,), dtype)
            T.copy(codes, tile[0:256])
            for i in T.Parallel(256):
                values[i] = T.cast(tile[i], "float32")
            for i in T.Parallel(300):
                moved[i] = T.if_then_else(i < 256, tile[i], T.cast(1.0, dtype))

    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    values, moved = torch.full((256,), -7.0), torch.zeros(300, dtype=torch.uint8).view(codes.dtype)
    compile_c(kernel)(codes, values, moved)
    format = EIGHT_BITS[dtype]
    same_bits(values, torch.tensor([format.decode(code) for code in range(256)], dtype=torch.float64).float())
    assert moved.view(torch.uint8)[:256].tolist() == list(range(256))
    assert moved.view(torch.uint8)[256:].tolist() == [format.values.index(1.0)] * 44


def nearest_code(values, format):
    if format is not E8M0:
        return quantization.encode(values, format)
    # The nearest power of two, a tie going up: what lies below 1.5 * 2^e goes down.
    magnitude = values.double().abs()
    fraction, exponent = torch.frexp(magnitude)
    code = (exponent - 1 + (fraction >= 0.75).int() + format.bias).clamp(0, 254)
    code = torch.where(magnitude < 2.0**-127, 0, code)
    return torch.where(magnitude.isfinite(), code, 255).to(torch.uint8)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_every_half_and_any_float_is_encoded(dtype):
    format = EIGHT_BITS[dtype]
    for source, values in (("float16", HALVES), ("float32", any_floats())):
        codes = torch.zeros(65536, dtype=torch.uint8).view(getattr(torch, dtype))
        convert(65536, source, dtype)(values, codes)
        np.testing.assert_array_equal(codes.view(torch.uint8), nearest_code(values, format))


@pytest.mark.parametrize("dtype", IEEE)
def test_16_bit_floats_are_decoded_and_encoded(dtype):
    """As torch does, which rounds to nearest even."""
    torch_dtype = getattr(torch, dtype)
    every = HALVES.view(torch_dtype)
    values = torch.zeros(65536)
    convert(65536, dtype, "float32")(every, values)
    same_bits(values, every.float())
    floats, codes = any_floats(seed=1), torch.zeros(65536, dtype=torch_dtype)
    floats[:32768] = torch.randn(32768, generator=torch.Generator().manual_seed(2)) * torch.exp2(
        torch.arange(32768) % 40 - 28.0
    )
    convert(65536, "float32", dtype)(floats, codes)
    same_bits(codes, floats.to(torch_dtype))


def test_a_double_is_rounded_once():
    """Halfway between two bfloat16, and a bit more than a float32 can tell."""
    halfway = 1.0 + 2.0**-8
    doubles = torch.tensor(
        [halfway, halfway + 2.0**-40, halfway - 2.0**-40, -halfway - 2.0**-40, 1e300, 0.0], dtype=torch.float64
    )
    result = torch.zeros(6, dtype=torch.bfloat16)
    convert(6, "float64", "bfloat16")(doubles, result)
    assert result.tolist() == [1.0, 1.0 + 2.0**-7, 1.0, -1.0 - 2.0**-7, float("inf"), 0.0]
    integers = torch.tensor([2**24 + 2**16 + 1, 2**24 + 2**16, -(2**24) - 2**16 - 1], dtype=torch.int32)
    result = torch.zeros(3, dtype=torch.bfloat16)
    convert(3, "int32", "bfloat16")(integers, result)
    assert result.tolist() == [2.0**24 + 2**17, 2.0**24, -(2.0**24) - 2**17]


@pytest.mark.parametrize("dtype", IEEE)
def test_operations_round_to_their_type(dtype):
    """Each operation is rounded, as in torch, and not only the last; the smaller of two and a comparison are exact."""
    n = 4096

    @T.prim_func
    def kernel(a: T.Tensor((n,), dtype), b: T.Tensor((n,), dtype), c: T.Tensor((5, n), dtype)):
        with T.Kernel(1, threads=128) as _:
            c_f = T.alloc_fragment((5, n), dtype)
            for i in T.Parallel(n):
                c_f[0, i] = (a[i] + b[i]) * b[i]
                c_f[1, i] = a[i] / b[i] - a[i]
                c_f[2, i] = T.exp(a[i])
                c_f[3, i] = T.min(a[i], b[i])
                c_f[4, i] = T.if_then_else(a[i] < b[i], T.cast(T.cast(a[i], "float32") * 1.01, dtype), T.max(b[i], -a[i]))
            T.copy(c_f, c)

    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(n, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    c = torch.full((5, n), torch.nan).to(a.dtype)
    compile_c(kernel)(a, b, c)
    expected = [(a + b) * b, a / b - a, a.exp(), a.minimum(b)]
    expected.append(torch.where(a < b, (a.float() * 1.01).to(a.dtype), b.maximum(-a)))
    for got, want in zip(c, expected, strict=True):
        same_bits(got, want)


def test_constants_are_exact():
    """The code generator prints seven digits of a constant; these need more."""
    single, double = 0.1234567891, -0.12345678912345678

    @T.prim_func
    def kernel(x: T.Tensor((1,), "float8_e5m2"), y: T.Tensor((3,), "float32"), z: T.Tensor((1,), "float64")):
        with T.Kernel(1, threads=32) as _:
            y[0] = T.cast(x[0], "float32") * T.float32(single)
            y[1] = T.cast(x[0], "float32") * T.float32(2.0**-149)
            y[2] = T.max(T.cast(x[0], "float32"), T.infinity("float32"))
            z[0] = T.cast(x[0], "float64") * T.float64(double)

    y, z = torch.zeros(3), torch.zeros(1, dtype=torch.float64)
    compile_c(kernel)(torch.ones(1).to(torch.float8_e5m2), y, z)
    assert y.tolist() == torch.tensor([single, 2.0**-149, torch.inf]).tolist()
    assert z.item() == double

"""Narrow floats in generated Metal text: every code decoded, every half encoded, bit for bit against torch."""

import pytest
import torch

from tilelang_ext import language as T
from tilelang_ext import simulate
from tilelang_ext.metal.program import lower
from tilelang_ext.simulator import execute_msl

# largest finite value, for the saturation that torch's casts lack
FLOAT8 = {"float8_e4m3fn": 448, "float8_e5m2": 57344, "float8_e4m3fnuz": 240, "float8_e5m2fnuz": 57344}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


WIDTHS = [0, 1, 2, 4, 8, 16]


def convert(n: int, source: str, target: str, widths: list[int]):
    """C[k] = A.astype(target), widths[k] elements at a time by one thread, or for 0 as T.Parallel vectorises it.

    One kernel for all widths: most of the time that a small kernel takes in the simulator is the same for any.
    """

    @T.macro
    def convert_one(A, C, k, lanes):
        if lanes == 0:
            for i in T.Parallel(n):
                C[k, i] = A[i].astype(target)
        else:
            tx = T.get_thread_binding()
            if tx == 0:
                for i in T.serial(n // lanes):
                    for j in T.vectorized(lanes):
                        C[k, i * lanes + j] = A[i * lanes + j].astype(target)

    def convert_at_every_width(A, C):
        for k, lanes in enumerate(widths):
            convert_one(A, C, k, lanes)

    @T.prim_func
    def kernel(
        A: T.Tensor((n,), source),
        C: T.Tensor((len(widths), n), target),
    ):
        with T.Kernel(1, threads=32):
            convert_at_every_width(A, C)

    return kernel


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor):
    """Equal values and signs, NaN where the other has NaN."""
    a, e = actual.float(), expected.float()
    same = (a == e) & (torch.signbit(a) == torch.signbit(e)) | (a.isnan() & e.isnan())
    assert same.all(), f"first at {int((~same).nonzero()[0])}: {a[~same][0]} instead of {e[~same][0]}"


def run(kernel, *arguments):
    report = simulate(lower(kernel), *arguments)
    assert report.findings == ()


def all_codes(dtype: str) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", [*FLOAT8, "float8_e8m0fnu"])
def test_decode_all_codes_at_every_width(source, target):
    codes = all_codes(source)
    values = torch.full((len(WIDTHS), 256), -1.0).to(getattr(torch, target))
    run(convert(256, source, target, WIDTHS), codes, values)
    assert_same_bits(values, codes.float().to(values.dtype).expand_as(values))


@pytest.mark.parametrize("target", FLOAT8)
def test_encode_all_halves(target):
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    codes = torch.zeros(1, 65536, dtype=torch.uint8).view(getattr(torch, target))
    run(convert(65536, "float16", target, [0]), halves, codes)
    largest = FLOAT8[target]
    expected = torch.where(halves.isnan(), halves.float(), halves.float().clamp(-largest, largest)).to(codes.dtype)
    assert_same_bits(codes[0], expected)


@pytest.mark.parametrize("target", FLOAT8)
def test_encode_every_width(target):
    # ties between codes, just above and below them, subnormals, and values past the largest
    values = torch.tensor([0.0, -0.0, 1.0625, 1.0624, -1.1875, 17.0, 19.0, 2.0**-9, 2.0**-10, 3e-3, -1e-6, 1e9] + [464.0] * 4)
    codes = torch.zeros(5, 16, dtype=torch.uint8).view(getattr(torch, target))
    run(convert(16, "float32", target, WIDTHS[1:]), values, codes)
    assert_same_bits(codes, values.clamp(-FLOAT8[target], FLOAT8[target]).to(codes.dtype).expand_as(codes))


def test_encode_e8m0_rounds_and_saturates():
    values = torch.tensor([1.0, 1.49, 1.5, 1.51, 3.0, 2.0**-127, 2.0**-149, 3e38, 0.0, float("nan"), -4.0, 2.0**-126 * 1.5])
    codes = torch.zeros(1, 12, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    run(convert(12, "float32", "float8_e8m0fnu", [1]), values, codes)
    assert codes.view(torch.uint8)[0].tolist() == [127, 127, 128, 128, 129, 0, 0, 254, 0, 255, 129, 2]


def run_packed(kernel, *arguments):
    """Run with FP4 tensors given as packed bytes, which no torch dtype of matching shape exists for."""
    program = lower(kernel)
    report = execute_msl(program.source, program.name, list(arguments), grid=(1, 1, 1), threads=(32, 1, 1))
    assert report.findings == ()


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
def test_decode_e2m1(target):
    codes = torch.cat([torch.arange(16), torch.arange(16).flip(0)]).repeat(2)
    packed = (codes[0::2] | (codes[1::2] << 4)).to(torch.uint8)
    values = torch.zeros(7, 64, dtype=getattr(torch, target))
    run_packed(convert(64, "float4_e2m1fn", target, [*WIDTHS, 32]), packed, values)
    assert_same_bits(values, E2M1[codes].expand(7, 64))


def test_encode_e2m1():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected_of_ties = torch.tensor([0.0, 1, 1, 2, 2, 4, 4])
    above, below = torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)
    values = torch.cat([ties, -ties, above, below, torch.tensor([100.0, -100.0, 6.0, -0.0])])
    expected = torch.cat([expected_of_ties, -expected_of_ties, E2M1[1:8], E2M1[:7], torch.tensor([6.0, -6.0, 6.0, -0.0])])
    values, expected = values.repeat(2), expected.repeat(2)
    widths = [0, 2, 4, 8, 16, 32]
    packed = torch.zeros(len(widths), 32, dtype=torch.uint8)
    run_packed(convert(64, "float32", "float4_e2m1fn", widths), values, packed)
    codes = torch.stack([packed & 15, packed >> 4], 2).flatten(1).long()
    assert_same_bits(E2M1[codes], expected.expand(len(widths), 64))


def test_e2m1_single_stores_would_race():
    with pytest.raises(ValueError, match="C: a float4_e2m1fn element outside registers is half a byte"):
        lower(convert(64, "float32", "float4_e2m1fn", [1]))


@pytest.mark.parametrize("target", FLOAT8)
def test_constants_are_encoded_by_the_compiler(target):
    values = [0.0, 1.0, 3.3, 0.001, 1e-5, 239.0]

    @T.macro
    def fill_one(C, k, value):
        for i in T.Parallel(32):
            C[k, i] = T.float32(value).astype(target)

    def fill_each(C):
        for k, value in enumerate(values):
            fill_one(C, k, value)

    @T.prim_func
    def fill(C: T.Tensor((len(values), 32), target)):
        with T.Kernel(1, threads=32):
            fill_each(C)

    codes = torch.zeros(len(values), 32, dtype=torch.uint8).view(getattr(torch, target))
    run(fill, codes)
    assert_same_bits(codes, torch.tensor(values)[:, None].expand(-1, 32).to(codes.dtype))


def test_arithmetic_on_codes_is_refused():
    @T.prim_func
    def add(A: T.Tensor((32,), "float8_e4m3fn")):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(32):
                A[i] = A[i] + A[i]

    with pytest.raises(TypeError, match=r"float8_e4m3fn: is stored on Metal, not computed with; .* cast them to"):
        lower(add)


def test_decoding_reads_no_table():
    source = lower(convert(256, "float8_e4m3fn", "float16", [0])).source
    assert "constant" not in source
    assert "half4 e4m3fn_to_half(uchar4 code)" in source, "four codes at a time"

"""HIP: tile programs and texts compute what they say on every architecture, whatever the order of their threads."""

import numpy as np
import pytest
import torch
from numeric import assert_close
from simulator.hip_kernels import ARCHS, attention, cast, gemm, operands, row_statistics, scale_rows, target
from simulator.hip_texts import HEADER, HISTOGRAM, ROW_SUM, TEMPLATE_GEMM, run, run_gemm

from tilelang_ext import language as T
from tilelang_ext import simulate

FP16 = {
    "gfx90a": "mfma_f32_16x16x16f16",
    "gfx942": "mfma_f32_16x16x16f16",
    "gfx950": "mfma_f32_16x16x32_f16",
    "gfx1100": "wmma_f32_16x16x16_f16_w32",
    "gfx1201": "wmma_f32_16x16x16_f16_w32_gfx12",
}


def check(kernel, arguments, arch, **options):
    report = simulate(kernel, *arguments, target=target(arch), **options)
    assert not report.findings, str(report)
    return report


@pytest.mark.parametrize("arch", ARCHS)
def test_gemm_fp16(arch):
    a, b, c, expected = operands(64, 64, 96, "float16")
    report = check(gemm(64, 64, 96, "float16"), (a, b, c), arch)
    assert_close(c, expected, dtype="float32")
    K = 32 if arch == "gfx950" else 16
    assert report.instructions == {FP16[arch]: 4 * 4 * 96 // K}
    assert report.counts.mma == 8 * 8 * 12


@pytest.mark.parametrize("arch", ARCHS)
def test_gemm_bf16(arch):
    """Several groups, stages in flight, and tiles that end outside of the matrices."""
    a, b, c, expected = operands(80, 72, 128, "bfloat16")
    check(gemm(80, 72, 128, "bfloat16", num_stages=2), (a, b, c), arch)
    assert_close(c, expected, dtype="float32")


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100", "gfx1201"])
def test_gemm_untransposed(arch):
    a, b, c, expected = operands(64, 64, 64, "float16")
    check(gemm(64, 64, 64, "float16", trans_B=False), (a, b.T.contiguous(), c), arch)
    assert_close(c, expected, dtype="float32")


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_gemm_int8(arch):
    a, b, c, expected = operands(64, 64, 64, "int8", "int32")
    check(gemm(64, 64, 64, "int8", accum="int32"), (a, b, c), arch)
    assert torch.equal(c.double(), expected)


@pytest.mark.parametrize(("arch", "dtype"), [("gfx942", "float8_e4m3fnuz"), ("gfx950", "float8_e4m3fn")])
def test_gemm_fp8(arch, dtype):
    """Each flavour on the unit that reads it; testing/rocm/test_values.py has more pairs of types and architectures."""
    a, b, c, expected = operands(64, 64, 64, dtype)
    check(gemm(64, 64, 64, dtype), (a, b, c), arch)
    assert_close(c, expected, dtype="float32")


@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "gfx1100", "gfx1201"])
def test_attention(arch):
    """Chained products with reductions over rows between them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, 64, generator=generator).half() for rows in (64, 128, 128))
    o = torch.full((64, 64), torch.nan)
    check(attention("float16"), (q, k, v, o), arch)
    expected = torch.softmax(q.double() @ k.double().T, 1) @ v.double()
    assert_close(o, expected, dtype="float16")  # its probabilities are rounded to half


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_reductions_across_waves(arch):
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    total, most, least = (torch.full((4,), torch.nan) for _ in range(3))
    report = check(row_statistics(), (x, total, most, least), arch)
    assert_close(total, x.double().sum(1), dtype="float32")
    assert torch.equal(most, x.amax(1))
    assert torch.equal(least, x.amin(1))
    assert report.counts.shuffles > 0


@pytest.mark.parametrize(("arch", "flavour"), [("gfx942", "fnuz"), ("gfx950", "")])
@pytest.mark.parametrize("dtype", ["float8_e4m3", "float8_e5m2"])
def test_casts_to_fp8(arch, flavour, dtype):
    """Every half in the format's range, to nearest even; beyond, values saturate."""
    name = dtype + (flavour or ("fn" if "e4m3" in dtype else ""))
    fp8 = getattr(torch, name)
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    x = x[torch.isfinite(x)]
    x = x[: x.numel() // 64 * 64].contiguous()
    y = torch.zeros(x.numel(), dtype=torch.uint8).view(fp8)
    tilelang_name = name if flavour or "e4m3" in dtype else "float8_e5m2"
    check(cast(x.numel(), "float32", tilelang_name), (x, y), arch, check=False)
    largest = torch.finfo(fp8).max
    expected = x.clamp(-largest, largest).to(fp8)
    assert torch.equal(y.float(), expected.float())


def test_cast_to_bf16():
    """To nearest even, NaN stays NaN: every upper half of a float, with lower halves below, at and above the middle."""
    lower = torch.tensor([0, 0x7FFF, 0x8000, 0x8001], dtype=torch.int32)
    bits = (torch.arange(0, 65536, 7, dtype=torch.int32)[:, None] << 16 | lower).reshape(-1)
    x = bits[: bits.numel() // 64 * 64].clone().view(torch.float32)
    y = torch.zeros(x.numel(), dtype=torch.bfloat16)
    check(cast(x.numel(), "float32", "bfloat16"), (x, y), "gfx942", check=False)
    expected = x.bfloat16()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[~y.isnan()], expected[~y.isnan()])


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_symbolic_extents_and_numbers(arch):
    for rows in (1, 5):
        x, y = torch.randn(rows, 96), torch.full((rows, 96), torch.nan)
        check(scale_rows(), (x, 2.5, y), arch)
        assert torch.equal(y, 2.5 * x)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("check", [False, True])
def test_order_of_threads_does_not_matter(seed, check):
    report, c, expected = run_gemm(seed=seed, check=check)
    assert_close(c, expected, dtype="float32")
    assert report.checked == check
    assert report.counts.mma == 512


def test_counts():
    report, _, _ = run_gemm()
    counts = report.counts
    assert report.instructions == {"mfma_f32_16x16x16f16": 4 * 4 * 4}
    assert counts.device_bytes_read == 2 * 64 * 64 * 2
    assert counts.device_bytes_written == 64 * 64 * 4
    assert counts.threadgroup_bytes_written == 2 * 64 * 64 * 2
    # each of 2 waves reads 2 tiles of A and 4 of B, of 16 x 16, for each of 4 steps of k
    assert counts.threadgroup_bytes_read == 2 * 4 * 6 * 256 * 2
    assert counts.threadgroup_barriers == 2 * 2
    assert report.threadgroup_memory == 2 * 64 * 32 * 2


@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
def test_templates_across_waves(arch):
    x, y = torch.randn(3, 256), torch.full((3,), torch.nan)
    report = run(ROW_SUM, "row_sum", [x, y, 0.25], arch=arch, grid=3, threads=256)
    assert report.findings == ()
    assert_close(y, x.double().sum(1) + 0.25, dtype="float32")
    waves, inside = (4, 6) if arch == "gfx942" else (8, 5)
    assert report.counts.shuffles == 3 * waves * inside


@pytest.mark.parametrize("arch", ["gfx90a", "gfx950"])
def test_templates_of_products_and_scans(arch):
    a, b = (torch.randn(64, 32).half() for _ in range(2))
    for operand in (a, b):
        operand[operand.abs() < 2.0**-14] = 0  # gfx90a reads subnormal operands as zero
    registers, sums = torch.full((2, 64, 2, 4, 4), torch.nan), torch.full((128,), torch.nan)
    report = run(TEMPLATE_GEMM, "gemm", [a, b, registers, sums], arch=arch, threads=128)
    assert report.findings == ()
    assert report.instructions == {"mfma_f32_16x16x16f16": 32}
    # wave, lane / 16, lane % 16, tile of rows and columns, element -> rows by wave, tile, lane % 16
    c = registers.reshape(2, 4, 16, 2, 4, 4).permute(0, 3, 2, 4, 1, 5).reshape(64, 64)
    assert_close(c, a.double() @ b.double().T, dtype="float32")
    assert torch.equal(sums, torch.arange(1.0, 129.0))


@pytest.mark.parametrize("workers", [1, 2])
def test_atomics(workers):
    x = torch.randint(0, 100, (256,), dtype=torch.int32)
    bins, total, most = torch.zeros(16, dtype=torch.int32), torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    report = run(HISTOGRAM, "histogram", [x, bins, total, most], grid=4, workers=workers)
    assert report.findings == ()
    assert bins.tolist() == np.bincount(x.numpy() & 15, minlength=16).tolist()
    assert (total.item(), most.item()) == (x.sum().item(), x.max().item())


def test_complement_of_vectors():
    """HIP's integer vectors have it as an operator, for each lane."""
    source = (
        HEADER
        + """
extern "C" __global__ void complement(const int* x, int* y) {
  const int i = threadIdx.x * 8;
  *(int4*)(y + i) = ~*(const int4*)(x + i);
  *(int2*)(y + i + 4) = ~*(const int2*)(x + i + 4);
  *(uchar4*)(y + i + 6) = ~*(const uchar4*)(x + i + 6);
  *(ushort2*)(y + i + 7) = ~*(const ushort2*)(x + i + 7);
}
"""
    )
    x = torch.randint(-(2**31), 2**31, (64 * 8,), generator=torch.Generator().manual_seed(0)).int()
    y = torch.zeros_like(x)
    assert run(source, "complement", [x, y]).findings == ()
    assert torch.equal(y, ~x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_order_of_narrow_floats_and_more_of_libm(dtype):
    """`max` and `min` of any one type, as clang's HIP headers have them."""

    @T.prim_func
    def kernel(
        A: T.Tensor((64,), dtype),
        B: T.Tensor((64,), dtype),
        C: T.Tensor((3, 64), dtype),
        x: T.Tensor((64,), "float32"),
        y: T.Tensor((5, 64), "float32"),
    ):
        with T.Kernel(1, threads=64):
            for i in T.Parallel(64):
                C[0, i] = T.max(A[i], B[i])
                C[1, i] = T.min(A[i], B[i])
                C[2, i] = T.clamp(A[i], T.cast(-1.0, dtype), T.cast(1.0, dtype))
                y[0, i] = T.asinh(x[i])
                y[1, i] = T.acosh(x[i])
                y[2, i] = T.atanh(1.0 / (1.0 + x[i]))
                y[3, i] = T.hypot(x[i], 2.0)
                y[4, i] = T.nextafter(x[i], 0.0)

    A, B = (torch.randn(64).to(getattr(torch, dtype)) for _ in range(2))
    x, C, y = torch.rand(64) + 1, torch.zeros(3, 64).to(A.dtype), torch.zeros(5, 64)
    check(kernel, (A, B, C, x, y), "gfx942")
    assert torch.equal(C, torch.stack([torch.maximum(A, B), torch.minimum(A, B), A.clamp(-1, 1)]))
    wide = x.double()
    expected = torch.stack([wide.asinh(), wide.acosh(), (1 / (1 + wide)).atanh(), torch.hypot(wide, torch.full_like(wide, 2))])
    assert_close(y[:4], expected, dtype="float32")
    assert torch.equal(y[4], torch.nextafter(x, torch.zeros(64)))


def test_atomics_that_return_the_value_before():
    """Upstream's templates lack two of the functions that its generator calls; threads come in any order."""

    @T.prim_func
    def kernel(C: T.Tensor((2,), "int32"), D: T.Tensor((2, 64), "int32")):
        with T.Kernel(1, threads=64):
            for i in T.Parallel(64):
                D[0, i] = T.atomic_max(C[0], i * 37 % 64, return_prev=True)
                D[1, i] = T.atomic_min(C[1], i * 37 % 64, return_prev=True)

    C, D = torch.tensor([-1, 64], dtype=torch.int32), torch.zeros(2, 64, dtype=torch.int32)
    check(kernel, (C, D), "gfx942")
    assert C.tolist() == [63, 0]
    values = torch.arange(64) * 37 % 64
    for row, start, best in ((0, -1, torch.maximum), (1, 64, torch.minimum)):
        before = D[row].long()
        assert (before == start).sum() == 1, "one thread was the first"
        after = best(before, values)
        assert set(before.tolist()) <= {start, *after.tolist()}, "each thread saw what another had left"
        assert after.max() == 63 if row == 0 else after.min() == 0

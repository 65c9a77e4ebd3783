"""The rest of the language on Metal: scalar arguments, alloc_var, atomics, bytes and bit operations, dynamic extents."""

import pytest
import torch
from metal.kernels import poisoned, random_tensor
from numeric import assert_close

from tilelang_ext import language as T
from tilelang_ext import simulate

SCALARS = [
    ("bool", True, False),
    ("int8", -128, 127),
    ("int32", -(2**31), 2**31 - 1),
    ("int64", -(2**63), 2**63 - 1),
    ("float16", 0.5, -65504.0),
    ("float32", 1e30, -3.25),
]


@pytest.mark.parametrize(("dtype", "first", "second"), SCALARS, ids=[s[0] for s in SCALARS])
def test_scalar_arguments(dtype, first, second):
    """Two scalars of a type, so that a wrong slot size is seen."""

    @T.prim_func
    def kernel(a: T.dtype(dtype), b: T.dtype(dtype), out: T.Tensor((2,), dtype)):
        with T.Kernel(1, threads=32) as _:
            tx = T.get_thread_binding()
            if tx == 0:
                out[0] = a
                out[1] = b

    torch_dtype = getattr(torch, dtype)
    out = torch.zeros(2, dtype=torch_dtype)
    report = simulate(kernel, first, second, out)
    assert not report.findings, str(report)
    assert torch.equal(out, torch.tensor([first, second], dtype=torch_dtype))


def test_all_scalar_types_in_one_kernel():
    @T.prim_func
    def kernel(
        flag: T.bool, n8: T.int8, h: T.float16, n32: T.int32, x: T.float32, n64: T.int64, out: T.Tensor((6,), "float32")
    ):
        with T.Kernel(1, threads=32) as _:
            tx = T.get_thread_binding()
            if tx == 0:
                out[0] = T.if_then_else(flag, 1.0, 0.0)
                out[1] = T.cast(n8, "float32")
                out[2] = T.cast(h, "float32")
                out[3] = T.cast(n32, "float32")
                out[4] = x
                out[5] = T.cast(n64, "float32")

    out = poisoned((6,), "float32")
    report = simulate(kernel, True, -7, 1.5, -70000, 2.25, 2**40, out)
    assert not report.findings, str(report)
    assert out.tolist() == [1.0, -7.0, 1.5, -70000.0, 2.25, 2.0**40]


def test_alloc_var():
    @T.prim_func
    def kernel(A: T.Tensor((32, 8), "float32"), out: T.Tensor((32,), "float32")):
        with T.Kernel(1, threads=32) as _:
            tx = T.get_thread_binding()
            total = T.alloc_var("float32")
            count = T.alloc_var("int32", init=3)
            total = 0.0
            for k in T.serial(8):
                if A[tx, k] > 0.0:
                    total += A[tx, k]
                    count += 1
            out[tx] = total + T.cast(count, "float32")

    A, out = random_tensor((32, 8), "float32", 0), poisoned((32,), "float32")
    report = simulate(kernel, A, out)
    assert not report.findings, str(report)
    positive = A.double().clamp(min=0)
    assert_close(out, (positive.sum(1) + (A > 0).sum(1) + 3).numpy(), dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_atomic_add(dtype):
    """Every threadgroup adds to the same elements."""

    @T.prim_func
    def kernel(A: T.Tensor((8, 64), dtype), out: T.Tensor((64,), dtype)):
        with T.Kernel(8, threads=64) as bx:
            for i in T.Parallel(64):
                T.atomic_add(out[i], A[bx, i])

    A = random_tensor((8, 64), "float32", 0) * 10
    A = A if dtype == "float32" else A.to(torch.int32)
    out = torch.ones(64, dtype=A.dtype)
    report = simulate(kernel, A, out)
    assert not report.findings, str(report)
    assert_close(out.float(), 1 + A.double().sum(0).numpy(), dtype="float32")


def test_split_k_by_atomic_add_of_a_fragment():
    """The accumulators of two threadgroups meet in one output."""

    @T.prim_func
    def kernel(A: T.Tensor((64, 128), "float16"), B: T.Tensor((128, 64), "float16"), C: T.Tensor((64, 64), "float32")):
        with T.Kernel(2, threads=128) as split:
            A_s = T.alloc_shared((64, 32), "float16")
            B_s = T.alloc_shared((32, 64), "float16")
            C_f = T.alloc_fragment((64, 64), "float32")
            T.clear(C_f)
            for k in T.serial(2):
                T.copy(A[0, split * 64 + k * 32], A_s)
                T.copy(B[split * 64 + k * 32, 0], B_s)
                T.gemm(A_s, B_s, C_f)
            for i, j in T.Parallel(64, 64):
                T.atomic_add(C[i, j], C_f[i, j])

    A, B, C = random_tensor((64, 128), "float16", 0), random_tensor((128, 64), "float16", 1), torch.zeros(64, 64)
    report = simulate(kernel, A, B, C)
    assert not report.findings, str(report)
    assert_close(C, A.double().numpy() @ B.double().numpy(), dtype="float32")


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_bytes_and_bit_operations(dtype):
    @T.prim_func
    def kernel(A: T.Tensor((256,), dtype), B: T.Tensor((256,), dtype), out: T.Tensor((5, 256), dtype)):
        with T.Kernel(1, threads=64) as _:
            for i in T.Parallel(256):
                out[0, i] = A[i] & B[i]
                out[1, i] = A[i] | B[i]
                out[2, i] = A[i] ^ B[i]
                out[3, i] = (A[i] << T.cast(1, dtype)) & T.cast(0x7E, dtype)
                out[4, i] = A[i] >> T.cast(4, dtype)

    torch_dtype = getattr(torch, dtype)
    A = torch.arange(256, dtype=torch.uint8).view(torch_dtype)
    B = torch.arange(256, dtype=torch.uint8).flip(0).roll(37).contiguous().view(torch_dtype)
    out = torch.full((5, 256), 77, dtype=torch_dtype)
    report = simulate(kernel, A, B, out)
    assert not report.findings, str(report)
    assert torch.equal(out, torch.stack([A & B, A | B, A ^ B, (A << 1) & 0x7E, A >> 4]))


def test_packed_nibbles_to_half():
    """What every 4-bit weight format has: two codes per byte, low nibble first."""

    @T.prim_func
    def kernel(packed: T.Tensor((64,), "uint8"), out: T.Tensor((128,), "float16")):
        with T.Kernel(1, threads=32) as _:
            for i in T.Parallel(128):
                out[i] = T.cast((packed[i // 2] >> T.cast(4 * (i % 2), "uint8")) & T.uint8(15), "float16")

    packed, out = torch.arange(64, dtype=torch.uint8) * 4 + 3, torch.full((128,), -1, dtype=torch.float16)
    report = simulate(kernel, packed, out)
    assert not report.findings, str(report)
    assert torch.equal(out, torch.stack([packed & 15, packed >> 4], 1).reshape(-1).half())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "float8_e4m3fn"])
def test_rows_of_every_vector_width(dtype):
    """A copy of rows whose length allows vectors of exactly this width keeps every bit."""
    widths = (1, 2, 3, 4, 6, 8, 16)
    w0, w1, w2, w3, w4, w5, w6 = widths

    @T.macro
    def copy(A, out, width):
        tx = T.get_thread_binding()
        for v in T.vectorized(width):
            out[tx, v] = A[tx, v]

    @T.prim_func
    def kernel(
        A0: T.Tensor((32, w0), dtype), out0: T.Tensor((32, w0), dtype), A1: T.Tensor((32, w1), dtype),
        out1: T.Tensor((32, w1), dtype), A2: T.Tensor((32, w2), dtype), out2: T.Tensor((32, w2), dtype),
        A3: T.Tensor((32, w3), dtype), out3: T.Tensor((32, w3), dtype), A4: T.Tensor((32, w4), dtype),
        out4: T.Tensor((32, w4), dtype), A5: T.Tensor((32, w5), dtype), out5: T.Tensor((32, w5), dtype),
        A6: T.Tensor((32, w6), dtype), out6: T.Tensor((32, w6), dtype),
    ):  # fmt: skip
        with T.Kernel(1, threads=32) as _:
            copy(A0, out0, w0)
            copy(A1, out1, w1)
            copy(A2, out2, w2)
            copy(A3, out3, w3)
            copy(A4, out4, w4)
            copy(A5, out5, w5)
            copy(A6, out6, w6)

    size = getattr(torch, dtype).itemsize
    bits = [torch.randint(0, 256, (32, width * size), dtype=torch.uint8) for width in widths]
    outs = [torch.zeros_like(each) for each in bits]
    pairs = [tensor.view(getattr(torch, dtype)) for pair in zip(bits, outs, strict=True) for tensor in pair]
    report = simulate(kernel, *pairs)
    assert not report.findings, str(report)
    for width, given, out in zip(widths, bits, outs, strict=True):
        assert torch.equal(out, given), width


def test_threadgroup_arrays_share_bytes_only_when_they_must():
    """Two arrays of 20 KB exceed the 32 KB of a threadgroup, but never live at the same time."""
    n = 5120

    @T.prim_func
    def kernel(A: T.Tensor((n,), "float32"), out: T.Tensor((n,), "float32")):
        with T.Kernel(1, threads=128) as _:
            first = T.alloc_shared((n,), "float32")
            second = T.alloc_shared((n,), "float32")
            value = T.alloc_fragment((n,), "float32")
            T.copy(A, first)
            for i in T.Parallel(n):
                value[i] = first[n - 1 - i]
            for i in T.Parallel(n):
                second[i] = value[i] * 2.0
            for i in T.Parallel(n):
                out[i] = second[n - 1 - i]

    A, out = random_tensor((n,), "float32", 0), poisoned((n,), "float32")
    report = simulate(kernel, A, out)
    assert not report.findings, str(report)
    assert report.threadgroup_memory <= 32768
    assert torch.equal(out, 2 * A)

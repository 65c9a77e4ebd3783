"""Kernels compute what their text says, whatever the order of their threads; counts agree with a count by hand."""

import shutil

import numpy as np
import pytest
import torch
from simulator.kernels import run_gemm

from simulator import kernels
from tilelang_ext.simulator import execute_msl, toolchain


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("check", [False, True])
def test_gemm(seed, check):
    report, c, reference = run_gemm(seed=seed, check=check)
    assert (c - reference).abs().max() < 1e-4
    assert report.findings == ()


def test_gemm_counts():
    counts = run_gemm()[0].counts
    assert counts.mma == 8 * 8 * 8
    assert counts.device_bytes_read == 2 * 64 * 64 * 2
    assert counts.device_bytes_written == 64 * 64 * 4
    assert counts.threadgroup_bytes_written == 2 * 64 * 64 * 2
    # each of 4 simdgroups loads 4 matrices of A and 4 of B for each of 8 steps of k
    assert counts.threadgroup_bytes_read == 4 * 8 * 8 * 64 * 2
    assert counts.threadgroup_barriers == 2 * 4
    assert (counts.shuffles, counts.reductions, counts.atomics, counts.constant_bytes_read) == (0, 0, 0, 0)


def test_counts_without_check():
    report, _, _ = run_gemm(check=False)
    assert report.counts.mma == 512
    assert report.counts.device_bytes_read is None
    assert not report.checked
    assert "not counted" in str(report)


def test_wrong_lane_layout_of_the_hardware_breaks_numerics(tmp_path, monkeypatch):
    """Under a simulator whose table of lanes is another one, the same text computes something else."""
    headers = shutil.copytree(toolchain.include_directory(), tmp_path / "include")
    matrix = headers / "metal" / "matrix.h"
    matrix.write_text(kernels.plant(matrix.read_text(), "(q & 4) | (lane >> 1 & 3)", "(q & 4) | (lane & 3)"))
    monkeypatch.setattr(toolchain, "include_directory", lambda: headers)
    toolchain._shim_digest.cache_clear()
    _, c, reference = run_gemm()
    toolchain._shim_digest.cache_clear()
    assert not (c - reference).abs().max() < 1e-1


def test_wrong_lane_layout_of_the_text_breaks_numerics():
    """The text's own idea of who holds what must be the hardware's: here rows and columns of a lane are swapped."""
    wrong = kernels.plant(kernels.GEMM, "r) * 64 + column + i % 4 * 8 + s;", "s) * 64 + column + i % 4 * 8 + r;")
    _, c, reference = run_gemm(wrong)
    assert not (c - reference).abs().max() < 1e-1


@pytest.mark.parametrize("n", [1, 31, 1000, 1024])
def test_vector_add(n):
    a, b = torch.arange(n, dtype=torch.float32), torch.linspace(-1, 1, n)
    c = torch.zeros(n)
    params = np.array([n, 0], np.int32).tobytes() + np.array([0.5, 0], np.float32).tobytes()
    report = execute_msl(kernels.VECTOR_ADD, "add", [a, b, c, params], grid=(-(-n // 64), 1, 1), threads=(64, 1, 1))
    assert torch.equal(c, a + 0.5 * b)
    assert report.findings == ()
    assert report.counts.device_bytes_read == 2 * 4 * n
    assert report.counts.device_bytes_written == 4 * n


@pytest.mark.parametrize("seed", range(4))
def test_row_sum(seed):
    x, y = torch.randn(5, 256), torch.zeros(5)
    report = execute_msl(kernels.ROW_SUM, "row_sum", [x, y], grid=(5, 1, 1), threads=(256, 1, 1), seed=seed)
    torch.testing.assert_close(y, x.sum(1), rtol=1e-5, atol=1e-4)
    assert report.findings == ()
    assert report.counts.shuffles == 5 * 8 * 5
    assert report.counts.threadgroup_bytes_written == 5 * 8 * 4
    assert report.counts.threadgroup_bytes_read == 5 * 256 * 8 * 4


def test_softmax():
    x, y = torch.randn(7, 128) * 4, torch.zeros(7, 128)
    report = execute_msl(kernels.SOFTMAX, "softmax", [x, y], grid=(7, 1, 1), threads=(32, 1, 1))
    torch.testing.assert_close(y, x.softmax(1))
    assert report.findings == ()
    assert report.counts.reductions == 7 * 2


@pytest.mark.parametrize("workers", [1, 2])
def test_atomics_are_no_races(workers):
    x = torch.arange(1024, dtype=torch.int32) * 7
    bins, total = torch.zeros(16, dtype=torch.int32), torch.zeros(1)
    report = execute_msl(kernels.HISTOGRAM, "histogram", [x, bins, total], grid=(8, 1, 1), threads=(128, 1, 1), workers=workers)
    assert torch.equal(bins, torch.bincount(x & 15, minlength=16).int())
    assert total.item() == x.sum().item()
    assert report.findings == ()
    assert report.counts.atomics == 8 * (16 + 128 + 128 + 32)


DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64,
    torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_torch_dtype_travels(dtype):
    bits = torch.arange(64 * dtype.itemsize, dtype=torch.int32).to(torch.uint8)
    x = (bits % 2 if dtype is torch.bool else bits).view(dtype)
    y = torch.zeros(64, dtype=torch.uint8).to(dtype)
    source = kernels.HEADER + (
        "kernel void copy(const device uchar* x [[buffer(0)]], device uchar* y [[buffer(1)]],"
        " uint i [[thread_position_in_grid]]) { y[i] = x[i]; }"
    )
    execute_msl(source, "copy", [x, y], grid=(1, 1, 1), threads=(64 * dtype.itemsize, 1, 1))
    assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def test_read_only_and_strided_arrays():
    x = np.arange(64, dtype=np.float32)[::2]
    x.flags.writeable = False
    y = torch.zeros(32, 2)[:, 0]
    source = kernels.HEADER + (
        "kernel void copy(device float* x [[buffer(0)]], device float* y [[buffer(1)]],"
        " uint i [[thread_position_in_grid]]) { y[i] = x[i]; }"
    )
    execute_msl(source, "copy", [x, y], grid=(1, 1, 1), threads=(32, 1, 1))
    assert np.array_equal(y.numpy(), x)
    with pytest.raises(ValueError, match=r"arguments\[1\]: the kernel writes it; got a read-only array"):
        execute_msl(source, "copy", [y + 1, x], grid=(1, 1, 1), threads=(32, 1, 1))


@pytest.mark.parametrize(("m", "n", "k"), [(16, 32, 16), (32, 16, 16), (16, 16, 32), (32, 32, 32)])
@pytest.mark.parametrize(("ta", "tb"), [(False, False), (False, True), (True, False), (True, True)])
def test_matmul2d(m, n, k, ta, tb):
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(m, k, generator=generator).half()
    b = torch.randn(k, n, generator=generator).half()
    c = torch.randn(m, n, generator=generator)
    reference = c + a.double() @ b.double()
    source = kernels.MATMUL2D
    for name, value in {"M": m, "N": n, "K": k, "TA": str(ta).lower(), "TB": str(tb).lower()}.items():
        source = source.replace(f"@{name}@", str(value))
    stored = (a.T if ta else a).contiguous(), (b.T if tb else b).contiguous()
    report = execute_msl(source, "matmul", [*stored, c], grid=(1, 1, 1), threads=(32, 1, 1))
    assert (c - reference).abs().max() < 1e-4
    assert report.findings == ()
    assert report.counts.mma == m * n * k // 512


@pytest.mark.parametrize("transpose", ["false", "true"])
def test_a_matrix_is_stored_as_it_was_loaded(transpose):
    source = kernels.HEADER + (
        "kernel void f(device float* a [[buffer(0)]], device float* c [[buffer(1)]]) {\n"
        "  simdgroup_matrix<float, 8, 8> m;\n  simdgroup_load(m, a, 8);\n"
        f"  simdgroup_store(m, c, 12, ulong2(2, 1), {transpose});\n}}"
    )
    a, c = torch.arange(64).float().reshape(8, 8), torch.zeros(10, 12)
    report = execute_msl(source, "f", [a, c], grid=(1, 1, 1), threads=(32, 1, 1))
    expected = torch.zeros(10, 12)
    expected[1:9, 2:10] = a.T if transpose == "true" else a
    assert not report.findings, str(report)
    assert torch.equal(c, expected)

"""Pipelined copies of 4 bytes per thread whose rows are not contiguous in memory."""

# Without `from __future__ import annotations`: this file holds kernels.

import pytest
import torch
from rocm.kernels import lower

from tilelang_ext import language as T
from tilelang_ext import simulate
from tilelang_ext.rocm import compile_hip

ROWS, STEP, STEPS, THREADS = 32, 16, 4, 128


def narrow_tiles(dtype, masked):
    """y[k] = columns from 16 k on of x, in tiles loaded by a pipeline; with `masked`, zeros below the rows of x."""
    columns = STEP // torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    m = T.dynamic("m") if masked else ROWS

    @T.prim_func
    def kernel(x: T.Tensor((m, columns * STEPS), dtype), y: T.Tensor((STEPS, ROWS, columns), dtype)):
        with T.Kernel(1, threads=THREADS) as _:
            x_s = T.alloc_shared((ROWS, columns), dtype)
            for k in T.Pipelined(STEPS, num_stages=2):
                T.copy(x[0:ROWS, k * columns : (k + 1) * columns], x_s)
                T.copy(x_s, y[k, :, :])

    return kernel


def run(dtype, rows, masked):
    torch_dtype = getattr(torch, dtype)
    columns = STEP // torch.empty(0, dtype=torch_dtype).element_size()
    x = torch.randint(1, 100, (rows, columns * STEPS), generator=torch.Generator().manual_seed(0)).to(torch_dtype)
    y = torch.full((STEPS, ROWS, columns), 111).to(torch_dtype)
    kernel = narrow_tiles(dtype, masked)
    assert "cp_async_gs" not in lower(kernel, "gfx950").source
    assert "cp_async_wait" in lower(kernel, "gfx950").source, "the pipeline copies asynchronously"
    report = simulate(kernel, x, y, target={"kind": "hip", "mcpu": "gfx950"})
    assert not report.findings, str(report)
    assert torch.equal(y[:, :rows], x.reshape(rows, STEPS, columns).transpose(0, 1))
    assert not y[:, rows:].any()


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_narrow_tiles(dtype):
    run(dtype, ROWS, masked=False)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_rows_that_there_are_not(dtype):
    run(dtype, ROWS - 5, masked=True)


def test_waits_by_a_count_at_run_time():
    """Of a pipeline of three stages over as many steps as an extent says, the last waits have no constant count."""
    k = T.dynamic("k")

    @T.prim_func
    def kernel(x: T.Tensor((16, k), "float32"), y: T.Tensor((16, 16), "float32")):
        with T.Kernel(1, threads=64):
            x_s, y_f = T.alloc_shared((16, 16), "float32"), T.alloc_fragment((16, 16), "float32")
            T.clear(y_f)
            for step in T.Pipelined(T.ceildiv(k, 16), num_stages=3):
                T.copy(x[0:16, step * 16 : step * 16 + 16], x_s)
                for i, j in T.Parallel(16, 16):
                    y_f[i, j] += x_s[i, j]
            T.copy(y_f, y)

    for steps in (1, 5):
        x, y = torch.arange(256 * steps).reshape(16, 16 * steps).float(), torch.full((16, 16), torch.nan)
        report = simulate(kernel, x, y, target={"kind": "hip", "mcpu": "gfx950"})
        assert not report.findings, str(report)
        assert torch.equal(y, x.reshape(16, steps, 16).sum(1))


@pytest.mark.hip
def test_compiles():
    compile_hip(lower(narrow_tiles("uint8", masked=True), "gfx950").source, "gfx950")

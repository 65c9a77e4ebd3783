"""Every 8-bit code through CUDA text: on the CPU everywhere, on the GPU where there is one."""

import numpy as np
import pytest
import torch
from cuda.execute import execute, needs_compiler
from cuda.kernels import E4M3, E5M2, lower, matmul, run_on_gpu

from tilelang_ext import formats
from tilelang_ext import language as T
from tilelang_ext.cuda.decoded_mma import half_pair

WORDS = torch.arange(256, dtype=torch.uint8)


def decode_words(dtype):
    """Words of four codes to two words of two halves each, as GEMMs on GPUs without fp8 units decode their operands."""

    @T.prim_func
    def decode(codes: T.Tensor((64,), "uint32"), out: T.Tensor((128,), "uint32")):
        with T.Kernel(1, threads=32) as _:
            for i in T.Parallel(64):
                out[2 * i] = half_pair(codes[i], False, dtype)
                out[2 * i + 1] = half_pair(codes[i], True, dtype)

    return decode


def powers_of_two(dtype):
    @T.prim_func
    def decode(codes: T.Tensor((256,), dtype), out: T.Tensor((512,), "float32")):
        with T.Kernel(1, threads=32) as _:
            for i in T.Parallel(256):
                out[i] = T.e8m0_to_float(codes[i])
                out[256 + i] = T.e8m0_to_float(codes[i], zero_sentinel=True)

    return decode


def values(dtype):
    return np.array(formats.format_of(dtype).values, dtype=np.float64)


def on_cpu(kernel, tensors, grid=(1, 1)):
    """Without fp8 units: the CPU's reading of the native instructions would show nothing of this project."""
    execute(lower(kernel, "sm_80"), grid, tensors)


def on_gpu(kernel, tensors, grid=(1, 1)):
    run_on_gpu(kernel, tensors)


RUNNERS = [pytest.param(on_cpu, marks=needs_compiler), pytest.param(on_gpu, marks=pytest.mark.cuda)]


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_codes_become_halves(dtype, run):
    out = torch.zeros(128, dtype=torch.int32).view(torch.uint32)
    run(decode_words(dtype), {"codes": WORDS.view(torch.uint32), "out": out})
    halves = out.view(torch.float16).double().numpy()
    expected = values(dtype)
    np.testing.assert_array_equal(halves, expected)
    finite = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(halves[finite]), np.signbit(expected[finite]))


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("dtype", ["uint8", "float8_e8m0fnu"])
def test_bytes_become_powers_of_two(dtype, run):
    tensors = {"codes": WORDS.view(getattr(torch, dtype)), "out": torch.full((512,), 3.0)}
    run(powers_of_two(dtype), tensors)
    out = tensors["out"].double().numpy()
    expected = values("float8_e8m0fnu")
    np.testing.assert_array_equal(out[:256], expected)
    expected[[0, 255]] = 0
    np.testing.assert_array_equal(out[256:], expected)


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_codes_through_a_product(dtype, run):
    """Row r holds code r alone, in column r % 32, and B is one there: C[r, r % 32] is its value, and the rest is 0."""
    A = torch.zeros(256, 32, dtype=torch.uint8)
    A[torch.arange(256), torch.arange(256) % 32] = WORDS
    tensors = {
        "A": A.view(getattr(torch, dtype)),
        "SA": torch.ones(256, 1),
        "SB": torch.ones(32, 1),
        "C": torch.full((256, 32), 3.0),
    }
    tensors["B"] = torch.eye(32).to(torch.float8_e4m3fn)
    run(matmul(256, 32, 32, a=dtype, block_N=32), tensors, (1, 4))
    expected = values(dtype)
    np.testing.assert_array_equal(tensors["C"][torch.arange(256), torch.arange(256) % 32].double().numpy(), expected)
    others = tensors["C"][np.isfinite(expected)].double()
    assert others.count_nonzero() == np.count_nonzero(expected[np.isfinite(expected)])

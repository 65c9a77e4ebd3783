"""Every 8-bit code through CUDA text: on the CPU everywhere, on the GPU where there is one."""

import numpy as np
import pytest
import tilelang
import torch
from cuda.execute import execute, needs_compiler
from cuda.kernels import E4M3, E5M2, lower

from tilelang_ext import formats
from tilelang_ext import language as T
from tilelang_ext.cuda.decoded_mma import half_pair

WORDS = torch.arange(256, dtype=torch.uint8)


def decode_words(dtype):
    """Four codes a word to two words of two halves, as the products of GPUs without fp8 units decode their operands."""

    @T.prim_func
    def decode(codes: T.Tensor((64,), "uint32"), out: T.Tensor((128,), "uint32")):
        with T.Kernel(1, threads=32) as _:
            for i in T.Parallel(64):
                out[2 * i] = half_pair(codes[i], False, dtype)
                out[2 * i + 1] = half_pair(codes[i], True, dtype)

    return decode


def e8m0(dtype):
    @T.prim_func
    def decode(codes: T.Tensor((256,), dtype), out: T.Tensor((512,), "float32")):
        with T.Kernel(1, threads=32) as _:
            for i in T.Parallel(256):
                out[i] = T.e8m0_to_float(codes[i])
                out[256 + i] = T.e8m0_to_float(codes[i], zero_sentinel=True)

    return decode


def values(dtype):
    return np.array(formats.format_of(dtype).values, dtype=np.float64)


def on_cpu(kernel, codes, out, arch="sm_80"):
    execute(lower(kernel, arch), (1, 1), {"codes": codes, "out": out})
    return out


def on_gpu(kernel, codes, out):
    codes, result = codes.cuda(), out.cuda()
    tilelang.compile(kernel, target="cuda")(codes, result)
    return result.cpu()


RUNNERS = [pytest.param(on_cpu, marks=needs_compiler), pytest.param(on_gpu, marks=pytest.mark.cuda)]


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_codes_become_halves(dtype, run):
    out = torch.zeros(128, dtype=torch.int32).view(torch.uint32)
    halves = run(decode_words(dtype), WORDS.view(torch.uint32), out).view(torch.float16).double().numpy()
    expected = values(dtype)
    np.testing.assert_array_equal(halves, expected)
    finite = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(halves[finite]), np.signbit(expected[finite]))


@pytest.mark.parametrize("run", RUNNERS)
def test_bytes_become_powers_of_two(run):
    out = run(e8m0("uint8"), WORDS.clone(), torch.full((512,), 3.0)).double().numpy()
    expected = values("float8_e8m0fnu")
    np.testing.assert_array_equal(out[:256], expected)
    expected[[0, 255]] = 0
    np.testing.assert_array_equal(out[256:], expected)

"""The kernel of few rows for Hopper: values by running its CUDA text on the CPU, its loads, and when it is chosen."""

import re

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.kernels import lower
from kernels.hopper import execute
from kernels.matmul.operands import ALL, BF16, FP16, FP32, operands, problem
from numeric import assert_close

from tilelang_ext import reference
from tilelang_ext.kernels.matmul import sm90_config, sm90_persistent, sm90_vecmat
from tilelang_ext.kernels.matmul.sm90_vecmat import Config

SUMMING = """
static float tilelang_ext_float_of(const void* memory, int index, int block) {
  return ((float*)in_block(memory, block))[index];
}
"""
DTYPES = {"bfloat16": BF16, "float16": FP16, "float32": FP32}


def text_of(make, *arguments):
    return lower(make(*arguments).with_attr("global_symbol", "matmul"), sm90_vecmat.ARCH, **sm90_vecmat.PASS_CONFIGS)


def run(of, config):
    """Check one launch against float64; every other byte of memory is a NaN."""
    a, b, *others = operands(of)
    given = dict(zip(("row_scale", "column_scale", "bias", "residual"), others, strict=True))
    expected = reference.matmul(a, b, *others[:3], of.epilogue.activation, others[3])
    tensors = {"a": a.contiguous(), "b": (b.t() if of.b_is_k_major else b).contiguous()}
    tensors |= {name: tensor for name, tensor in given.items() if tensor is not None}
    out = tensors["out"] = torch.full((of.M, of.N), torch.nan, dtype=DTYPES[of.out_dtype])
    scalars = {"M": of.M, "N": of.N, "K": of.K, "K_vectors": of.K // config.vector, "N_vectors": of.N // config.vector}
    general = of.without_sizes("M", "N", "K")
    grid = (-(-of.N // sm90_vecmat.columns_of_block(of, config)) * config.blocks, 1)
    execute(text_of(sm90_vecmat.vecmat, general, config), grid, tensors, {}, scalars, config.blocks, SUMMING)
    bounds = {"max_error": 1e-5, "rms_error": 1e-5} if of.out_dtype == "float32" else {}
    assert_close(out, expected, dtype=of.out_dtype, **bounds)


@needs_compiler
@pytest.mark.parametrize(
    ("of", "config"),
    [
        # K-major b: loads of 16 bytes, of 2 and of 4, with a last step of K that is not full, and columns past the end
        (problem(3, 138, 264, epilogue=ALL), Config(4, 8, 128, 2, 4)),
        (problem(1, 75, 1003, FP16, BF16, epilogue=ALL), Config(1, 1, 32, 16, 4)),
        (problem(2, 70, 1002, BF16, FP32), Config(2, 2, 64, 8, 2, 3)),
        # N-major b: several threads add what others have, or one does
        (problem(3, 136, 303, b_is_k_major=False, epilogue=ALL), Config(4, 8, 256, 8, 4)),
        (problem(4, 68, 303, FP16, FP32, b_is_k_major=False), Config(4, 4, 128, 8, 16)),
        (problem(1, 75, 303, b_is_k_major=False), Config(1, 1, 256, 8, 32, 2)),
        (problem(2, 75, 1029, b_is_k_major=False, epilogue=ALL), Config(2, 1, 128, 4, 64, 3)),
    ],
)
def test_values(of, config):
    run(of, config)


def test_loads():
    """Vectors of 16 bytes where rows of b allow them."""
    for is_k_major in (True, False):
        of = problem(1, 136, 264, b_is_k_major=is_k_major)
        text = text_of(sm90_vecmat.vecmat, of.without_sizes("M", "N", "K"), sm90_vecmat.pick_config(of))
        assert re.search(r"\*\(uint4\*\)\(b_l \+ .*\*\(uint4\*\)\(b \+", text)


@pytest.mark.parametrize(
    ("of", "takes"),
    [
        (problem(1, 4096, 4096), True),
        (problem(4, 2120, 744), True),
        (problem(5, 2120, 744), False),
        (problem(2, 5320, 1904, b_is_k_major=False), False),  # tiles are as fast
        (problem(1, 5001, 3003, b_is_k_major=False), True),  # TMA takes no such rows
        (problem(3, 5001, 3003), True),
        (problem(1, 4096, 4096, a_is_k_major=False), False),
        (problem(1, 4096, 4096, arch="sm_90"), False),
    ],
)
def test_takes(of, takes):
    assert sm90_vecmat.takes(of) == takes


def test_rows_served():
    """A variant of other kernels serves none of these rows, nor the other way round."""
    served = [sm90_vecmat.sizes_served(problem(M, 4096, 4096)) for M in range(1, 5)]
    assert served == [(1, 1), (2, 2), (3, 4), (3, 4)]
    for M in (1, 2, 3, 4, 5, 12, 40):
        first, last = sm90_persistent.sizes_served(problem(M, 4096, 4096))
        assert first <= M <= last
        assert {sm90_config.rows_alike(rows) for rows in range(first, last + 1)} == {sm90_config.rows_alike(M)}

"""`matmul` at its door and on the CPU: values against float64, errors by message, tracing; its launch on other devices."""

import itertools

import numpy as np
import pytest
import torch
from kernels.matmul.operands import ALL, BF16, FP16, FP32, name, operands, problem
from metal.recording import FakeArray, record_mlx
from numeric import assert_close

from tilelang_ext import matmul, metal, reference, simulate
from tilelang_ext.kernels.matmul import tiled
from tilelang_ext.kernels.matmul.problem import Epilogue

ACTIVATIONS = {
    None: lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values(activation):
    """Every order of the operands in memory, every pair of dtypes, every part of the epilogue."""
    orders = itertools.cycle(itertools.product((True, False), repeat=2))
    for dtype, out in itertools.product((BF16, FP16), (BF16, FP16, FP32)):
        of = problem(33, 50, 70, dtype, out, *next(orders), Epilogue(True, True, name(out), activation, name(dtype)))
        a, b, row_scale, column_scale, bias, residual = operands(of)
        product = a.double() @ b.double()
        scaled = row_scale.double()[:, None] * column_scale.double() * product
        expected = ACTIVATIONS[activation](scaled + bias.double()) + residual.double()
        written = torch.full((33, 50), torch.nan, dtype=out)
        options = {"row_scale": row_scale, "column_scale": column_scale, "activation": activation, "residual": residual}
        assert matmul(a, b, bias, **options, out=written) is written
        assert_close(written, expected, dtype=name(out))
        assert_close(matmul(a, b, output_dtype=out), product, dtype=name(out))
    assert matmul(a, b).dtype == FP16


def test_residual_may_be_the_result():
    a, b, *_ = operands(problem(5, 8, 16))
    out = torch.ones(5, 8, dtype=BF16)
    matmul(a, b, residual=out, out=out)
    assert_close(out, a.double() @ b.double() + 1, dtype="bfloat16")


@pytest.mark.parametrize(("M", "N", "K"), [(0, 8, 8), (3, 0, 8), (3, 8, 0)])
def test_empty(M, N, K):
    a, b, bias = torch.zeros(M, K, dtype=BF16), torch.zeros(K, N, dtype=BF16), torch.ones(N)
    assert torch.equal(matmul(a, b, bias), torch.ones(M, N, dtype=BF16))


def test_torch_compile_and_gradients():
    a, b, *_ = operands(problem(5, 8, 16))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(a, b):
        return matmul(a, b, activation="relu").float() * 2

    assert_close(compiled(a, b) / 2, (a.double() @ b.double()).relu(), dtype="bfloat16")
    result = matmul(a.clone().requires_grad_(), b)
    with pytest.raises(NotImplementedError, match="matmul: has no gradient; got a backward pass"):
        result.sum().backward()


A, B = torch.zeros(3, 16, dtype=BF16), torch.zeros(16, 8, dtype=BF16)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((A.float(), B), {}, TypeError, "matmul: a must be float16 or bfloat16; got torch.float32; convert it"),
        ((A, B.half()), {}, TypeError, "matmul: a and b must have one dtype; got torch.bfloat16 and torch.float16"),
        ((A[0], B), {}, ValueError, r"matmul: a must have 2 dimensions; got shape \(16,\); reshape it"),
        ((A, B.t()), {}, ValueError, r"must agree on K; got \(3, 16\) and \(8, 16\); transpose one"),
        ((A, B, torch.zeros(3)), {}, ValueError, r"matmul: bias must have shape \(8,\); got \(3,\); reshape it"),
        ((A, B), {"row_scale": torch.zeros(3).half()}, TypeError, "row_scale must be float32; got torch.float16; convert it"),
        ((A, B), {"column_scale": torch.zeros(3)}, ValueError, r"column_scale must have shape \(8,\); got \(3,\)"),
        ((A, B), {"residual": torch.zeros(3, 8).long()}, TypeError, "residual must be float32, float16 or bfloat16"),
        ((A, B), {"activation": "swish"}, ValueError, "must be None or one of relu, gelu, gelu_tanh, silu; got 'swish'"),
        ((A, B), {"output_dtype": torch.int8}, TypeError, "output_dtype must be float32, float16 or bfloat16; got torch.int8"),
        ((A, B), {"out": torch.zeros(8, 3).t()}, ValueError, r"out must be contiguous of shape \(3, 8\); got \(3, 8\) with"),
        ((A, B), {"out": torch.zeros(3, 8), "output_dtype": BF16}, TypeError, "output_dtype must be that of out"),
        ((A, B.to("meta")), {}, ValueError, "matmul: b must be on cpu as a is; got meta; move it"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        matmul(*arguments, **options)


# --- the tiled kernel ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "of",
    [
        problem(70, 90, 50, FP16, BF16, True, False, ALL, arch=""),
        problem(9, 66, 33, BF16, FP32, False, True, Epilogue(bias_dtype="float16", activation="gelu_tanh"), arch=""),
        problem(70, 90, 50, BF16, FP16, False, False, Epilogue(True, True, "bfloat16", "silu", "float32"), arch="gfx1100"),
    ],
    ids=["metal, row-major", "metal, column-major", "gfx1100"],
)
def test_tiled(of):
    """In the simulator: tails of every extent, no finding."""
    a, b, *others = operands(of)
    given = a if of.a_is_k_major else a.t(), b.t() if of.b_is_k_major else b
    out = torch.full((of.M, of.N), torch.nan, dtype=getattr(torch, of.out_dtype))
    kernel = tiled.matmul(of.without_sizes("M"), tiled.pick_config(of))
    others_given = (given[0] if operand is None else operand for operand in others)
    target = {"kind": "hip", "mcpu": of.arch} if of.arch else "metal"
    report = simulate(kernel, *given, *others_given, out, target=target)
    assert not report.findings, str(report)
    expected = reference.matmul(a, b, *others[:3], of.epilogue.activation, others[3])
    assert_close(out, expected, dtype=of.out_dtype)


def test_batch_sizes_that_share_a_tile_share_a_kernel():
    """They are compiled with equal arguments, and a variant of a plan serves them all."""

    class Compiler:
        def compile(self, make, *arguments, pass_configs=None):
            return arguments

    made = [problem(M, 64, 100) for M in (1, 64, 65, 4096)]
    assert len({tiled.compile_kernel(each, Compiler()) for each in made}) == 2
    assert [tiled.sizes_served(each) for each in made] == [(1, 64)] * 2 + [(65, 2**31 - 1)] * 2


def test_mlx_launch(monkeypatch):
    fake_mlx = record_mlx(monkeypatch)
    made = problem(5, 70, 32, FP16, arch="")
    config = tiled.pick_config(made)
    run = metal.to_mlx(metal.lower(tiled.matmul(made.without_sizes("M"), config)))
    a = FakeArray(np.zeros((5, 32)), "float16")
    out = run(a, FakeArray(np.zeros((70, 32)), "float16"), a, a, a, a)
    assert out.shape == (5, 70)
    (record,) = fake_mlx.records
    assert record["grid"] == (-(-70 // config.block_N) * config.threads, 1, 1)

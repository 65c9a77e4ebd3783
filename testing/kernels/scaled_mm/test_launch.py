"""What `scaled_mm` does before a kernel runs: problems, the cache of kernels, memory it promises; stand-ins for devices."""

import numpy as np
import pytest
import torch
from kernels.scaled_mm.operands import MX, ROW, ROW_BLOCK, SQUARE_BLOCK, operands, problem
from kernels.scaled_mm.recording import BF16, E4M3_TORCH, key
from metal.recording import FakeArray, record_mlx, record_torch

from tilelang_ext import metal
from tilelang_ext.kernels.scaled_mm import launch as launches
from tilelang_ext.kernels.scaled_mm import operator, vecmat
from tilelang_ext.kernels.scaled_mm.problem import bucket_of
from tilelang_ext.program import program as program_module


def test_problem_of_a_launch(kernels):
    assert operator._problem_of(key(recipes=(ROW_BLOCK, SQUARE_BLOCK)), True) == problem(
        5, 64, 128, (ROW_BLOCK, SQUARE_BLOCK), kind="cuda", arch="sm_90a", bias="bfloat16", out="bfloat16", fast_accum=True
    )


def test_problem_on_a_mac(kernels):
    run = operator._compile(key(device=torch.device("mps", 0), bias=None), False)
    assert kernels.problems == [problem(5, 64, 128, (ROW, ROW), out="bfloat16")]
    assert operator._launchers == {(key(device=torch.device("mps", 0), bias=None), False): run}


def test_other_devices(kernels):
    with pytest.raises(NotImplementedError, match="tensors must be on cuda, mps or cpu; got xpu; move them"):
        operator._problem_of(key(device=torch.device("xpu", 0)), False)


@pytest.mark.parametrize("name", ["a", "b"])
def test_fnuz_off_the_cpu(kernels, name):
    with pytest.raises(NotImplementedError, match=f"mat_{name} must be .* on cuda; got float8_e5m2fnuz; convert"):
        operator._problem_of(key(**{name: torch.float8_e5m2fnuz}), False)


@pytest.mark.parametrize(
    ("M", "sizes"), [(1, (1, 1)), (4, (4, 4)), (5, (5, 16)), (16, (5, 16)), (17, (17, 32)), (99, (65, 128))]
)
def test_batches_that_share_a_kernel(M, sizes):
    assert launches.sizes_of_bucket(problem(M, 64, 128, (ROW, ROW))) == sizes
    assert {bucket_of(size) for size in range(sizes[0], sizes[1] + 1)} == {bucket_of(M)}
    assert bucket_of(sizes[0] - 1) != bucket_of(M) != bucket_of(sizes[1] + 1)


def launched(kernels, a, b, bias=None, scale=None):
    """What a kernel of Metal is given by `_launch` on CPU tensors."""
    run = operator._compile(key(device=torch.device("mps", 0), bias=None if bias is None else bias.dtype), False)
    scale = torch.ones(1, 1) if scale is None else scale
    operator._launch(run, a, scale, b, scale, bias, torch.empty(a.shape[0], b.shape[0]))
    return kernels.launches[-1]


def test_launch_passes_memory_on(kernels):
    (a, _, b, _), _ = operands(5, 16, 32, (ROW, ROW))
    given = launched(kernels, a, b)
    assert given[0] is a
    assert given[2] is b
    assert len(given) == 5, "a kernel without bias is called without it"


def test_launch_makes_rows_of_a_bias_and_scales_contiguous(kernels):
    (a, _, b, _), _ = operands(5, 16, 32, (ROW, ROW))
    wide, bias, scale = a.repeat(1, 2)[:, :32], torch.arange(32.0)[::2], torch.ones(4, 4)[::2, ::2]
    given = launched(kernels, wide, b, bias, scale)
    assert given[0].is_contiguous()
    assert torch.equal(given[0].view(torch.uint8), a.view(torch.uint8))
    assert given[1].is_contiguous()
    assert given[4].is_contiguous()
    assert torch.equal(given[4], bias)


def test_launch_refuses_what_kernels_cannot_read(kernels):
    (a, _, b, _), _ = operands(5, 16, 32, (ROW, ROW))
    with pytest.raises(ValueError, match=r"mat_b must be column-major, as weight.t\(\) is; got strides \(16, 1\); pass"):
        launched(kernels, a, b.t().contiguous().t())
    moved = torch.zeros(5 * 32 + 1, dtype=torch.uint8)[1:].view(5, 32).view(E4M3_TORCH)
    for operand_a, operand_b, name in ((moved, b, "mat_a"), (a, moved, "mat_b")):
        with pytest.raises(ValueError, match=f"{name} must start at a multiple of 16 bytes; got a slice"):
            launched(kernels, operand_a, operand_b)


# --- Metal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("M", "name"), [(2, "vecmat"), (9, "scaled_matmul")])
def test_mps_launch(monkeypatch, M, name):
    """From the operator's arguments to the launch: the text, its buffers and its grid."""
    shaders = record_torch(monkeypatch)
    monkeypatch.setattr(program_module, "check_tensor", lambda kernel, parameter, argument, device: argument)
    monkeypatch.setattr(operator, "_launchers", {})
    (a, scale_a, b, scale_b), _ = operands(M, 70, 128, (MX, MX))
    run = operator._compile(
        (torch.device("mps", 0), bucket_of(M), 70, 128, a.dtype, b.dtype, MX.value, MX.value, None, BF16),
        False,
    )
    out = torch.empty(M, 70, dtype=BF16)
    run(a, scale_a, b, scale_b, None, out)
    (shader,) = shaders
    ((kernel, buffers, threads, group),) = shader.calls
    assert kernel == f"{name}_kernel"
    assert [buffer.data_ptr() for buffer in buffers[:5]] == [t.data_ptr() for t in (a, scale_a, b, scale_b, out)]
    assert threads[0] == (2 * 32 if name == "vecmat" else 2 * 64)  # ceil(70 / 64) threadgroups
    assert group[0] == (32 if name == "vecmat" else 64)


def test_mlx_launch(monkeypatch):
    """The same text as an MLX kernel: codes and scale bytes are uint8 arrays, the result a new array."""
    fake_mlx = record_mlx(monkeypatch)
    made = problem(1, 70, 128, (MX, MX), out="float16")
    run = metal.to_mlx(metal.lower(vecmat.vecmat(made, vecmat.pick_config(made))))
    inputs = [FakeArray(np.zeros(shape), "uint8") for shape in ((1, 128), (1, 4), (70, 128), (70, 4))]
    out = run(*inputs)
    assert out.shape == (1, 70)
    assert out.dtype == np.float16
    (record,) = fake_mlx.records
    assert record["grid"] == (2 * 32, 1, 1)

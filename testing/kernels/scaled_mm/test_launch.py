"""What `scaled_mm` does before a kernel runs: problems, the cache of kernels, memory it promises; stand-ins for devices."""

import contextlib

import numpy as np
import pytest
import torch
from kernels.scaled_mm.operands import E4M3, MX, ROW, ROW_BLOCK, SQUARE_BLOCK, case, operands, problem
from kernels.scaled_mm.recording import BF16, CUDA, E4M3_TORCH, key
from metal.recording import FakeArray, RecordedShader, record_mlx

from tilelang_ext import metal, program
from tilelang_ext.kernels.scaled_mm import operator, vecmat
from tilelang_ext.kernels.scaled_mm.problem import bucket_of


def test_problem_of_a_launch(kernels):
    run = operator._compile(key(recipes=(ROW_BLOCK, SQUARE_BLOCK)), True)
    (made,) = kernels.problems
    assert made == problem(
        5, 64, 128, (ROW_BLOCK, SQUARE_BLOCK), kind="cuda", arch="sm_90a", bias="bfloat16", out="bfloat16", fast_accum=True
    )
    assert operator._launchers == {(key(recipes=(ROW_BLOCK, SQUARE_BLOCK)), True): run}


def test_problem_on_a_mac(kernels):
    operator._compile(key(device=torch.device("mps", 0), bias=None), False)
    assert kernels.problems == [problem(5, 64, 128, (ROW, ROW), out="bfloat16")]


def test_other_devices(kernels):
    with pytest.raises(NotImplementedError, match="tensors must be on cuda, mps or cpu; got xpu; move them"):
        operator._compile(key(device=torch.device("xpu", 0)), False)


@pytest.mark.parametrize("name", ["a", "b"])
def test_fnuz_off_the_cpu(kernels, name):
    with pytest.raises(NotImplementedError, match=f"mat_{name} must be .* on cuda; got float8_e5m2fnuz; convert"):
        operator._compile(key(**{name: torch.float8_e5m2fnuz}), False)


def launch(a, b, bias=None):
    """What a kernel is given by `_launch` on CPU tensors."""
    launches = []
    made = problem(a.shape[0], b.shape[0], a.shape[1], (ROW, ROW), bias=None if bias is None else "float32")
    run = operator._run_of(made, lambda *arguments: launches.append(arguments))
    scale = torch.ones(1, 1)
    operator._launch(run, a, scale, b, scale, bias, torch.empty(a.shape[0], b.shape[0]))
    return launches[-1]


def test_launch_passes_memory_on():
    (a, _, b, _), _ = operands(5, 16, 32, (ROW, ROW))
    given = launch(a, b)
    assert given[0] is a
    assert given[2] is b
    assert len(given) == 5, "a kernel without bias is called without it"


def test_launch_makes_rows_of_a_and_bias_contiguous():
    (a, _, b, _), _ = operands(5, 16, 32, (ROW, ROW))
    wide, bias = a.repeat(1, 2)[:, :32], torch.arange(32.0)[::2]
    given = launch(wide, b, bias)
    assert given[0].is_contiguous()
    assert torch.equal(given[0].view(torch.uint8), a.view(torch.uint8))
    assert given[4].is_contiguous()
    assert torch.equal(given[4], bias)


def test_launch_refuses_what_kernels_cannot_read():
    (a, _, b, _), _ = operands(5, 16, 32, (ROW, ROW))
    with pytest.raises(ValueError, match=r"mat_b must be column-major, as weight.t\(\) is; got strides \(16, 1\); pass"):
        launch(a, b.t().contiguous().t())
    moved = torch.zeros(5 * 32 + 1, dtype=torch.uint8)[1:].view(5, 32).view(E4M3_TORCH)
    for operand_a, operand_b, name in ((moved, b, "mat_a"), (a, moved, "mat_b")):
        with pytest.raises(ValueError, match=f"{name} must start at a multiple of 16 bytes; got a slice"):
            launch(operand_a, operand_b)


@pytest.mark.parametrize(
    ("kind", "recipes", "copied"), [("cuda", (ROW, ROW), True), ("cuda", (ROW_BLOCK, SQUARE_BLOCK), False)]
)
def test_strides_of_scales(kind, recipes, copied):
    """Kernels of CUDA read the scales of groups by their strides; scales of all of K are contiguous everywhere."""
    launches = []
    run = operator._run_of(problem(2, 2, 256, recipes, kind="cuda"), lambda *arguments: launches.append(arguments))
    scale = torch.ones(4, 4)[::2, ::2]
    run(None, scale, None, scale, None, None)
    assert (launches[0][1] is scale) is not copied
    assert launches[0][1].is_contiguous() or not copied


# --- Metal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("M", "name"), [(2, "vecmat"), (9, "scaled_matmul")])
def test_mps_launch(monkeypatch, M, name):
    """From the operator's arguments to the launch: the text, its buffers and its grid."""
    shaders = []
    monkeypatch.setattr(torch.mps, "compile_shader", lambda source: shaders.append(RecordedShader(source)) or shaders[-1])
    monkeypatch.setattr(program, "_check_tensor", lambda kernel, parameter, argument, device: argument)
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
    assert threads[0] == (2 * 32 if name == "vecmat" else 2 * 128)  # ceil(70 / 64) threadgroups
    assert group[0] == (32 if name == "vecmat" else 128)


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


def test_the_operator_finds_its_kernel_once(kernels, monkeypatch):
    """The whole way with CPU tensors that say they are elsewhere: one kernel for all batch sizes of a bucket."""
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    arguments, _ = case(5, 64, 128, (ROW, ROW), E4M3)

    class Elsewhere:
        """A tensor that says it is on CUDA; the operator asks nothing of it that needs a device."""

        def __init__(self, tensor):
            self.tensor = tensor

        device = CUDA

        def __getattr__(self, name):
            value = getattr(self.tensor, name)
            return (lambda *a: Elsewhere(value(*a))) if name in ("t", "contiguous", "reshape") else value

    for M in (5, 16, 17):
        a, scale_a = torch.zeros(M, 128).to(E4M3_TORCH), torch.ones(M, 1)
        tensors = [Elsewhere(t) for t in (a, arguments[1], scale_a, arguments[4], torch.empty(M, 64))]
        operator._scaled_mm_out(*tensors[:3], ROW.value, 0, tensors[3], ROW.value, 0, None, False, tensors[4])
    assert [made.max_M for made in kernels.problems] == [16, 32]
    assert len(kernels.launches) == 3

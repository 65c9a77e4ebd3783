"""Launching on a Mac, checked off one: text, launch shape and argument order, with recorded stand-ins for torch and MLX."""

import dataclasses
import struct
import sys

import numpy as np
import pytest
import torch
from metal.kernels import gemm, poisoned, random_tensor
from metal.recording import FakeArray, record_mlx, record_torch

from tilelang_ext import language as T
from tilelang_ext import metal, simulate
from tilelang_ext.program import program as program_module


def scaled_rows(dtype="float16"):
    """out[i, j] = A[i, j] * scale + shift, with names out of alphabetical order and scalars between the tensors."""
    M, N = T.dynamic("M"), T.dynamic("N")

    @T.prim_func
    def kernel(
        z: T.Tensor((M, N), dtype),
        shift: T.int32,
        a: T.Tensor((M, N), dtype),
        scale: T.float32,
        out: T.Tensor((M, N), dtype),
    ):
        with T.Kernel(T.ceildiv(N, 32), M, threads=32) as (bx, by):
            for j in T.Parallel(32):
                if bx * 32 + j < N:
                    out[by, bx * 32 + j] = z[by, bx * 32 + j] * T.cast(scale, dtype) + a[by, bx * 32 + j] + T.cast(shift, dtype)

    return kernel


def test_device_parameters_follow_the_users_order():
    program = metal.lower(scaled_rows())
    bindings = program.kernels[0].bindings
    assert [b.var.name for b in bindings] == ["z", "a", "out", "shift", "scale", "M", "N"][: len(bindings)]
    assert [b.source for b in bindings[:3]] == [0, 2, 4]
    assert [b.source for b in bindings[3:5]] == [program.parameters[1].var, program.parameters[3].var]
    assert program.written == {4}
    lines = program.get_kernel_source().splitlines()
    assert [line.split("[[")[1].split("]]")[0].strip() for line in lines[1:5]] == [f"buffer({i})" for i in range(4)]


def test_parameters_that_tracing_gives_one_name():
    """A macro renames what it is given, so two scalars may share a name; each must still get its own value."""

    @T.macro
    def put(target, place, value):
        target[place] = value

    @T.prim_func
    def kernel(
        a: T.float32, b: T.float32, A: T.Tensor((4,), "float32"), B: T.Tensor((4,), "float32"), out: T.Tensor((4,), "float32")
    ):
        with T.Kernel(1, threads=32) as _:
            tx = T.get_thread_binding()
            if tx == 0:
                put(out, 0, a)
                put(out, 1, b)
                put(A, 2, a)
                put(B, 3, b)

    A, B, out = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    assert not simulate(kernel, 1.0, 2.0, A, B, out).findings
    assert out.tolist() == [1, 2, 0, 0]
    assert A.tolist() == [0, 0, 1, 0]
    assert B.tolist() == [0, 0, 0, 2]


def test_kernel_only_source():
    program = metal.lower(scaled_rows())
    assert program.get_kernel_source().startswith("kernel void ")
    assert program.get_kernel_source(kernel_only=False).startswith("#include <metal_stdlib>")


def test_to_torch_launch(monkeypatch):
    shaders = record_torch(monkeypatch)
    program = metal.lower(scaled_rows())
    tensors = [torch.empty(5, 70, dtype=torch.float16, device="meta") for _ in range(3)]
    monkeypatch.setattr(program_module, "check_tensor", lambda kernel, parameter, argument, device: argument)
    run = metal.to_torch(program)
    run(tensors[0], 7, tensors[1], 0.5, tensors[2])
    run(tensors[0], 7, tensors[1], 0.5, tensors[2])
    assert len(shaders) == 1, "the text is compiled once"
    assert shaders[0].source == program.source
    name, arguments, threads, group_size = shaders[0].calls[0]
    assert name == program.name
    assert all(got is want for got, want in zip(arguments[:3], tensors, strict=True))
    slots = struct.pack(f"<{len(arguments[3])}q", *arguments[3])
    values = dict(
        zip(
            [b.var.name for b in program.kernels[0].bindings if not b.is_tensor],
            [slots[i : i + 8] for i in range(0, len(slots), 8)],
            strict=True,
        )
    )
    assert struct.unpack("<i", values["shift"][:4]) == (7,)
    assert struct.unpack("<f", values["scale"][:4]) == (0.5,)
    assert struct.unpack("<i", values["N"][:4]) == (70,)
    assert threads == [3 * 32, 5, 1]
    assert group_size == [32, 1, 1]
    nothing = [torch.empty(0, 70, dtype=torch.float16, device="meta") for _ in range(3)]
    run(nothing[0], 7, nothing[1], 0.5, nothing[2])
    assert len(shaders[0].calls) == 2, "no threadgroups, no launch"


def test_to_mlx_launch(fake_mlx):
    program = metal.lower(scaled_rows())
    run = metal.to_mlx(program)
    z, a = FakeArray(np.ones((5, 70)), "float16"), FakeArray(np.ones((5, 70)), "float16")
    out = run(z, 7, a, 0.5)
    assert out.shape == (5, 70)
    (record,) = fake_mlx.records
    assert record["input_names"] == ["z", "a", "argument_slots"]
    assert record["output_names"] == ["out"]
    assert record["inputs"][0] is z
    assert record["inputs"][1] is a
    assert record["inputs"][2].dtype == np.int64
    assert record["grid"] == (96, 5, 1)
    assert record["threadgroup"] == (32, 1, 1)
    assert record["init_value"] is None
    assert "kernel void" not in record["source"] + record["header"]
    assert "[[" not in record["source"]
    assert record["source"].count("{") == record["source"].count("}")
    assert "threadgroup_position_in_grid" in record["source"]


def test_to_mlx_launches_nothing_for_no_threadgroups(fake_mlx):
    run = metal.to_mlx(metal.lower(scaled_rows()), init_value=2)
    out = run(FakeArray(np.ones((0, 70)), "float16"), 7, FakeArray(np.ones((0, 70)), "float16"), 0.5)
    assert out.shape == (0, 70)
    assert fake_mlx.records == []


def test_launching_needs_a_mac(monkeypatch):
    """Elsewhere the message names the simulator; so does that of MLX, which has wheels for Linux without Metal."""
    program = metal.lower(scaled_rows())
    message = "needs a Mac, whose GPU runs the kernel; got .* without Metal; run the same text here with tilelang_ext.simulate"
    if not torch.backends.mps.is_available():
        with pytest.raises(RuntimeError, match=f"to_torch: {message}"):
            metal.to_torch(program)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setitem(sys.modules, "mlx", None)
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(RuntimeError, match=f"to_mlx: {message}"):
        metal.to_mlx(program)
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    with pytest.raises(ImportError, match="to_mlx: needs MLX; got none installed; run `pip install mlx`"):
        metal.to_mlx(program)
    record_mlx(monkeypatch).metal.is_available = lambda: False
    with pytest.raises(RuntimeError, match=f"to_mlx: {message}"):
        metal.to_mlx(program)


def test_launching_refuses_what_only_the_simulator_has(monkeypatch):
    record_mlx(monkeypatch)
    record_torch(monkeypatch)
    program = metal.lower(scaled_rows())
    for text, operator in (('debug_print_var("a", 1);', "T.print"), ('TL_ASSERT(true, "");', "T.device_assert")):
        speaking = dataclasses.replace(program, source=program.source.replace("kernel void", f"// {text}\nkernel void"))
        for launcher, name in ((metal.to_torch, "to_torch"), (metal.to_mlx, "to_mlx")):
            with pytest.raises(NotImplementedError, match=f"{name}: {operator} works in the simulator only; got .*; run it"):
                launcher(speaking)


def test_to_mlx_pads_inputs_that_mlx_would_bind_as_constants(fake_mlx):
    @T.prim_func
    def kernel(A: T.Tensor((3,), "float32"), out: T.Tensor((32,), "float32")):
        with T.Kernel(1, threads=32) as _:
            for i in T.Parallel(32):
                out[i] = A[i % 3]

    metal.to_mlx(kernel)(FakeArray([1, 2, 3], "float32"))
    assert fake_mlx.records[0]["inputs"][0].size == 8


def test_to_mlx_refuses_an_undefined_start(fake_mlx):
    @T.prim_func
    def kernel(A: T.Tensor((32,), "float32"), total: T.Tensor((32,), "float32")):
        with T.Kernel(1, threads=32) as _:
            for i in T.Parallel(32):
                total[i] += A[i]

    with pytest.raises(ValueError, match=r"to_mlx: total is read and written, .*; got init_value=None; pass one"):
        metal.to_mlx(kernel)
    metal.to_mlx(kernel, init_value=0)(FakeArray(np.ones(32), "float32"))
    assert fake_mlx.records[0]["init_value"] == 0


def test_to_mlx_checks_dtypes(fake_mlx):
    run = metal.to_mlx(scaled_rows())
    with pytest.raises(TypeError, match=r"z must be float16; got float32; convert it"):
        run(FakeArray(np.ones((5, 70)), "float32"), 7, FakeArray(np.ones((5, 70)), "float16"), 0.5)


def bad_calls():
    A, B, C = (
        random_tensor((64, 32), "float16", 0),
        random_tensor((32, 64), "float16", 1),
        poisoned((64, 64), "float32"),
    )
    yield (
        "dtype",
        (A.float(), B, C),
        TypeError,
        r"A must be torch\.float16; got torch\.float32; convert it with \.to\(torch\.float16\)",
    )
    yield (
        "shape",
        (A, B[:, :32].contiguous(), C),
        ValueError,
        r"B must have shape \(32, 64\); got \(32, 32\); pass that shape",
    )
    yield "rank", (A, B, C.reshape(-1)), ValueError, r"C must have 2 dimensions; got shape \(4096,\); reshape it"
    yield (
        "strides",
        (A, B.t().contiguous().t(), C),
        ValueError,
        r"B must be contiguous; got strides \(1, 32\); call \.contiguous\(\)",
    )
    yield "device", (A.to("meta"), B, C), ValueError, r"A must be on cpu; got meta; move it with \.to\('cpu'\)"
    yield "count", (A, B), TypeError, r"takes 3 arguments \(A, B, C\); got 2; pass one each"
    yield "kind", (A.numpy(), B, C), TypeError, r"A must be a torch tensor; got ndarray; convert it"


@pytest.mark.parametrize(("arguments", "error", "message"), [c[1:] for c in bad_calls()], ids=[c[0] for c in bad_calls()])
def test_wrong_arguments(arguments, error, message):
    program = metal.lower(gemm(64, 64, 32))
    with pytest.raises(error, match=message):
        program.bind(arguments, device="cpu")


def test_wrong_symbolic_extents_and_scalars():
    program = metal.lower(scaled_rows())
    z, a, out = (torch.zeros(5, 70, dtype=torch.float16) for _ in range(3))
    with pytest.raises(ValueError, match=r"a must have shape\[0\] = M = 5; got 6; all tensors must agree on M"):
        program.bind((z, 1, torch.zeros(6, 70, dtype=torch.float16), 0.5, out), device="cpu")
    with pytest.raises(TypeError, match=r"shift must be int32; got the float 1\.5; pass an int"):
        program.bind((z, 1.5, a, 0.5, out), device="cpu")
    with pytest.raises(TypeError, match=r"scale must be a float32 scalar; got Tensor; pass a number"):
        program.bind((z, 1, a, torch.zeros(1), out), device="cpu")


@pytest.mark.parametrize(("position", "value", "name"), [(1, 2**31, "shift"), (1, -(2**31) - 1, "shift"), (3, 1e39, "scale")])
def test_scalars_out_of_range(position, value, name):
    program = metal.lower(scaled_rows())
    z, a, out = (torch.zeros(5, 70, dtype=torch.float16) for _ in range(3))
    arguments = [z, 1, a, 0.5, out]
    arguments[position] = value
    with pytest.raises(ValueError, match=rf"{name} must fit (int32|float32); got .*; pass a value in its range"):
        program.bind(arguments, device="cpu")

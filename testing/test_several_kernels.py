"""Functions of several `T.Kernel`s, with memory of their own, extents that are expressions, and results that they return."""

import numpy as np
import pytest
import tilelang
import torch
from metal.recording import FakeArray, RecordedShader, record_mlx

from tilelang_ext import language as T
from tilelang_ext import metal, simulate
from tilelang_ext.program import program as program_module
from tilelang_ext.rocm import program as rocm

TARGETS = ["metal", "hip -mcpu=gfx942"]
SPLITS = 4


def split_sums():
    """out[r] = scale * sum of X[r, :], in SPLITS partial sums per row that a second kernel adds."""
    n, pitch = T.dynamic("n"), T.dynamic("pitch")

    @T.prim_func
    def split(
        X: T.StridedTensor((n + 1, 64), (pitch, 1), "float32"), flat: T.Tensor((n * 4 + 4,), "float32"), scale: T.float32
    ):
        partial = T.alloc_global((n + 1, SPLITS), "float32")
        with T.Kernel(SPLITS, n + 1, threads=32) as (part, row):
            if T.get_thread_binding() == 0:
                partial[row, part] = 0
                for j in T.serial(64 // SPLITS):
                    partial[row, part] += X[row, part * (64 // SPLITS) + j]
        with T.Kernel(n + 1, threads=32) as row:
            lane = T.get_thread_binding()
            if lane < 4:
                flat[row * 4 + lane] = scale * (partial[row, 0] + partial[row, 1] + partial[row, 2] + partial[row, 3])

    return split


@pytest.fixture(scope="module")
def program():
    return metal.lower(split_sums())


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_run_in_their_order(target, program):
    X, flat = torch.randn(5, 80)[:, 8:72], torch.full((20,), float("nan"))
    report = simulate(program if target == "metal" else split_sums(), X, flat, 2.0, target=target)
    assert not report.findings, str(report)
    torch.testing.assert_close(flat.reshape(5, 4), (2 * X.double().sum(1)).float()[:, None].expand(5, 4))
    written = 4 * (5 * SPLITS * (1 + 64 // SPLITS) + 20)
    assert report.counts.device_bytes_written == written, "both launches are counted"


def test_extents_that_are_expressions(program):
    X, flat = torch.zeros(5, 80)[:, :64], torch.zeros(20)
    first, second = program.bind((X, flat, 1.0), device="cpu")
    assert (first.grid, second.grid) == ((SPLITS, 5, 1), (5, 1, 1))
    assert sorted(first.numbers) == [4, 80]
    assert first.tensors[1] is second.tensors[1], "the partial sums of one call are one piece of memory"
    assert first.tensors[1].numel() == 5 * SPLITS
    with pytest.raises(ValueError, match=r"flat must have shape \(20,\); got \(24,\)"):
        program.bind((X, torch.zeros(24), 1.0), device="cpu")
    n = T.dynamic("n")

    @T.prim_func
    def fours(A: T.Tensor((n * 4,), "float32")):
        with T.Kernel(n, threads=32) as block:
            if T.get_thread_binding() == 0:
                A[block * 4] = 1.0

    a = torch.zeros(12)
    assert not simulate(fours, a).findings
    assert a.tolist() == [1, 0, 0, 0] * 3
    with pytest.raises(ValueError, match=r"extent n \* 4 must follow from the shapes given; got no value for n"):
        simulate(fours, torch.zeros(13))


def test_to_torch_launches_each_kernel(program, monkeypatch):
    shader = RecordedShader(program.source)
    monkeypatch.setattr(torch.mps, "compile_shader", lambda source: shader)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(program_module, "check_tensor", lambda kernel, parameter, argument, device: argument)
    monkeypatch.setattr(program_module.Program, "_empty", lambda self, p, values, device: torch.empty(self.shape(p, values)))
    metal.to_torch(program)(torch.zeros(5, 80)[:, :64], torch.zeros(20), 1.0)
    assert [call[0] for call in shader.calls] == ["split_kernel", "split_kernel_1"]
    assert shader.calls[0][1][1] is shader.calls[1][1][1]
    assert [call[2] for call in shader.calls] == [[SPLITS * 32, 5, 1], [5 * 32, 1, 1]]


def test_to_mlx_hands_scratch_from_kernel_to_kernel(monkeypatch):
    core = record_mlx(monkeypatch)

    @T.prim_func
    def kernel(A: T.Tensor((64,), "float32"), C: T.Tensor((64,), "float32")):
        S = T.alloc_global((32,), "float32")
        with T.Kernel(1, threads=32):
            lane = T.get_thread_binding()
            S[lane] = A[lane] + A[lane + 32]
        with T.Kernel(2, threads=32) as block:
            C[block * 32 + T.get_thread_binding()] = S[T.get_thread_binding()]

    assert metal.to_mlx(kernel)(FakeArray(np.ones(64), "float32")).shape == (64,)
    first, second = core.records
    assert (first["input_names"], first["output_names"], first["output_shapes"]) == (["A"], ["S"], [(32,)])
    assert (second["input_names"], second["output_names"], second["output_shapes"]) == (["S"], ["C"], [(64,)])
    assert (first["grid"], second["grid"]) == ((32, 1, 1), (64, 1, 1))
    assert "S[" in first["source"]
    assert "A[" not in second["source"]
    for record in core.records:
        assert "kernel void" not in record["source"] + record["header"]
        assert record["source"].count("{") == record["source"].count("}")


def test_to_mlx_refuses_a_tensor_of_two_writers(monkeypatch):
    record_mlx(monkeypatch)

    @T.prim_func
    def kernel(A: T.Tensor((64,), "float32"), C: T.Tensor((64,), "float32")):
        with T.Kernel(1, threads=32):
            C[T.get_thread_binding()] = A[T.get_thread_binding()]
        with T.Kernel(1, threads=32):
            C[T.get_thread_binding() + 32] = A[T.get_thread_binding() + 32]

    with pytest.raises(NotImplementedError, match=r"to_mlx: a tensor may be written by one T\.Kernel, .*; got C, which"):
        metal.to_mlx(kernel)


@pytest.mark.parametrize("target", TARGETS)
def test_launches_in_a_loop_of_the_host_are_refused(target):
    @T.prim_func
    def kernel(A: T.Tensor((32,), "float32"), rounds: T.int32):
        for _ in T.serial(rounds):
            with T.Kernel(1, threads=32):
                A[T.get_thread_binding()] += 1.0

    with pytest.raises(
        NotImplementedError, match=r"kernel_kernel: a T\.Kernel must stand at the top of the prim_func; got one in a"
    ):
        simulate(kernel, torch.zeros(32), 3, target=target)


@tilelang.jit
def doubled(A, C, block: int = 32):
    M, N = T.const("M N")
    A: T.Tensor[[M, N], T.float32]
    C: T.Tensor[[M, N], T.float32]
    with T.Kernel(M, threads=block) as row:
        for j in T.Parallel(N):
            C[row, j] = A[row, j] * 2.0


@tilelang.jit
def tripled(A):
    M = T.dynamic("M")
    A: T.Tensor[[M, 64], T.float32]
    C = T.empty((M, 64), "float32")
    with T.Kernel(M, threads=32) as row:
        for j in T.Parallel(64):
            C[row, j] = A[row, j] * 3.0
    return C


@tilelang.jit(out_idx=[-1])
def copied(size):
    @T.prim_func
    def kernel(A: T.Tensor((size,), "float32"), C: T.Tensor((size,), "float32")):
        with T.Kernel(1, threads=32):
            T.copy(A, C)

    return kernel


def test_eager_functions_and_returned_tensors():
    A, C = torch.randn(3, 64), torch.zeros(3, 64)
    assert simulate(doubled, A, C).outputs == ()
    assert torch.equal(C, 2 * A)
    C.zero_()
    simulate(doubled, A, C, 64, target="hip -mcpu=gfx942")
    assert torch.equal(C, 2 * A)
    assert metal.lower(doubled, "metal", A, C, 64).kernels[0].threads == (64, 1, 1)
    (result,) = simulate(tripled, A).outputs
    assert torch.equal(result, 3 * A)
    compiled = tilelang.compile(copied.get_tir(64), target="metal", out_idx=[-1])
    (result,) = simulate(compiled, A[1]).outputs
    assert torch.equal(result, A[1])
    simulate(compiled, A[2], result)
    assert torch.equal(result, A[2])
    with pytest.raises(TypeError, match=r"simulate: a @tilelang\.jit function that returns a prim_func must be called first"):
        simulate(copied, A)


@pytest.mark.parametrize("target", TARGETS)
def test_scalars_of_every_value(target):
    @T.prim_func
    def kernel(
        out: T.Tensor((4,), "float32"), a: T.float32, b: T.float32, c: T.float32, d: T.uint64, top: T.Tensor((1,), "uint64")
    ):
        with T.Kernel(1, threads=32):
            if T.get_thread_binding() == 0:
                out[0] = a
                out[1] = b
                out[2] = c
                top[0] = d

    out, top = torch.zeros(4), torch.zeros(1, dtype=torch.uint64)
    simulate(kernel, out, float("-inf"), float("nan"), 1e30, 2**64 - 1, top, target=target)
    assert out[0] == float("-inf")
    assert out[1].isnan()
    assert out[2] == torch.tensor(1e30)
    assert top.tolist() == [2**64 - 1]


def test_programs_of_several_kernels_on_hip():
    program = rocm.lower(split_sums(), "hip -mcpu=gfx942")
    assert [kernel.name for kernel in program.kernels] == ["split_kernel", "split_kernel_1"]
    assert [scratch.name for scratch in program.scratch] == ["partial"]
    assert program.written == {1}
    assert not program.read_and_written

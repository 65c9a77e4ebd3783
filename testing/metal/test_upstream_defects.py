"""Ten defects of upstream's Metal backend (0.1.15), each with a kernel that shows ours free of it."""

import re

import pytest
import torch
from metal.kernels import gemm, gemm_reference, poisoned, random_tensor
from numeric import assert_close

from tilelang_ext import language as T
from tilelang_ext import metal, simulate


def check_gemm(M, N, K, *args, target="metal", a="float16", b="float16", out="float32", **kwargs):
    A, B, C = random_tensor((M, K), a, 0), random_tensor((K, N), b, 1), poisoned((M, N), out)
    program = metal.lower(gemm(M, N, K, *args, a=a, b=b, out=out, **kwargs), target)
    report = simulate(program, A, B, C)
    assert not report.findings, str(report)
    assert_close(C, gemm_reference(A, B), dtype=out)
    return program


def test_1_a_simdgroup_declares_the_accumulators_it_owns():
    """64x64 on four simdgroups is 16 matrices each, two elements per lane: exactly 32 registers are written."""
    program = check_gemm(64, 64, 32)
    assert re.search(r"\bfloat C_f\[32\];", program.source)


@pytest.mark.parametrize("lanes", [2, 3, 4])
def test_2_bfloat_vectors(lanes):
    @T.prim_func
    def kernel(A: T.Tensor((32, lanes), "bfloat16"), out: T.Tensor((32, lanes), "bfloat16")):
        with T.Kernel(1, threads=32) as _:
            tx = T.get_thread_binding()
            for v in T.vectorized(lanes):
                out[tx, v] = A[tx, v] + T.bfloat16(1)

    A, out = random_tensor((32, lanes), "bfloat16", 0), poisoned((32, lanes), "bfloat16")
    assert not simulate(kernel, A, out).findings
    assert torch.equal(out, A + 1)


@pytest.mark.parametrize("out", ["float16", "bfloat16"])
def test_3_float32_accumulator_to_16_bit_output(out):
    check_gemm(64, 64, 32, out=out)


def test_4_elementwise_work_on_an_accumulator():
    @T.prim_func
    def kernel(
        A: T.Tensor((64, 32), "float16"),
        B: T.Tensor((32, 64), "float16"),
        s: T.Tensor((64,), "float32"),
        C: T.Tensor((64, 64), "float32"),
    ):
        with T.Kernel(1, threads=128) as _:
            A_s = T.alloc_shared((64, 32), "float16")
            B_s = T.alloc_shared((32, 64), "float16")
            C_f = T.alloc_fragment((64, 64), "float32")
            T.copy(A, A_s)
            T.copy(B, B_s)
            T.gemm(A_s, B_s, C_f, clear_accum=True)
            for i, j in T.Parallel(64, 64):
                C_f[i, j] *= s[i]
            T.copy(C_f, C)

    A, B, s = (
        random_tensor((64, 32), "float16", 0),
        random_tensor((32, 64), "float16", 1),
        random_tensor((64,), "float32", 2),
    )
    C = poisoned((64, 64), "float32")
    assert not simulate(kernel, A, B, s, C).findings
    assert_close(C, gemm_reference(A, B) * s.double().numpy()[:, None], dtype="float32")


def test_5_reduce():
    @T.prim_func
    def kernel(A: T.Tensor((32, 64), "float32"), out: T.Tensor((32,), "float32")):
        with T.Kernel(1, threads=64) as _:
            A_f = T.alloc_fragment((32, 64), "float32")
            out_f = T.alloc_fragment((32,), "float32")
            T.copy(A, A_f)
            T.reduce_sum(A_f, out_f, dim=1)
            T.copy(out_f, out)

    A, out = random_tensor((32, 64), "float32", 0), poisoned((32,), "float32")
    assert not simulate(kernel, A, out).findings
    assert_close(out, A.double().sum(1).numpy(), dtype="float32")


def test_6_fp8():
    check_gemm(64, 64, 32, a="float8_e4m3fn", b="float8_e4m3fn")


def test_7_scalar_arguments_beside_each_other():
    @T.prim_func
    def kernel(x: T.float32, n: T.int8, h: T.float16, out: T.Tensor((3,), "float32")):
        with T.Kernel(1, threads=32) as _:
            tx = T.get_thread_binding()
            if tx == 0:
                out[0] = x
                out[1] = T.cast(n, "float32")
                out[2] = T.cast(h, "float32")

    out = poisoned((3,), "float32")
    assert not simulate(kernel, 0.25, -3, 1.5, out).findings
    assert out.tolist() == [0.25, -3.0, 1.5]


def test_8_tiles_are_not_overwritten_while_they_are_read():
    """Every barrier of the loop is needed: without any one of them the simulator finds the race."""
    program = metal.lower(gemm(64, 64, 96))
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    lines = program.source.splitlines()
    places = [i for i, line in enumerate(lines) if barrier in line]
    assert len(places) >= 2
    A, B = random_tensor((64, 96), "float16", 0), random_tensor((96, 64), "float16", 1)
    C = poisoned((64, 64), "float32")
    assert not simulate(program, A, B, C).findings
    for place in places:
        without = "\n".join(line.replace(barrier, "") if i == place else line for i, line in enumerate(lines))
        changed = type(program)(**{**vars(program), "source": without})
        assert simulate(changed, A, B, C).findings, f"nothing found without the barrier of line {place + 1}"


def test_9_default_shared_memory_with_cooperative_tensors():
    program = check_gemm(64, 64, 32, target="metal4")
    assert "matmul2d" in program.source
    assert re.search(r"alignas\(16\) threadgroup half A_s\[2552\];", program.source), "typed, aligned, padded rows"


def test_10_every_fragment_of_the_tile_and_of_k():
    """8 K matrices of 8; the accumulator in threadgroup memory goes through registers whole."""
    check_gemm(64, 64, 64, 64, 64, 64)
    check_gemm(64, 32, 64, 64, 32, 64, accumulator="shared")

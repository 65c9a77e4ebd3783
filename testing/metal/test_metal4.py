"""Target metal4: the inner product through mpp::tensor_ops::matmul2d, the same fragments and epilogues around it."""

import numpy as np
import pytest
import tilelang
import torch
from metal.kernels import EPILOGUES, attention, float64, gemm, gemm_reference, gemm_with_epilogue, poisoned, random_tensor
from numeric import assert_close
from tvm.target import Target

from tilelang_ext import language as T
from tilelang_ext import metal, simulate


def run(M, N, K, *args, a="float16", b="float16", trans_A=False, trans_B=False, **kwargs):
    program = metal.lower(gemm(M, N, K, *args, a=a, b=b, trans_A=trans_A, trans_B=trans_B, **kwargs), "metal4")
    A = random_tensor((K, M) if trans_A else (M, K), a, 0)
    B = random_tensor((N, K) if trans_B else (K, N), b, 1)
    C = poisoned((M, N), "float32")
    report = simulate(program, A, B, C)
    assert not report.findings, str(report)
    assert_close(C, gemm_reference(A, B, trans_A, trans_B), dtype="float32")
    return program, report


@pytest.mark.parametrize(
    ("dtype", "trans_A", "trans_B"),
    [("float16", False, False), ("float16", True, True), ("bfloat16", False, True), ("bfloat16", True, False)],
)
def test_tensor_operations(dtype, trans_A, trans_B):
    program, report = run(64, 128, 64, a=dtype, b=dtype, trans_A=trans_A, trans_B=trans_B)
    assert "matmul2d<16, 32, 16" in program.source
    assert "simdgroup_mma" not in program.source
    assert report.counts.mma == 64 * 128 * 64 // 512


@pytest.mark.parametrize(
    ("a", "b", "trans_B"),
    [("float8_e4m3fn", "float8_e5m2", True), ("float8_e4m3fn", "float16", False), ("bfloat16", "float8_e4m3fn", True)],
)
def test_decoded_operands(a, b, trans_B):
    program, _ = run(64, 64, 32, a=a, b=b, trans_B=trans_B)
    assert "matmul2d<16, 32, 16" in program.source


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ((64, 64, 64), {"a": "float32", "b": "float32"}),  # matmul2d would lose precision
        ((64, 64, 24, 64, 64, 24), {}),  # K is no multiple of 16
        ((32, 32, 32, 32, 32, 32), {}),  # four simdgroups do not fit 16x32 blocks
    ],
    ids=["float32", "K", "tile"],
)
def test_falls_back_to_simdgroup_matrices(arguments, keywords):
    program, _ = run(*arguments, **keywords)
    assert "simdgroup_mma" in program.source
    assert "matmul2d" not in program.source


def test_explicit_target_objects():
    """The key selects the instruction, whoever made the target; tilelang.lower and compile take the same."""
    kernel = gemm(64, 64, 32)
    for keys, call in ((["metal", "gpu"], "simdgroup_mma<half>("), (["metal", "gpu", "metal4"], "matmul2d<16, 32, 16")):
        target = Target({"kind": "metal", "keys": keys})
        assert call in metal.lower(kernel, target).source
        assert call in tilelang.lower(kernel, target=target).kernel_source


def test_one_product_that_does_not_fit_takes_the_kernel_back():
    """Two products share a fragment, so they share an instruction."""

    @T.prim_func
    def kernel(A: T.Tensor((64, 32), "float16"), B: T.Tensor((32, 64), "float16"), C: T.Tensor((64, 64), "float32")):
        with T.Kernel(1, threads=128) as _:
            A_s = T.alloc_shared((64, 32), "float16")
            B_s = T.alloc_shared((32, 64), "float16")
            A8_s = T.alloc_shared((64, 8), "float16")
            B8_s = T.alloc_shared((8, 64), "float16")
            C_f = T.alloc_fragment((64, 64), "float32")
            T.copy(A, A_s)
            T.copy(B, B_s)
            T.copy(A[0:64, 0:8], A8_s)
            T.copy(B[0:8, 0:64], B8_s)
            T.gemm(A_s, B_s, C_f, clear_accum=True)
            T.gemm(A8_s, B8_s, C_f)
            T.copy(C_f, C)

    program = metal.lower(kernel, "metal4")
    assert "matmul2d" not in program.source
    A, B, C = random_tensor((64, 32), "float16", 0), random_tensor((32, 64), "float16", 1), poisoned((64, 64), "float32")
    assert not simulate(program, A, B, C).findings
    assert_close(C, gemm_reference(A, B) + gemm_reference(A[:, :8], B[:8]), dtype="float32")


def test_rows_that_do_not_fit_take_the_kernel_back():
    """Whatever else the kernel multiplies, and with as many columns."""

    @T.prim_func
    def kernel(A: T.Tensor((32, 32), "float16"), C: T.Tensor((40, 32), "float32")):
        with T.Kernel(1, threads=32) as _:
            A_s, few_s = T.alloc_shared((32, 32), "float16"), T.alloc_shared((8, 32), "float16")
            C_f, few_f = T.alloc_fragment((32, 32), "float32"), T.alloc_fragment((8, 32), "float32")
            T.copy(A, A_s)
            T.copy(A[0:8, 0:32], few_s)
            T.gemm(A_s, A_s, C_f, clear_accum=True)
            T.gemm(few_s, A_s, few_f, clear_accum=True)
            T.copy(C_f, C[0:32, 0:32])
            T.copy(few_f, C[32:40, 0:32])

    assert "matmul2d" not in metal.lower(kernel, "metal4").source


@pytest.mark.parametrize(
    "keywords",
    [
        {"a_scope": "fragment"},
        {"b_scope": "fragment"},
        {"b_scope": "fragment", "trans_B": True},
        {"accumulator": "shared", "block_M": 32},
        {"num_stages": 2},
    ],
)
def test_scopes_and_stages(keywords):
    program, _ = run(64, 64, 64, **keywords)
    assert "matmul2d<16, 32, 16" in program.source


@pytest.mark.parametrize("epilogue", ["bias", "row_and_column_scale", "gelu", "residual"])
def test_epilogue(epilogue):
    M, N, K = 50, 71, 40
    A, B = random_tensor((M, K), "float16", 0), random_tensor((K, N), "float16", 1)
    bias, row, col = (random_tensor((n,), "float32", 2 + i) for i, n in enumerate((N, M, N)))
    residual, C = random_tensor((M, N), "float16", 5), poisoned((M, N), "float16")
    program = metal.lower(gemm_with_epilogue(M, N, K, epilogue, "float16"), "metal4")
    assert "matmul2d<16, 32, 16" in program.source
    report = simulate(program, A, B, bias, row, col, residual, C)
    assert not report.findings, str(report)
    expected = EPILOGUES[epilogue](gemm_reference(A, B), *(float64(t) for t in (bias, row, col, residual)))
    assert_close(C, expected, dtype="float16")


def test_attention_keeps_probabilities_in_registers():
    S, D = 64, 64
    Q, K, V = (random_tensor((S, D), "float16", i) for i in range(3))
    out = poisoned((S, D), "float16")
    program = metal.lower(attention(S, D, 32, 32, 64, "float16"), "metal4")
    assert "matmul2d<16, 32, 16" in program.source
    report = simulate(program, Q, K, V, out)
    assert not report.findings, str(report)
    q, k, v = (torch.from_numpy(float64(t)) for t in (Q, K, V))
    expected = (torch.softmax(q @ k.T / D**0.5, dim=-1) @ v).numpy()
    assert np.abs(float64(out) - expected).max() < 2e-3

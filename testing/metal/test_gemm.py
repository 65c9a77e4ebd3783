"""T.gemm on Metal: dtypes, scopes, transposes, tile and thread shapes, against float64 from the executed text."""

import pytest
import torch
from metal.kernels import gemm, gemm_reference, poisoned, random_tensor
from numeric import assert_close

from tilelang_ext import language as T
from tilelang_ext import simulate


def run(M, N, K, *args, a="float16", b="float16", out="float32", trans_A=False, trans_B=False, target="metal", **kwargs):
    kernel = gemm(M, N, K, *args, a=a, b=b, out=out, trans_A=trans_A, trans_B=trans_B, **kwargs)
    A = random_tensor((K, M) if trans_A else (M, K), a, 0)
    B = random_tensor((N, K) if trans_B else (K, N), b, 1)
    C = poisoned((M, N), out)
    report = simulate(kernel, A, B, C, target=target)
    assert not report.findings, str(report)
    assert_close(C, gemm_reference(A, B, trans_A, trans_B), dtype=out)
    return report


@pytest.mark.parametrize(
    ("dtype", "trans_A", "trans_B"),
    [
        ("float16", False, False),
        ("float16", True, True),
        ("bfloat16", False, True),
        ("bfloat16", True, False),
        ("float32", False, False),
        ("float32", True, True),
        ("float32", False, True),
    ],
)
def test_dtypes_and_transposes(dtype, trans_A, trans_B):
    run(128, 64, 64, a=dtype, b=dtype, trans_A=trans_A, trans_B=trans_B)


@pytest.mark.parametrize(
    ("a", "b", "trans_B"),
    [
        ("float16", "float32", False),
        ("float32", "float16", True),
        ("float16", "bfloat16", False),
        ("float8_e4m3fn", "float8_e4m3fn", False),
        ("float8_e4m3fn", "float8_e4m3fn", True),
        ("float8_e5m2", "float8_e4m3fn", True),
        ("float8_e4m3fn", "float16", False),
        ("float16", "float8_e5m2", True),
        ("bfloat16", "float8_e4m3fn", False),
    ],
)
def test_mixed_operands(a, b, trans_B):
    run(64, 64, 64, a=a, b=b, trans_B=trans_B)


@pytest.mark.parametrize(
    ("block_M", "block_N", "block_K", "threads"),
    [
        (32, 32, 16, 32),
        (32, 32, 16, 256),  # 8 simdgroups on 16 matrices
        (32, 128, 16, 64),
        (64, 32, 64, 96),  # 3 simdgroups do not divide 32 columns evenly: refused below
        (64, 64, 32, 128),  # upstream defect 1: one simdgroup owns 16 of the 64 matrices
        (128, 64, 16, 256),
        (128, 128, 16, 128),
        (128, 128, 32, 256),
    ],
)
def test_tiles_and_threads(block_M, block_N, block_K, threads):
    if threads == 96:
        with pytest.raises(
            Exception, match=r"T\.gemm: the tile must split into 8x8 blocks over all simdgroups; got a 64x32 tile and 3"
        ):
            run(block_M, block_N, 64, block_M, block_N, block_K, threads=threads)
        return
    run(block_M, 2 * block_N, 2 * block_K, block_M, block_N, block_K, threads=threads)


@pytest.mark.parametrize("policy", [T.GemmWarpPolicy.FullRow, T.GemmWarpPolicy.FullCol])
def test_policies(policy):
    run(64, 64, 32, policy=policy)


@pytest.mark.parametrize(("a", "trans_A"), [("float16", False), ("float16", True), ("float8_e4m3fn", True)])
def test_register_operand(a, trans_A):
    run(64, 64, 64, a=a, a_scope="fragment", trans_A=trans_A)


@pytest.mark.parametrize(("a_scope", "trans_B"), [("shared", False), ("shared", True), ("fragment", False)])
def test_both_operands_in_registers(a_scope, trans_B):
    run(64, 64, 64, a_scope=a_scope, b_scope="fragment", trans_B=trans_B)


@pytest.mark.parametrize(  # a fragment of float32 is what all other tests have
    ("accumulator", "accum_dtype"),
    [("fragment", "float16"), ("fragment", "bfloat16"), ("shared", "float32"), ("shared", "bfloat16")],
)
def test_accumulators(accumulator, accum_dtype):
    """A 16-bit accumulator is rounded once per T.gemm, so two K tiles give two roundings to its dtype."""
    run(64, 64, 64, accumulator=accumulator, accum_dtype=accum_dtype, out=accum_dtype)


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_pipeline_stages(num_stages):
    run(64, 64, 160, num_stages=num_stages)


@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (33, 70, 45), (65, 64, 31)])
def test_masked_tails(M, N, K):
    run(M, N, K)


def test_swizzled_grid():
    run(192, 128, 32, swizzle=True)


@pytest.mark.parametrize(
    ("scope", "dtype", "clear"),
    [
        ("fragment", "float32", False),
        ("fragment", "float32", "on the first step"),
        ("fragment", "float16", True),
        ("fragment", "float16", False),
        ("shared", "float32", False),
        ("shared", "float32", True),
        ("shared", "float32", "on the first step"),
    ],
)
def test_clear_accum_and_initial_value(scope, dtype, clear):
    """clear_accum=True forgets what C held, at every T.gemm; without it C's value is the start of the sum."""

    @T.prim_func
    def kernel(A: T.Tensor((64, 64), "float16"), B: T.Tensor((64, 64), "float16"), C: T.Tensor((64, 64), dtype)):
        with T.Kernel(1, threads=128) as _:
            A_s = T.alloc_shared((64, 32), "float16")
            B_s = T.alloc_shared((32, 64), "float16")
            C_t = T.alloc_fragment((64, 64), dtype) if scope == "fragment" else T.alloc_shared((64, 64), dtype)
            T.copy(C, C_t)
            for k in T.serial(2):
                T.copy(A[0, k * 32], A_s)
                T.copy(B[k * 32, 0], B_s)
                T.gemm(A_s, B_s, C_t, clear_accum=(k == 0) if clear == "on the first step" else clear)
            T.copy(C_t, C)

    A, B = random_tensor((64, 64), "float16", 2), random_tensor((64, 64), "float16", 3)
    C = random_tensor((64, 64), dtype, 4)
    start = {False: gemm_reference(A, B) + C.double().numpy(), True: gemm_reference(A[:, 32:], B[32:])}
    report = simulate(kernel, A, B, C)
    assert not report.findings, str(report)
    assert_close(C, start.get(clear, gemm_reference(A, B)), dtype=dtype)


def test_several_accumulators():
    """Two products with different shapes and transposes share one shared operand."""

    @T.prim_func
    def kernel(
        A: T.Tensor((64, 32), "float16"),
        B: T.Tensor((32, 64), "float16"),
        D: T.Tensor((32, 32), "float16"),
        C1: T.Tensor((64, 64), "float32"),
        C2: T.Tensor((64, 32), "float32"),
    ):
        with T.Kernel(1, threads=64) as _:
            A_s = T.alloc_shared((64, 32), "float16")
            B_s = T.alloc_shared((32, 64), "float16")
            D_s = T.alloc_shared((32, 32), "float16")
            C1_f = T.alloc_fragment((64, 64), "float32")
            C2_f = T.alloc_fragment((64, 32), "float32")
            T.copy(A, A_s)
            T.copy(B, B_s)
            T.copy(D, D_s)
            T.gemm(A_s, B_s, C1_f, clear_accum=True)
            T.gemm(A_s, D_s, C2_f, transpose_B=True, clear_accum=True)
            T.copy(C1_f, C1)
            T.copy(C2_f, C2)

    A, B, D = (random_tensor(s, "float16", i) for i, s in enumerate([(64, 32), (32, 64), (32, 32)]))
    C1, C2 = poisoned((64, 64), "float32"), poisoned((64, 32), "float32")
    report = simulate(kernel, A, B, D, C1, C2)
    assert not report.findings, str(report)
    assert_close(C1, gemm_reference(A, B), dtype="float32")
    assert_close(C2, gemm_reference(A, D, trans_B=True), dtype="float32")


def test_one_hot_rows_select_columns_exactly():
    kernel = gemm(64, 64, 32)
    A = torch.zeros(64, 32, dtype=torch.float16)
    A[torch.arange(64), torch.arange(64) % 32] = 1
    B = random_tensor((32, 64), "float16", 5)
    C = poisoned((64, 64), "float32")
    simulate(kernel, A, B, C)
    assert torch.equal(C, B.float()[torch.arange(64) % 32])


def test_dynamic_extents():
    M, N, K = T.dynamic("M"), T.dynamic("N"), T.dynamic("K")
    kernel = gemm(M, N, K)
    for m, n, k in [(64, 64, 32), (33, 70, 45)]:
        A, B, C = random_tensor((m, k), "float16", 6), random_tensor((k, n), "float16", 7), poisoned((m, n), "float32")
        report = simulate(kernel, A, B, C)
        assert not report.findings, str(report)
        assert_close(C, gemm_reference(A, B), dtype="float32")

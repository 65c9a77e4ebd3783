"""T.fp8_scaled_matmul on the CPU: every row of its table, by the kernels that the other targets run, against float64."""

import pytest
import torch
from cpu.run import check, compile_c
from language.fp8_cases import E8M0, LAYOUTS, ROW, L, dtype_of, operand, trace, whole
from numeric import assert_close

from tilelang_ext import language as T
from tilelang_ext import reference


def nan(M, N, dtype="float32"):
    return torch.full((M, N), torch.nan).to(getattr(torch, dtype))


@pytest.mark.parametrize("name", LAYOUTS)
def test_global_operands(name):
    """The intrinsic stages its operands itself; K ends inside a step, rows and columns inside a tile."""
    M, N, K = 40, 150, 288
    layouts = LAYOUTS[name]
    (A, SA), (B, SB) = operand(M, K, layouts[0], seed=0), operand(N, K, layouts[1], seed=1)

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), "float8_e4m3fn"),
        SA: T.Tensor(tuple(SA.shape), dtype_of(SA)),
        B: T.Tensor((N, K), "float8_e4m3fn"),
        SB: T.Tensor(tuple(SB.shape), dtype_of(SB)),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 32), threads=64) as (bx, by):
            C_f = T.alloc_fragment((32, 64), "float32")
            T.fp8_scaled_matmul(
                A[by * 32 : by * 32 + 32, 0:K],
                SA,
                B[bx * 64 : bx * 64 + 64, 0:K],
                SB,
                C_f,
                transpose_B=True,
                scale_layout=layouts,
                clear_accum=True,
            )
            T.copy(C_f, C[by * 32, bx * 64])

    check(kernel, (A, SA, B, SB), nan(M, N), reference.scaled_matmul(A, SA, B, SB, *layouts))


@pytest.mark.parametrize("name", ["row", "block", "e8m0"])
def test_shared_tiles_in_a_pipelined_loop(name):
    """Operands and scales sliced alike, in a loop that a GPU would pipeline, with two stages of one tile by hand."""
    M, N, K = 64, 96, 256
    layouts = LAYOUTS[name]
    (A, SA), (B, SB) = operand(M, K, layouts[0], seed=2), operand(N, K, layouts[1], seed=3)
    groups = {"row": None, "block": 1, "e8m0": 4}[name]

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), "float8_e4m3fn"),
        SA: T.Tensor(tuple(SA.shape), dtype_of(SA)),
        B: T.Tensor((N, K), "float8_e4m3fn"),
        SB: T.Tensor(tuple(SB.shape), dtype_of(SB)),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(1, threads=128) as _:
            A_s = T.alloc_shared((2, M, 128), "float8_e4m3fn")
            B_s = T.alloc_shared((N, 128), "float8_e4m3fn")
            C_f = T.alloc_fragment((M, N), "float32")
            T.clear(C_f)
            for t in T.Pipelined(2, num_stages=2):
                T.copy(A[0:M, t * 128 : t * 128 + 128], A_s[t % 2, :, :])
                T.copy(B[0, t * 128], B_s)
                if groups is None:
                    T.fp8_scaled_matmul(A_s[t % 2, :, :], SA, B_s, SB, C_f, transpose_B=True)
                else:
                    T.fp8_scaled_matmul(
                        A_s[t % 2, :, :],
                        SA[0 : SA.shape[0], t * groups : (t + 1) * groups],
                        B_s,
                        SB[0 : SB.shape[0], t * groups : (t + 1) * groups],
                        C_f,
                        transpose_B=True,
                        scale_layout=layouts,
                    )
            T.copy(C_f, C)

    check(kernel, (A, SA, B, SB), nan(M, N), reference.scaled_matmul(A, SA, B, SB, *layouts))


@pytest.mark.parametrize(("trans_A", "trans_B"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    ("a", "b"),
    [("float8_e4m3fn", "float8_e5m2"), ("float8_e5m2fnuz", "float8_e4m3fnuz")],
)
def test_mixed_dtypes_and_transposes(a, b, trans_A, trans_B):
    M, N, K = 24, 40, 96
    (A, SA), (B, SB) = operand(M, K, L.per_row(), a, 4), operand(N, K, L.per_row(), b, 5)
    A_given, B_given = (A.t().contiguous() if trans_A else A), (B if trans_B else B.t().contiguous())

    @T.prim_func
    def kernel(
        A: T.Tensor(tuple(A_given.shape), a),
        SA: T.Tensor((M, 1), "float32"),
        B: T.Tensor(tuple(B_given.shape), b),
        SB: T.Tensor((N, 1), "float32"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(1, threads=64) as _:
            C_f = T.alloc_fragment((M, N), "float32")
            T.fp8_scaled_matmul(A, SA, B, SB, C_f, transpose_A=trans_A, transpose_B=trans_B, clear_accum=True)
            T.copy(C_f, C)

    check(kernel, (A_given, SA, B_given, SB), nan(M, N), reference.scaled_matmul(A, SA, B, SB, *ROW))


@pytest.mark.parametrize(
    ("out", "scope", "clear"),
    [
        ("float32", "fragment", False),
        ("float32", "shared", True),
        ("float16", "fragment", True),
        ("float16", "global", False),
        ("bfloat16", "shared", False),
        ("bfloat16", "global", True),
    ],
)
def test_results(out, scope, clear):
    """What C held is added unscaled; a 16-bit C is rounded once, however many scale groups and steps K has."""
    M, N, K = 32, 48, 320
    (A, SA), (B, SB) = operand(M, K, L.per_row(), seed=6), operand(N, K, L.per_row(), seed=7)
    SA, SB = SA / 64, SB / 64
    C = torch.randn(M, N, generator=torch.Generator().manual_seed(8)).to(getattr(torch, out))
    expected = reference.scaled_matmul(A, SA, B, SB, *ROW) + (0 if clear else C.double())
    check(whole(M, N, K, out=out, scope=scope, clear=clear), (A, SA, B, SB), C, expected, out)


def test_a_in_registers():
    M, N, K = 32, 48, 128
    (A, SA), (B, SB) = operand(M, K, L.per_row(), seed=6), operand(N, K, L.per_row(), seed=7)
    check(whole(M, N, K, A_scope="fragment"), (A, SA, B, SB), nan(M, N), reference.scaled_matmul(A, SA, B, SB, *ROW))


@pytest.mark.parametrize("scale", ["float16", "bfloat16"])
def test_scales_of_16_bits(scale):
    M, N, K = 16, 24, 64
    (A, SA), (B, SB) = operand(M, K, L.per_row(), seed=6), operand(N, K, L.per_row(), seed=7)
    SA, SB = SA.to(getattr(torch, scale)), SB.to(getattr(torch, scale))
    expected = reference.scaled_matmul(A, SA.float(), B, SB.float(), *ROW)
    check(whole(M, N, K, scale=scale), (A, SA, B, SB), nan(M, N), expected)


@pytest.mark.parametrize("dtype", ["uint8", "float8_e8m0fnu"])
def test_mx_scales_shared_by_all_rows(dtype):
    M, N, K = 32, 48, 128
    A, SA = operand(M, K, L.e8m0_k32(), seed=6)
    B, SB = operand(N, K, L.e8m0_k32(), seed=7)
    SA, SB = SA[3].contiguous(), SB[5].contiguous()

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), "float8_e4m3fn"),
        SA: T.Tensor((K // 32,), dtype),
        B: T.Tensor((N, K), "float8_e4m3fn"),
        SB: T.Tensor((K // 32,), dtype),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(1, threads=64) as _:
            T.fp8_scaled_matmul(A, SA, B, SB, C, transpose_B=True, clear_accum=True)

    expected = reference.scaled_matmul(A, SA.expand(M, -1).contiguous(), B, SB.expand(N, -1).contiguous(), *E8M0)
    arguments = (A, SA.view(getattr(torch, dtype)), B, SB.view(getattr(torch, dtype)))
    check(kernel, arguments, nan(M, N), expected)


def test_dynamic_shapes():
    M, N, K = T.dynamic("M"), T.dynamic("N"), T.dynamic("K")

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), "float8_e4m3fn"),
        SA: T.Tensor((M,), "float32"),
        B: T.Tensor((N, K), "float8_e4m3fn"),
        SB: T.Tensor((N,), "float32"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(T.ceildiv(N, 64), T.ceildiv(M, 32), threads=64) as (bx, by):
            T.fp8_scaled_matmul(
                A[by * 32 : by * 32 + 32, 0:K],
                SA,
                B[bx * 64 : bx * 64 + 64, 0:K],
                SB,
                C[by * 32 : by * 32 + 32, bx * 64 : bx * 64 + 64],
                transpose_B=True,
                clear_accum=True,
            )

    run = compile_c(kernel)
    for m, n, k in [(32, 64, 128), (33, 70, 200), (1, 1, 1)]:
        (A, SA), (B, SB) = operand(m, k, L.per_row(), seed=9), operand(n, k, L.per_row(), seed=10)
        C = nan(m, n)
        run(A, SA.reshape(-1), B, SB.reshape(-1), C)
        assert_close(C, reference.scaled_matmul(A, SA, B, SB, *ROW), dtype="float32")


def test_a_native_product_is_refused():
    message = r"T\.gemm: require_native_fp8 needs a matrix unit that takes fp8; got target c, which decodes to float32; drop"
    with pytest.raises(NotImplementedError, match=message):
        compile_c(trace(require_native=True))

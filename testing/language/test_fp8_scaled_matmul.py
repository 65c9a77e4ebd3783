"""T.fp8_scaled_matmul: every row of its table on Metal's executed text against float64, and its errors by message."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from language.fp8_cases import E8M0, F8, LAYOUTS, ROW, L, dtype_of, operand, trace, whole
from numeric import assert_close

from tilelang_ext import formats, metal, reference, simulate
from tilelang_ext import language as T


def check(kernel, arguments, C, expected, out="float32", target="metal"):
    report = simulate(kernel, *arguments, C, target=target)
    assert not report.findings, str(report)
    assert_close(C, expected, dtype=out)
    return report


@pytest.mark.parametrize(("target", "name"), [*(("metal", name) for name in LAYOUTS), ("metal4", "block"), ("metal4", "e8m0")])
def test_global_operands(target, name):
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

    check(kernel, (A, SA, B, SB), torch.full((M, N), torch.nan), reference.scaled_matmul(A, SA, B, SB, *layouts), target=target)


@pytest.mark.parametrize("name", ["row", "block", "e8m0"])
def test_shared_tiles_in_a_users_loop(name):
    """The scales are sliced as the operands are; the user's names are the intrinsic's own, and do not collide."""
    M, N, K = 64, 128, 256
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
        with T.Kernel(1, threads=128) as i:
            partial = T.alloc_shared((64, 128), "float8_e4m3fn")
            B_s = T.alloc_shared((128, 128), "float8_e4m3fn")
            total = T.alloc_fragment((64, 128), "float32")
            T.clear(total)
            for t in T.serial(2):
                T.copy(A[0, t * 128], partial)
                T.copy(B[0, t * 128], B_s)
                if groups is None:
                    T.fp8_scaled_matmul(partial, SA, B_s, SB, total, transpose_B=True)
                else:
                    T.fp8_scaled_matmul(
                        partial,
                        SA[0 : SA.shape[0], t * groups : (t + 1) * groups],
                        B_s,
                        SB[0 : SB.shape[0], t * groups : (t + 1) * groups],
                        total,
                        transpose_B=True,
                        scale_layout=layouts,
                    )
            for j, k in T.Parallel(64, 128):
                C[j, k] = total[j, k] + T.cast(i, "float32")

    check(kernel, (A, SA, B, SB), torch.full((M, N), torch.nan), reference.scaled_matmul(A, SA, B, SB, *layouts))


@pytest.mark.parametrize("operands", ["shared", "global"])
@pytest.mark.parametrize("pipelined", [False, True])
def test_a_step_past_the_end_of_k(pipelined, operands):
    """9 groups of scales in steps of 4: nothing past the last one is read, in a peeled last step neither."""
    M, N, K = 64, 64, 288
    (A, SA), (B, SB) = operand(M, K, L.e8m0_k32(), seed=2), operand(N, K, L.e8m0_k32(), seed=3)
    SA, SB = SA.contiguous(), SB.contiguous()

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), F8),
        SA: T.Tensor((M, K // 32), "uint8"),
        B: T.Tensor((N, K), F8),
        SB: T.Tensor((N, K // 32), "uint8"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(1, threads=128) as _:
            A_s, B_s = T.alloc_shared((64, 128), F8), T.alloc_shared((64, 128), F8)
            C_f = T.alloc_fragment((64, 64), "float32")
            T.clear(C_f)
            for t in T.Pipelined(3, num_stages=1) if pipelined else T.serial(3):
                if operands == "shared":
                    T.copy(A[0, t * 128], A_s)
                    T.copy(B[0, t * 128], B_s)
                    T.fp8_scaled_matmul(
                        A_s,
                        SA[0:64, t * 4 : t * 4 + 4],
                        B_s,
                        SB[0:64, t * 4 : t * 4 + 4],
                        C_f,
                        transpose_B=True,
                        scale_layout=E8M0,
                    )
                else:
                    T.fp8_scaled_matmul(
                        A[0:64, t * 128 : t * 128 + 128],
                        SA,
                        B[0:64, t * 128 : t * 128 + 128],
                        SB,
                        C_f,
                        transpose_B=True,
                        scale_layout=E8M0,
                    )
            T.copy(C_f, C)

    check(kernel, (A, SA, B, SB), torch.full((M, N), torch.nan), reference.scaled_matmul(A, SA, B, SB, *E8M0))


def test_infinite_scales_stay_in_their_group():
    """Groups past the end of K add nothing, whatever the last one holds."""
    M, N, K = 32, 64, 288
    layouts = (L.block(1, 32), L.per_row())
    (A, SA), (B, SB) = operand(M, K, layouts[0], seed=2), operand(N, K, layouts[1], seed=3)
    SA[:, 8] = torch.inf
    A[:, 256:], B[:, 256:] = torch.ones(M, 32).to(A.dtype), torch.ones(N, 32).to(B.dtype)

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), F8),
        SA: T.Tensor((M, 9), "float32"),
        B: T.Tensor((N, K), F8),
        SB: T.Tensor((N, 1), "float32"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(1, threads=64) as _:
            T.fp8_scaled_matmul(A, SA, B, SB, C, transpose_B=True, scale_layout=layouts, clear_accum=True)

    C = torch.full((M, N), torch.nan)
    assert not simulate(kernel, A, SA, B, SB, C).findings
    assert C.isposinf().all()


@pytest.mark.parametrize(
    ("a", "b", "trans_A", "trans_B"),
    [
        ("float8_e4m3fn", "float8_e5m2", False, False),
        ("float8_e4m3fn", "float8_e5m2", True, True),
        ("float8_e5m2", "float8_e4m3fn", True, False),
        ("float8_e5m2", "float8_e4m3fn", False, True),
    ],
)
def test_mixed_dtypes_and_transposes(a, b, trans_A, trans_B):
    M, N, K = 32, 64, 96
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

    expected = reference.scaled_matmul(A, SA, B, SB, *ROW)
    check(kernel, (A_given, SA, B_given, SB), torch.full((M, N), torch.nan), expected)


@pytest.mark.parametrize("dtype", ["float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_fnuz_operands_are_decoded_as_such(dtype):
    M, N, K = 32, 64, 64
    (A, SA), (B, SB) = operand(M, K, L.per_row(), dtype, 4), operand(N, K, L.per_row(), dtype, 5)
    check(
        whole(M, N, K, dtype, dtype), (A, SA, B, SB), torch.full((M, N), torch.nan), reference.scaled_matmul(A, SA, B, SB, *ROW)
    )


# Every pair of a dtype, a scope and a start of the sum: what C held is read by one copy and written by another.
@pytest.mark.parametrize(
    ("out", "scope", "clear"),
    [
        (out, scope, (i + j) % 2 == 0)
        for i, out in enumerate(("float32", "float16", "bfloat16"))
        for j, scope in enumerate(("fragment", "shared", "global"))
    ],
)
def test_results(out, scope, clear):
    """What C held is added unscaled; a 16-bit C is rounded once, however many scale groups and steps K has."""
    M, N, K = 32, 64, 320
    (A, SA), (B, SB) = operand(M, K, L.per_row(), seed=6), operand(N, K, L.per_row(), seed=7)
    SA, SB = SA / 64, SB / 64
    C = torch.randn(M, N, generator=torch.Generator().manual_seed(8)).to(getattr(torch, out))
    expected = reference.scaled_matmul(A, SA, B, SB, *ROW) + (0 if clear else C.double())
    check(whole(M, N, K, out=out, scope=scope, clear=clear), (A, SA, B, SB), C, expected, out)


def test_a_in_registers():
    M, N, K = 32, 64, 128
    (A, SA), (B, SB) = operand(M, K, L.per_row(), seed=6), operand(N, K, L.per_row(), seed=7)
    C = torch.full((M, N), torch.nan)
    check(whole(M, N, K, A_scope="fragment"), (A, SA, B, SB), C, reference.scaled_matmul(A, SA, B, SB, *ROW))


def test_float16_scales():
    M, N, K = 32, 64, 64
    (A, SA), (B, SB) = operand(M, K, L.per_row(), seed=6), operand(N, K, L.per_row(), seed=7)
    SA, SB = SA.half(), SB.half()
    expected = reference.scaled_matmul(A, SA.float(), B, SB.float(), *ROW)
    check(whole(M, N, K, scale="float16"), (A, SA, B, SB), torch.full((M, N), torch.nan), expected)


@pytest.mark.parametrize("K", [1, 20, 100])
def test_k_below_an_instructions(K):
    """The staged tile is rounded up to what matrix instructions take, and filled with zeros."""
    M, N = 32, 64
    (A, SA), (B, SB) = operand(M, K, L.per_row(), seed=6), operand(N, K, L.per_row(), seed=7)
    C = torch.full((M, N), torch.nan)
    check(whole(M, N, K), (A, SA, B, SB), C, reference.scaled_matmul(A, SA, B, SB, *ROW))


def test_mx_scales_shared_by_all_rows():
    M, N, K = 32, 64, 128
    A, SA = operand(M, K, L.e8m0_k32(), seed=6)
    B, SB = operand(N, K, L.e8m0_k32(), seed=7)
    SA, SB = SA[3].contiguous(), SB[5].contiguous()

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), "float8_e4m3fn"),
        SA: T.Tensor((K // 32,), "uint8"),
        B: T.Tensor((N, K), "float8_e4m3fn"),
        SB: T.Tensor((K // 32,), "uint8"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(1, threads=64) as _:
            T.fp8_scaled_matmul(A, SA, B, SB, C, transpose_B=True, clear_accum=True)

    expected = reference.scaled_matmul(A, SA.expand(M, -1).contiguous(), B, SB.expand(N, -1).contiguous(), *E8M0)
    check(kernel, (A, SA, B, SB), torch.full((M, N), torch.nan), expected)


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

    program = metal.lower(kernel)
    for m, n, k in [(32, 64, 128), (33, 70, 200), (1, 1, 1)]:
        (A, SA), (B, SB) = operand(m, k, L.per_row(), seed=9), operand(n, k, L.per_row(), seed=10)
        expected = reference.scaled_matmul(A, SA, B, SB, *ROW)
        check(program, (A, SA.reshape(-1), B, SB.reshape(-1)), torch.full((m, n), torch.nan), expected)


def test_every_e8m0_byte():
    @T.prim_func
    def kernel(codes: T.Tensor((256,), "uint8"), out: T.Tensor((2, 256), "float32")):
        with T.Kernel(1, threads=32) as _:
            for i in T.Parallel(256):
                out[0, i] = T.e8m0_to_float(codes[i])
                out[1, i] = T.e8m0_to_float(codes[i], zero_sentinel=True)

    out = torch.full((2, 256), torch.nan)
    assert not simulate(kernel, torch.arange(256, dtype=torch.uint8), out).findings
    expected = torch.tensor([formats.E8M0.decode(code) for code in range(256)], dtype=torch.float64)
    np.testing.assert_array_equal(out[0].double(), expected)
    expected[[0, 255]] = 0
    np.testing.assert_array_equal(out[1].double(), expected)


ERRORS = [
    ("half operand", {"A": ((64, 64), "float16")}, TypeError, r"A must be float8_e4m3fn, .*; got float16; use T\.gemm"),
    ("E8M0 operand", {"B": ((64, 64), "float8_e8m0fnu")}, TypeError, r"B must be .*; got float8_e8m0fnu; E8M0 is a format"),
    ("scale dtype", {"SA": ((64,), "int32")}, TypeError, r"scale_a must be float32, .*; got int32; convert the scales"),
    ("C dtype", {"C": ((64, 64), "int32")}, TypeError, r"C must be float32, float16, bfloat16; got int32; cast after"),
    ("C scope", {"C_scope": "local"}, TypeError, r"C must be fragment, shared, global; got C_t in scope local"),
    ("rank", {"A": ((64,), F8)}, ValueError, r"A must have at least 2 dimensions; got 1 \(A\)"),
    ("M", {"C": ((32, 64), "float32")}, ValueError, r"M of A and C must agree; got 64 and 32"),
    ("N", {"B": ((32, 64), F8), "SB": ((32,), "float32")}, ValueError, r"N of B and C must agree; got 32 and 64"),
    ("K", {"B": ((64, 32), F8)}, ValueError, r"K of A and B must agree; got 64 and 32"),
    ("scale size", {"SA": ((48,), "float32")}, ValueError, r"scale_a must fit per_tensor\(\), .*got shape \[48\]; slice"),
    ("size under a layout", {"scale_layout": ROW[0], "SB": ((32,), "float32")}, ValueError, r"scale_b must fit per_row\(\)"),
    ("K and the group", {"A": ((64, 48), F8), "B": ((64, 48), F8), "SA": ((64, 2), "uint8"), "scale_layout": (E8M0[0], ROW[1])},
     ValueError, r"K must be a multiple of the scale group 32; got K = 48; pad K"),
    ("float for bytes", {"scale_layout": E8M0, "SA": ((64, 2), "float32"), "SB": ((64, 2), "uint8")}, TypeError,
     r"scale_a must be uint8, float8_e8m0fnu for e8m0_k32\(\); got float32"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors(arguments, error, message):
    with pytest.raises(error, match=r"T\.fp8_scaled_matmul: " + message):
        trace(**arguments)


def regions(case):
    """Programs that a table of shapes cannot say: regions, leading axes, scopes, symbolic extents."""
    rows = T.dynamic("rows")
    shapes = {
        "symbolic M": ((rows, 64), (64, 64), (rows, 64)),
        "region along K": ((64, 300), (64, 200), (64, 64)),
        "leading axis": ((2, 64, 64), (64, 64), (64, 64)),
    }
    A_shape, B_shape, C_shape = shapes.get(case, ((64, 256), (64, 256), (64, 64)))

    @T.prim_func
    def kernel(
        A: T.Tensor(A_shape, F8),
        SA: T.Tensor((64,), "float32"),
        B: T.Tensor(B_shape, F8),
        SB: T.Tensor((64,), "float32"),
        SB_blocks: T.Tensor((2, 4), "float32"),
        SB_square: T.Tensor((1, 2), "float32"),
        C: T.Tensor(C_shape, "float32"),
        K: T.int32,
    ):
        with T.Kernel(1, threads=128) as _:
            if case == "region along K":
                T.fp8_scaled_matmul(A[0:64, 0:200], SA, B, SB, C, transpose_B=True)
            elif case == "B in registers":
                B_f = T.alloc_fragment((64, 256), F8)
                T.fp8_scaled_matmul(A, SA, B_f, SB, C, transpose_B=True)
            elif case == "A in registers, K beyond a group":
                A_f = T.alloc_fragment((64, 256), F8)
                T.fp8_scaled_matmul(A_f, SA, B, SB, C, transpose_B=True)
            elif case == "shared tile of symbolic K":
                A_s = T.alloc_shared((64, 256), F8)
                T.fp8_scaled_matmul(A_s[0:64, 0:K], SA, B[0:64, 0:K], SB, C, transpose_B=True)
            elif case == "groups":
                layouts = (L.per_row(), L.block(32, 96))
                T.fp8_scaled_matmul(A, SA, B, SB_blocks[0:2, 0:3], C, transpose_B=True, scale_layout=layouts)
            elif case == "region inside a group":
                layouts = (L.per_row(), L.block(64, 128))
                T.fp8_scaled_matmul(A[0:64, 64:192], SA, B[0:64, 64:192], SB_square, C, transpose_B=True, scale_layout=layouts)
            else:
                T.fp8_scaled_matmul(A, SA, B, SB, C, transpose_B=True)

    return kernel


REGION_ERRORS = {
    "symbolic M": (ValueError, r"M must be a constant; got rows; tile it"),
    "region along K": (
        ValueError,
        r"K of a region must be a multiple of 128 or reach the end of its buffer; got A with K = 200",
    ),
    "leading axis": (ValueError, r"leading dimensions of A must be fixed; got .*; index them"),
    "B in registers": (TypeError, r"B must be shared, global; got B_f in scope fragment; copy it to shared"),
    "A in registers, K beyond a group": (
        NotImplementedError,
        r"A in a fragment is used whole, .*got K = 256 with groups of 128",
    ),
    "shared tile of symbolic K": (ValueError, r"K of a tile in shared memory or a fragment must be a constant; got K"),
    "region inside a group": (
        ValueError,
        r"a region beside the scales of the whole matrix must begin at a scale group; got B from 64 of K on with groups of 128",
    ),
    "groups": (ValueError, r"scale groups along K must divide one another; got \[96\] and a K tile of 128; use 32 or 128"),
}


@pytest.mark.parametrize("case", REGION_ERRORS)
def test_errors_of_regions(case):
    error, message = REGION_ERRORS[case]
    with pytest.raises(error, match=r"T\.fp8_scaled_matmul: " + message):
        regions(case)


def test_a_native_product_is_refused_on_metal():
    message = r"T\.gemm: require_native_fp8 needs a matrix unit that takes fp8; got Metal, which decodes to half; drop"
    with pytest.raises(NotImplementedError, match=message):
        metal.lower(trace(require_native=True))


def test_scales_whose_shape_proves_nothing():
    """A symbolic width may mean one scale per row or one per block, so the layout must be given."""
    n, K = T.dynamic("n"), 256

    def kernel_with(layout):
        @T.prim_func
        def kernel(
            A: T.Tensor((64, K), F8),
            SA: T.Tensor((64, n), "float32"),
            B: T.Tensor((64, K), F8),
            SB: T.Tensor((64,), "float32"),
            C: T.Tensor((64, 64), "float32"),
        ):
            with T.Kernel(1, threads=128) as _:
                T.fp8_scaled_matmul(A, SA, B, SB, C, transpose_B=True, scale_layout=layout, clear_accum=True)

        return kernel

    with pytest.raises(ValueError, match=r"scale_a must fit .*got shape \[64, n\]; .*pass scale_layout"):
        kernel_with(None)
    (A, SA), (B, SB) = operand(64, K, L.block(1, 128), seed=1), operand(64, K, L.per_row(), seed=2)
    layouts = (L.block(1, 128), L.per_row())
    expected = reference.scaled_matmul(A, SA, B, SB, *layouts)
    check(kernel_with(layouts), (A, SA, B, SB.reshape(-1)), torch.full((64, 64), torch.nan), expected)


def test_example(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "fp8_scaled_matmul.py"), run_name="__main__")
    assert "findings: none" in capsys.readouterr().out

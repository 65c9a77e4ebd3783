"""Fragments that upstream's layouts, or its reductions, do not fit get a layout of ours, or one line that says why not."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import pytest
import torch
from rocm.kernels import attention_products

from tilelang_ext import language as T
from tilelang_ext import metal, simulate
from tilelang_ext.rocm import program

TARGETS = ("metal", "hip -mcpu=gfx942")


def two_types(M, N):
    """A half and a float fragment in one loop: their vectors are not as wide, and 128 threads do not divide the tile."""

    @T.prim_func
    def kernel(A: T.Tensor((M, N), "float16"), C: T.Tensor((M, N), "float32")):
        with T.Kernel(1, threads=128):
            h = T.alloc_fragment((M, N), "float16")
            g = T.alloc_fragment((M, N), "bfloat16")
            f = T.alloc_fragment((M, N), "float32")
            one = T.alloc_fragment((M, N), "float32")
            T.fill(one, 1)
            T.copy(A, h)
            for i, j in T.Parallel(M, N):
                g[i, j] = T.cast(h[i, j], "bfloat16")
            for i, j in T.Parallel(M, N):
                f[i, j] = T.cast(g[i, j], "float32") + T.cast(h[i, j], "float32") + one[i, j]
            T.copy(g, A)
            T.copy(f, C)

    return kernel


@pytest.mark.parametrize("target", TARGETS)
def test_two_types_in_one_loop(target):
    A = torch.arange(960).reshape(24, 40).half()
    C = torch.full((24, 40), torch.nan)
    g = A.bfloat16()
    expected = g.float() + A.float() + 1
    report = simulate(two_types(24, 40), A, C, target=target)
    assert not report.findings, str(report)
    assert torch.equal(C, expected)
    assert torch.equal(A, g.half())


@pytest.mark.parametrize("lower", [metal.lower, lambda func: program.lower(func, TARGETS[1])], ids=["metal", "hip"])
def test_a_thread_would_hold_too_much(lower):
    with pytest.raises(
        ValueError,
        match=r"^T.Parallel: .* got h \(31, 33\) of float16, .*, one \(31, 33\) of float32 and 128 threads; take .*$",
    ):
        lower(two_types(31, 33))


@pytest.mark.parametrize("lower", [metal.lower, lambda func: program.lower(func, TARGETS[1])], ids=["metal", "hip"])
def test_a_reduction_over_threads_that_are_no_power_of_two(lower):
    @T.prim_func
    def kernel(A: T.Tensor((1, 100), "int8"), C: T.Tensor((1, 1), "int8")):
        with T.Kernel(1, threads=96):
            a, c = T.alloc_shared((1, 100), "int8"), T.alloc_fragment((1, 1), "int8")
            T.copy(A, a)
            T.copy(C, c)
            T.reduce_bitand(a, c, dim=1, clear=False)
            T.copy(c, C)

    with pytest.raises(
        ValueError, match=r"^T.Parallel: .* got .*\(1, 100\) of int8 and 96 threads; take threads that divide .*$"
    ):
        lower(kernel)


# Rows, columns, one value; more threads than elements; rows of a power of two, columns not.
@T.prim_func
def reductions(
    A: T.Tensor((20, 12), "float32"),
    B: T.Tensor((3, 8), "float16"),
    D: T.Tensor((40,), "int32"),
    rows: T.Tensor((20,), "float32"),
    columns: T.Tensor((12,), "float32"),
    least: T.Tensor((8,), "float16"),
    total: T.Tensor((1,), "int32"),
):
    with T.Kernel(1, threads=128):
        a = T.alloc_fragment((20, 12), "float32")
        b = T.alloc_fragment((3, 8), "float16")
        d = T.alloc_fragment((40,), "int32")
        a_rows = T.alloc_fragment((20,), "float32")
        a_columns = T.alloc_fragment((12,), "float32")
        b_columns = T.alloc_fragment((8,), "float16")
        d_total = T.alloc_fragment((1,), "int32")
        T.copy(A, a)
        T.copy(B, b)
        T.copy(D, d)
        T.reduce_sum(a, a_rows, dim=1)
        T.copy(columns, a_columns)
        T.reduce_max(a, a_columns, dim=0, clear=False)
        T.reduce_min(b, b_columns, dim=0)
        T.reduce_sum(d, d_total, dim=0)
        T.copy(a_rows, rows)
        T.copy(a_columns, columns)
        T.copy(b_columns, least)
        T.copy(d_total, total)


@pytest.mark.parametrize("target", TARGETS)
def test_reductions_of_any_width(target):
    generator = torch.Generator().manual_seed(0)
    A, B, D = (torch.randint(-99, 99, shape, generator=generator) for shape in ((20, 12), (3, 8), (40,)))
    start = torch.tensor([-200.0, 200.0] * 6)
    rows, columns = torch.full((20,), torch.nan), start.clone()
    least, total = torch.full((8,), torch.nan).half(), torch.full((1,), -1, dtype=torch.int32)
    report = simulate(reductions, A.float(), B.half(), D.int(), rows, columns, least, total, target=target)
    assert not report.findings, str(report)
    assert torch.equal(rows.long(), A.sum(1))
    assert torch.equal(columns, A.float().amax(0).maximum(start))
    assert torch.equal(least.long(), B.amin(0))
    assert total.item() == D.sum()


# Each kernel is laid out for its own threads, whatever those of the others.
@T.prim_func
def two_kernels(A: T.Tensor((16, 48), "float32"), rows: T.Tensor((16,), "float32"), O: T.Tensor((16, 48), "float32")):
    with T.Kernel(2, threads=96) as bx:
        a = T.alloc_fragment((8, 48), "float32")
        r = T.alloc_fragment((8,), "float32")
        T.copy(A[bx * 8, 0], a)
        T.reduce_sum(a, r, dim=1)
        T.copy(r, rows[bx * 8])
    with T.Kernel(2, threads=256) as bx:
        for i, j in T.Parallel(8, 48):
            O[bx * 8 + i, j] = A[bx * 8 + i, j] - rows[bx * 8 + i]


@pytest.mark.parametrize("target", TARGETS)
def test_two_kernels_of_other_threads(target):
    A = torch.arange(768).reshape(16, 48).float()
    rows, O = torch.full((16,), torch.nan), torch.full((16, 48), torch.nan)
    report = simulate(two_kernels, A, rows, O, target=target)
    assert not report.findings, str(report)
    assert torch.equal(rows, A.sum(1))
    assert torch.equal(O, A - A.sum(1, keepdim=True))


# On RDNA an operand's lanes are not an accumulator's; of a row that several simdgroups share, each needs all.
@pytest.mark.parametrize(
    ("target", "M", "N"), [("hip -mcpu=gfx1100", 32, 16), ("hip -mcpu=gfx1201", 16, 32), ("metal", 16, 16)]
)
def test_a_product_of_a_product(target, M, N):
    threads = 128 if target == "metal" else 32
    generator = torch.Generator().manual_seed(0)
    Q, K, V = (torch.randint(-2, 3, shape, generator=generator).half() for shape in ((M, 32), (N, 32), (32, N)))
    O = torch.full((M, 32), torch.nan)
    report = simulate(attention_products("float16", M=M, N=N, D=32, threads=threads), Q, K, V, O, target=target)
    assert not report.findings, str(report)
    assert torch.equal(O, Q.float() @ K.float().T @ V.float().T)


@T.prim_func
def rows_of_rows(x: T.Tensor((4, 5, 4), "float32"), y: T.Tensor((4, 5, 4), "float32")):
    with T.Kernel(1, threads=64):
        ones = T.alloc_shared((4, 5, 4), "float16")
        T.fill(ones, 1)
        for i, j, k in T.Parallel(4, 5, 4):
            total = T.alloc_var("float32", init=0.0)
            for _ in T.serial(2):
                total = total + x[i, j, k]
            y[i, j, k] = total + i + T.cast(ones[i, j, k], "float32")


@pytest.mark.parametrize("target", TARGETS)
def test_rounds_that_end_inside_of_a_row(target):
    x, y = torch.randn(4, 5, 4), torch.full((4, 5, 4), torch.nan)
    report = simulate(rows_of_rows, x, y, target=target)
    assert not report.findings, str(report)
    assert torch.equal(y, 2 * x + torch.arange(4)[:, None, None] + 1)

"""Loops that ask for it read what their elements share once a threadgroup; what a kernel becomes, and what it reads."""

import pytest
import torch
from language.fp8_cases import F8, LAYOUTS, dtype_of, operand
from numeric import assert_close

from tilelang_ext import language as T
from tilelang_ext import metal, reference, simulate
from tilelang_ext.marks import READ_ONCE

BLOCK_M, BLOCK_N, K = 32, 64, 512


@pytest.mark.parametrize(
    ("operands", "name"),
    [
        ("shared", "row"),
        ("shared", "block"),
        ("shared", "row and block"),
        ("global", "tensor"),
        ("global", "block"),
        ("global", "e8m0"),
    ],
)
def test_scales_are_read_once_a_threadgroup(operands, name):
    """2 x 2 tiles: each reads its rows of A and B once, and the scales of its rows and columns once."""
    M, N = 2 * BLOCK_M, 2 * BLOCK_N
    layouts = LAYOUTS[name]
    (A, SA), (B, SB) = operand(M, K, layouts[0], seed=0), operand(N, K, layouts[1], seed=1)
    sliced = [layout.k is not None for layout in layouts]
    steps = K // 128 if operands == "shared" else 1

    def scales_of(buffer, layout, row, rows, t):
        """The scales of a tile; of one step where there is one scale per group."""
        if layout.rows is None:
            return buffer
        first, blocks = row // layout.rows, -(-rows // layout.rows)
        if layout.k is None:
            return buffer[first : first + blocks, 0:1]
        groups = 128 // layout.k
        return buffer[first : first + blocks, t * groups : t * groups + groups]

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), F8),
        SA: T.Tensor(tuple(SA.shape), dtype_of(SA)),
        B: T.Tensor((N, K), F8),
        SB: T.Tensor(tuple(SB.shape), dtype_of(SB)),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(2, 2, threads=128) as (bx, by):
            C_f = T.alloc_fragment((BLOCK_M, BLOCK_N), "float32")
            T.clear(C_f)
            if operands == "shared":
                A_s, B_s = T.alloc_shared((BLOCK_M, 128), F8), T.alloc_shared((BLOCK_N, 128), F8)
                for t in T.Pipelined(steps, num_stages=1):
                    T.copy(A[by * BLOCK_M, t * 128], A_s)
                    T.copy(B[bx * BLOCK_N, t * 128], B_s)
                    T.fp8_scaled_matmul(
                        A_s,
                        scales_of(SA, layouts[0], by * BLOCK_M, BLOCK_M, t),
                        B_s,
                        scales_of(SB, layouts[1], bx * BLOCK_N, BLOCK_N, t),
                        C_f,
                        transpose_B=True,
                        scale_layout=layouts,
                    )
            else:
                A_t, B_t = by * BLOCK_M, bx * BLOCK_N
                T.fp8_scaled_matmul(
                    A[A_t : A_t + BLOCK_M, 0:K],
                    SA,
                    B[B_t : B_t + BLOCK_N, 0:K],
                    SB,
                    C_f,
                    transpose_B=True,
                    scale_layout=layouts,
                )
            T.copy(C_f, C[by * BLOCK_M, bx * BLOCK_N])

    C = torch.full((M, N), torch.nan)
    report = simulate(kernel, A, SA, B, SB, C)
    assert not report.findings, str(report)
    assert_close(C, reference.scaled_matmul(A, SA, B, SB, *layouts), dtype="float32")
    operand_bytes = 4 * (BLOCK_M + BLOCK_N) * K
    scale_bytes = 0  # of the scales that a tile touches, in each step that reads them
    for layout, rows, scale, grouped in zip(layouts, (BLOCK_M, BLOCK_N), (SA, SB), sliced, strict=True):
        blocks, groups = layout.scale_shape(rows, K)
        scale_bytes += 4 * blocks * groups * scale.itemsize * (1 if grouped else steps)
    read = report.counts.device_bytes_read
    assert operand_bytes + scale_bytes <= read <= 1.02 * (operand_bytes + scale_bytes), report


def staged(body, annotate=True):
    """Device bytes read by one 64 x 64 tile of `body` on 128 threads, without findings, and the result."""

    @T.prim_func
    def kernel(row: T.Tensor((64,), "float32"), column: T.Tensor((64,), "float32"), C: T.Tensor((64, 64), "float32")):
        with T.Kernel(1, threads=128) as _:
            C_f = T.alloc_fragment((64, 64), "float32")
            for i, j in T.Parallel(64, 64, annotations={READ_ONCE: 1} if annotate else None):
                C_f[i, j] = body(row, column, i, j)
            T.copy(C_f, C)

    row, column, C = torch.arange(64.0), torch.arange(64.0) / 64, torch.full((64, 64), torch.nan)
    report = simulate(kernel, row, column, C)
    assert not report.findings, str(report)
    return report.counts, C, row[:, None], column


def test_only_loops_that_ask():
    counts, C, row, column = staged(lambda row, column, i, j: row[i] * column[j])
    assert (counts.device_bytes_read, counts.threadgroup_barriers) == (2 * 64 * 4, 1)
    torch.testing.assert_close(C, row * column, rtol=0, atol=0)
    counts, *_ = staged(lambda row, column, i, j: row[i] * column[j], annotate=False)
    assert counts.device_bytes_read > 2 * 64 * 4
    assert counts.threadgroup_barriers == 0


def test_what_all_elements_share_is_one_element():
    counts, C, row, column = staged(lambda row, column, i, j: row[3] * column[5] + T.cast(i + j, "float32"))
    assert counts.device_bytes_read == 2 * 4
    torch.testing.assert_close(C[1, 2], row[3, 0] * column[5] + 3, rtol=0, atol=0)


def test_factors_of_different_variables_are_staged_apart():
    counts, C, row, column = staged(lambda row, column, i, j: row[i] * column[5] + T.cast(j, "float32"))
    assert counts.device_bytes_read == (64 + 1) * 4
    torch.testing.assert_close(C[4, 2], row[4, 0] * column[5] + 2, rtol=0, atol=0)


def test_reads_that_a_condition_guards_stay_there():
    """Read anyway, the index would leave the tensor: a condition on both variables cannot move with it."""
    counts, C, row, column = staged(
        lambda row, column, i, j: T.if_then_else(i < j, column[j] + row[i + 1], T.float32(-1)),
    )
    assert counts.device_bytes_read > 2 * 64 * 4
    assert C[63, 63] == -1
    assert C[2, 7] == column[7] + row[3, 0]


def test_a_condition_on_what_is_staged_moves_with_it():
    counts, C, row, column = staged(
        lambda row, column, i, j: T.if_then_else(i < 63, row[i + 1], T.float32(-1)) * column[j],
    )
    assert counts.device_bytes_read == (63 + 64) * 4
    assert C[63, 63] == -column[63]
    assert C[2, 7] == row[3, 0] * column[7]


def test_buffers_that_the_kernel_writes_are_read_where_they_are():
    @T.prim_func
    def kernel(scale: T.Tensor((64,), "float32"), C: T.Tensor((64, 64), "float32")):
        with T.Kernel(1, threads=128) as _:
            C_f = T.alloc_fragment((64, 64), "float32")
            for i, j in T.Parallel(64, 64, annotations={READ_ONCE: 1}):
                C_f[i, j] = scale[i] + C[0, j]
            T.copy(C_f, C)
            for i in T.Parallel(64):
                scale[i] = T.float32(0)

    assert "scale_s" not in metal.lower(kernel).source


def test_what_every_element_has_for_itself_is_read_where_it_is():
    @T.prim_func
    def kernel(R: T.Tensor((64, 64), "float32"), row: T.Tensor((64,), "float32"), C: T.Tensor((64, 64), "float32")):
        with T.Kernel(1, threads=128) as _:
            C_f = T.alloc_fragment((64, 64), "float32")
            for i, j in T.Parallel(64, 64, annotations={READ_ONCE: 1}):
                C_f[i, j] = R[i, j] + row[i]
            T.copy(C_f, C)

    source = metal.lower(kernel).source
    assert "row_s" in source
    assert "R_s" not in source


def test_a_condition_on_another_variable_than_the_read():
    counts, C, row, _ = staged(lambda row, column, i, j: T.if_then_else(j < 60, row[3], T.float32(0)))
    assert counts.device_bytes_read == 60 * 4
    assert (C[5, 59], C[5, 60]) == (row[3, 0], 0)


def test_statements_under_an_if_read_where_they_are():
    """Staged, `row[i + 1]` would be read for i = 63 too, where there is no such element."""

    @T.prim_func
    def kernel(row: T.Tensor((64,), "float32"), column: T.Tensor((64,), "float32"), C: T.Tensor((64, 64), "float32")):
        with T.Kernel(1, threads=128) as _:
            C_f = T.alloc_fragment((64, 64), "float32")
            T.fill(C_f, -1)
            for i, j in T.Parallel(64, 64, annotations={READ_ONCE: 1}):
                if i < 63:
                    C_f[i, j] = row[i + 1] * column[j]
            T.copy(C_f, C)

    row, column, C = torch.arange(64.0) + 1, torch.arange(64.0) / 64, torch.full((64, 64), torch.nan)
    report = simulate(kernel, row, column, C, strict=True)
    assert not report.findings, str(report)
    assert report.counts.device_bytes_read > (63 + 64) * 4
    assert torch.equal(C[:63], row[1:, None] * column)
    assert (C[63] == -1).all()

"""A variable that the loop assigns once per round may index what a pipelined copy reads, on Metal and on AMD."""

import pytest
import tilelang.layout
import torch
from tvm import IRModule

from tilelang_ext import language as T
from tilelang_ext import simulate
from tilelang_ext.passes.pipelined_scalars import ForwardPipelinedScalars


@T.prim_func
def paged(
    K: T.Tensor((8, 32, 64), "float16"),
    table: T.Tensor((5,), "int32"),
    Q: T.Tensor((32, 64), "float16"),
    out: T.Tensor((5, 32, 32), "float32"),
    last: T.Tensor((1,), "int32"),
):
    with T.Kernel(1, threads=64):
        q_s, k_s = T.alloc_shared((32, 64), "float16"), T.alloc_shared((32, 64), "float16")
        c_f = T.alloc_fragment((32, 32), "float32")
        page = T.alloc_var("int32")
        T.annotate_layout({q_s: tilelang.layout.make_swizzled_layout(q_s)})
        T.copy(Q, q_s)
        for i in T.Pipelined(5, num_stages=2):
            page = table[i]
            T.copy(K[page, 0:32, 0:64], k_s)
            T.gemm(q_s, k_s, c_f, transpose_B=True, clear_accum=True)
            T.copy(c_f, out[i, 0:32, 0:32])
        last[0] = page


@pytest.mark.parametrize("target", ["metal", "metal4", "hip -mcpu=gfx942"])
def test_values(target):
    """The operand's swizzled layout is a hint, which Metal's padded rows take the place of."""
    K, Q = torch.randn(8, 32, 64).half(), torch.randn(32, 64).half()
    table, last = torch.tensor([3, 7, 0, 3, 6], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    out = torch.full((5, 32, 32), torch.nan)
    report = simulate(paged, K, table, Q, out, last, target=target)
    assert not report.findings, str(report)
    expected = torch.einsum("qd,ikd->iqk", Q.double(), K.double()[table.long()])
    assert (out.double() - expected).abs().max() < 1e-4
    assert last.item() == 6


def test_what_the_loop_changes_is_not_moved():
    @T.prim_func
    def kernel(K: T.Tensor((8, 32), "float32"), table: T.Tensor((5, 4), "int32"), out: T.Tensor((5, 32), "float32")):
        with T.Kernel(1, threads=64):
            k_s, table_s = T.alloc_shared((32,), "float32"), T.alloc_shared((4,), "int32")
            copied, once, counted, sometimes = (
                T.alloc_var("int32"),
                T.alloc_var("int32"),
                T.alloc_var("int32"),
                T.alloc_var("int32"),
            )
            for i in T.Pipelined(5, num_stages=2):
                T.copy(table[i, 0:4], table_s)
                copied = table_s[0]
                once = table[i, 1]
                counted = counted + 1
                if i > 2:
                    sometimes = table[i, 2]
                T.copy(K[copied + once + counted + sometimes, 0:32], k_s)
                T.copy(k_s, out[i, 0:32])

    text = ForwardPipelinedScalars(IRModule({"kernel": kernel}))["kernel"].script()
    assert "K[copied[0] + table[i, 1] + counted[0] + sometimes[0], 0]" in text


def test_in_a_loop_whose_body_is_a_block():

    @T.prim_func
    def kernel(K: T.Tensor((8, 32), "float32"), table: T.Tensor((5,), "int32"), out: T.Tensor((5, 32), "float32")):
        with T.Kernel(1, threads=64):
            page = T.alloc_var("int32")
            k_s = T.alloc_shared((32,), "float32")
            for i in T.Pipelined(5, num_stages=2):
                with T.sblock("round"):
                    page = table[i]
                    T.copy(K[page, 0:32], k_s)
                    T.copy(k_s, out[i, 0:32])

    text = ForwardPipelinedScalars(IRModule({"kernel": kernel}))["kernel"].script()
    assert "K[table[i], 0]" in text
    K, table = torch.randn(8, 32), torch.tensor([3, 7, 0, 3, 6], dtype=torch.int32)
    out = torch.full((5, 32), torch.nan)
    assert simulate(kernel, K, table, out).findings == ()
    assert torch.equal(out, K[table.long()])


@T.prim_func
def index_in_shared_memory(A: T.Tensor((128,), "float16"), B: T.Tensor((128,), "float16")):
    with T.Kernel(1, threads=32):
        tile = T.alloc_shared((32,), "float16")
        index = T.alloc_shared((1,), "int32")
        for k in T.Pipelined(4, num_stages=2):
            index[0] = 96 - k * 32
            start = index[0]
            T.copy(A[start], tile)
            for i in T.Parallel(32):
                B[k * 32 + i] = tile[i] + T.float16(1)


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx942"])
def test_index_in_shared_memory(target):
    """What the loop writes there in one round, the copy of that round reads: upstream's pipeline has no order for it."""
    a, b = torch.randn(128).half(), torch.full((128,), torch.nan).half()
    assert simulate(index_in_shared_memory, a, b, target=target).findings == ()
    assert torch.equal(b, a.view(4, 32).flip(0).flatten() + 1)

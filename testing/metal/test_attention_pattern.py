"""The inner pattern of flash attention: S = Q K^T, online softmax, P as a register operand, rescaled output."""

import numpy as np
import pytest
import torch
from metal.kernels import float64, poisoned, random_tensor
from numeric import assert_close

from tilelang_ext import language as T
from tilelang_ext import simulate


def attention(S, D, block_M, block_N, threads, dtype):
    scale = 1.4426950408889634 / D**0.5

    @T.prim_func
    def kernel(Q: T.Tensor((S, D), dtype), K: T.Tensor((S, D), dtype), V: T.Tensor((S, D), dtype), O: T.Tensor((S, D), dtype)):
        with T.Kernel(T.ceildiv(S, block_M), threads=threads) as bx:
            Q_s = T.alloc_shared((block_M, D), dtype)
            K_s = T.alloc_shared((block_N, D), dtype)
            V_s = T.alloc_shared((block_N, D), dtype)
            s = T.alloc_fragment((block_M, block_N), "float32")
            p = T.alloc_fragment((block_M, block_N), dtype)
            o = T.alloc_fragment((block_M, D), "float32")
            m = T.alloc_fragment((block_M,), "float32")
            m_old = T.alloc_fragment((block_M,), "float32")
            rescale = T.alloc_fragment((block_M,), "float32")
            row_sum = T.alloc_fragment((block_M,), "float32")
            length = T.alloc_fragment((block_M,), "float32")
            T.copy(Q[bx * block_M, 0], Q_s)
            T.fill(o, 0)
            T.fill(length, 0)
            T.fill(m, -T.infinity("float32"))
            for k in T.Pipelined(T.ceildiv(S, block_N), num_stages=1):
                T.copy(K[k * block_N, 0], K_s)
                T.copy(V[k * block_N, 0], V_s)
                for i, j in T.Parallel(block_M, block_N):
                    s[i, j] = T.if_then_else(k * block_N + j < S, 0.0, -T.infinity("float32"))
                T.gemm(Q_s, K_s, s, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
                T.copy(m, m_old)
                T.reduce_max(s, m, dim=1, clear=False)
                for i in T.Parallel(block_M):
                    rescale[i] = T.exp2((m_old[i] - m[i]) * scale)
                for i, j in T.Parallel(block_M, block_N):
                    s[i, j] = T.exp2((s[i, j] - m[i]) * scale)
                T.reduce_sum(s, row_sum, dim=1)
                for i in T.Parallel(block_M):
                    length[i] = length[i] * rescale[i] + row_sum[i]
                for i, j in T.Parallel(block_M, D):
                    o[i, j] *= rescale[i]
                T.copy(s, p)
                T.gemm(p, V_s, o, policy=T.GemmWarpPolicy.FullRow)
            for i, j in T.Parallel(block_M, D):
                o[i, j] /= length[i]
            T.copy(o, O[bx * block_M, 0])

    return kernel


@pytest.mark.parametrize(
    ("S", "D", "block_M", "block_N", "threads", "dtype"),
    [
        (64, 64, 32, 32, 128, "float16"),
        (70, 64, 32, 32, 64, "bfloat16"),  # ragged: the last block of keys is masked
        (64, 128, 16, 32, 64, "float16"),
    ],
)
def test_flash_attention_inner_pattern(S, D, block_M, block_N, threads, dtype):
    Q, K, V = (random_tensor((S, D), dtype, i) for i in range(3))
    O = poisoned((S, D), dtype)
    report = simulate(attention(S, D, block_M, block_N, threads, dtype), Q, K, V, O)
    assert not report.findings, str(report)
    q, k, v = (torch.from_numpy(float64(t)) for t in (Q, K, V))
    expected = (torch.softmax(q @ k.T / D**0.5, dim=-1) @ v).numpy()
    actual = float64(O)
    # P is rounded to `dtype` before the second product: as torch does it, at most twice its error.
    torch_error = np.abs(
        float64(torch.nn.functional.scaled_dot_product_attention(Q[None], K[None], V[None])[0]) - expected
    ).max()
    assert np.isfinite(actual).all()
    assert np.abs(actual - expected).max() <= max(2 * torch_error, 2e-3 if dtype == "float16" else 1.6e-2)
    assert_close(O, expected, dtype=dtype, max_error=2e-2)


def test_probabilities_stay_in_registers():
    """The accumulator's layout is the operand's, so P moves neither through threadgroup memory nor between lanes."""

    @T.prim_func
    def kernel(A: T.Tensor((32, 32), "float16"), B: T.Tensor((32, 32), "float16"), C: T.Tensor((32, 32), "float32")):
        with T.Kernel(1, threads=64) as _:
            A_s = T.alloc_shared((32, 32), "float16")
            B_s = T.alloc_shared((32, 32), "float16")
            s = T.alloc_fragment((32, 32), "float32")
            p = T.alloc_fragment((32, 32), "float16")
            c = T.alloc_fragment((32, 32), "float32")
            T.copy(A, A_s)
            T.copy(B, B_s)
            T.gemm(A_s, B_s, s, clear_accum=True, policy=T.GemmWarpPolicy.FullRow)
            T.copy(s, p)
            T.gemm(p, B_s, c, clear_accum=True, policy=T.GemmWarpPolicy.FullRow)
            T.copy(c, C)

    A, B, C = (
        random_tensor((32, 32), "float16", 0),
        random_tensor((32, 32), "float16", 1),
        poisoned((32, 32), "float32"),
    )
    report = simulate(kernel, A, B, C)
    assert not report.findings, str(report)
    assert report.counts.shuffles == 0
    first = (float64(A) @ float64(B)).astype(np.float16).astype(np.float64)
    assert_close(C, first @ float64(B), dtype="float32", max_error=5e-3)
    stored = 2 * 32 * 32 * 2  # A and B once; nothing of s or p
    assert report.counts.threadgroup_bytes_written == stored

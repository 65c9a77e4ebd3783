"""The inner pattern of flash attention: S = Q K^T, online softmax, P as a register operand, rescaled output."""

import numpy as np
import pytest
import torch
from metal.kernels import attention, float64, poisoned, random_tensor
from numeric import assert_close

from tilelang_ext import language as T
from tilelang_ext import simulate


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

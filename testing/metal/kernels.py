"""Kernels and reference values that the Metal tests share."""

import math

import numpy as np
import torch

from tilelang_ext import language as T

TORCH = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


def random_tensor(shape, dtype: str, seed: int) -> torch.Tensor:
    """Normal values; fp8 types get every finite magnitude that the format holds near one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(TORCH[dtype])


def poisoned(shape, dtype: str) -> torch.Tensor:
    """An output full of NaN, so that an element nobody writes is seen."""
    return torch.full(shape, float("nan")).to(TORCH[dtype])


def float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().numpy().astype(np.float64)


def gemm(
    M, N, K, block_M=64, block_N=64, block_K=32, *,
    a="float16", b="float16", out="float32", accum_dtype="float32", trans_A=False, trans_B=False,
    a_scope="shared", b_scope="shared", accumulator="fragment",
    threads=128, num_stages=0, policy=T.GemmWarpPolicy.Square, swizzle=False,
):  # fmt: skip
    """C = A @ B by tiles; the accumulator is a fragment or a shared tile, operands shared or fragments."""
    a_shape = (K, M) if trans_A else (M, K)
    b_shape = (N, K) if trans_B else (K, N)
    a_tile = (block_K, block_M) if trans_A else (block_M, block_K)
    b_tile = (block_N, block_K) if trans_B else (block_K, block_N)

    @T.prim_func
    def kernel(A: T.Tensor(a_shape, a), B: T.Tensor(b_shape, b), C: T.Tensor((M, N), out)):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=threads) as (bx, by):
            A_s = T.alloc_shared(a_tile, a)
            B_s = T.alloc_shared(b_tile, b)
            A_f = T.alloc_fragment(a_tile, a)
            B_f = T.alloc_fragment(b_tile, b)
            C_f = (
                T.alloc_fragment((block_M, block_N), accum_dtype)
                if accumulator == "fragment"
                else T.alloc_shared((block_M, block_N), accum_dtype)
            )
            if swizzle:
                T.use_swizzle(2)
            T.clear(C_f)
            for k in T.Pipelined(T.ceildiv(K, block_K), num_stages=num_stages):
                if trans_A:
                    T.copy(A[k * block_K, by * block_M], A_s)
                else:
                    T.copy(A[by * block_M, k * block_K], A_s)
                if trans_B:
                    T.copy(B[bx * block_N, k * block_K], B_s)
                else:
                    T.copy(B[k * block_K, bx * block_N], B_s)
                if a_scope == "fragment":
                    T.copy(A_s, A_f)
                if b_scope == "fragment":
                    T.copy(B_s, B_f)
                T.gemm(
                    A_f if a_scope == "fragment" else A_s,
                    B_f if b_scope == "fragment" else B_s,
                    C_f,
                    transpose_A=trans_A,
                    transpose_B=trans_B,
                    policy=policy,
                )
            T.copy(C_f, C[by * block_M, bx * block_N])

    return kernel


def gemm_reference(A: torch.Tensor, B: torch.Tensor, trans_A=False, trans_B=False) -> np.ndarray:
    a, b = float64(A), float64(B)
    return (a.T if trans_A else a) @ (b.T if trans_B else b)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


EPILOGUES = {
    "none": lambda c, bias, row, col, residual: c,
    "bias": lambda c, bias, row, col, residual: c + bias,
    "row_and_column_scale": lambda c, bias, row, col, residual: c * row[:, None] * col,
    "relu": lambda c, bias, row, col, residual: np.maximum(c + bias, 0),
    "gelu": lambda c, bias, row, col, residual: gelu(c),
    "residual": lambda c, bias, row, col, residual: c + residual,
}


def gemm_with_epilogue(M, N, K, epilogue, out, block=64, block_K=32):
    """C = A @ B, then one of EPILOGUES on the accumulator."""

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), "float16"),
        B: T.Tensor((K, N), "float16"),
        bias: T.Tensor((N,), "float32"),
        row: T.Tensor((M,), "float32"),
        col: T.Tensor((N,), "float32"),
        residual: T.Tensor((M, N), out),
        C: T.Tensor((M, N), out),
    ):
        with T.Kernel(T.ceildiv(N, block), T.ceildiv(M, block), threads=128) as (bx, by):
            A_s = T.alloc_shared((block, block_K), "float16")
            B_s = T.alloc_shared((block_K, block), "float16")
            C_f = T.alloc_fragment((block, block), "float32")
            T.clear(C_f)
            for k in T.Pipelined(T.ceildiv(K, block_K), num_stages=2):
                T.copy(A[by * block, k * block_K], A_s)
                T.copy(B[k * block_K, bx * block], B_s)
                T.gemm(A_s, B_s, C_f)
            for i, j in T.Parallel(block, block):
                if epilogue == "bias":
                    C_f[i, j] += bias[bx * block + j]
                elif epilogue == "row_and_column_scale":
                    C_f[i, j] = C_f[i, j] * row[by * block + i] * col[bx * block + j]
                elif epilogue == "relu":
                    C_f[i, j] = T.max(C_f[i, j] + bias[bx * block + j], 0.0)
                elif epilogue == "gelu":
                    C_f[i, j] = 0.5 * C_f[i, j] * (1.0 + T.erf(C_f[i, j] * 0.7071067811865476))
                elif epilogue == "residual":
                    C_f[i, j] += T.cast(residual[by * block + i, bx * block + j], "float32")
            T.copy(C_f, C[by * block, bx * block])

    return kernel


def attention(S, D, block_M, block_N, threads, dtype):
    """The inner loop of flash attention, with keys past S masked."""
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


@T.prim_func
def scale(
    A: T.Tensor((64, 32), "float16"),
    B: T.Tensor((64, 32), "bfloat16"),
    s: T.float32,
    n: T.int32,
):
    with T.Kernel(2, threads=32) as bx:
        for i, j in T.Parallel(32, 32):
            B[bx * 32 + i, j] = (A[bx * 32 + i, j].astype("float32") * s + n).astype("bfloat16")

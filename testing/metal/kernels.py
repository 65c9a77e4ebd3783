"""Kernels and reference values that the Metal tests share."""

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

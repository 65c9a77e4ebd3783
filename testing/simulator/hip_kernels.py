"""Tile programs whose HIP text the simulator's tests run."""

# Without `from __future__ import annotations`: this file holds kernels.

import torch

from tilelang_ext import language as T

ARCHS = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")


def target(arch):
    return {"kind": "hip", "mcpu": arch}


def gemm(M, N, K, dtype, *, block=(64, 64, 32), accum="float32", trans_B=True, threads=128, num_stages=1):
    """C (M, N) = A (M, K) B, with B (N, K) if trans_B, else (K, N)."""
    block_M, block_N, block_K = block

    @T.prim_func
    def kernel(A: T.Tensor((M, K), dtype), B: T.Tensor((N, K) if trans_B else (K, N), dtype), C: T.Tensor((M, N), accum)):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=threads) as (bx, by):
            A_s = T.alloc_shared((block_M, block_K), dtype)
            B_s = T.alloc_shared((block_N, block_K) if trans_B else (block_K, block_N), dtype)
            C_f = T.alloc_fragment((block_M, block_N), accum)
            T.clear(C_f)
            for k in T.Pipelined(T.ceildiv(K, block_K), num_stages=num_stages):
                T.copy(A[by * block_M, k * block_K], A_s)
                if trans_B:
                    T.copy(B[bx * block_N, k * block_K], B_s)
                else:
                    T.copy(B[k * block_K, bx * block_N], B_s)
                T.gemm(A_s, B_s, C_f, transpose_B=trans_B)
            T.copy(C_f, C[by * block_M, bx * block_N])

    return kernel


def operands(M, N, K, dtype, accum="float32", seed=0):
    """A (M, K), B (N, K), a C of NaN (or -1), and the float64 product of the operands' values."""
    generator = torch.Generator().manual_seed(seed)
    torch_dtype = getattr(torch, dtype)
    if dtype == "int8":
        a, b = (torch.randint(-128, 128, (rows, K), generator=generator).to(torch_dtype) for rows in (M, N))
    else:
        a, b = (torch.randn(rows, K, generator=generator).to(torch_dtype) for rows in (M, N))
    c = torch.full((M, N), -1 if accum == "int32" else float("nan"), dtype=getattr(torch, accum))
    return a, b, c, a.double() @ b.double().T

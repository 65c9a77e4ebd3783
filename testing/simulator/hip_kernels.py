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


def attention(dtype, *, N=128, D=64, block_M=64, block_N=32, threads=128):
    """O (64, D) = softmax(Q K^T) V over N keys in steps of block_N, with a running maximum and sum."""

    @T.prim_func
    def kernel(
        Q: T.Tensor((block_M, D), dtype),
        K: T.Tensor((N, D), dtype),
        V: T.Tensor((N, D), dtype),
        O: T.Tensor((block_M, D), "float32"),
    ):
        with T.Kernel(1, threads=threads):
            Q_s = T.alloc_shared((block_M, D), dtype)
            K_s = T.alloc_shared((block_N, D), dtype)
            V_s = T.alloc_shared((block_N, D), dtype)
            P_s = T.alloc_shared((block_M, block_N), dtype)
            S_f = T.alloc_fragment((block_M, block_N), "float32")
            O_f = T.alloc_fragment((block_M, D), "float32")
            top = T.alloc_fragment((block_M,), "float32")
            before = T.alloc_fragment((block_M,), "float32")
            rescale = T.alloc_fragment((block_M,), "float32")
            part = T.alloc_fragment((block_M,), "float32")
            total = T.alloc_fragment((block_M,), "float32")
            T.copy(Q, Q_s)
            T.clear(O_f)
            T.clear(total)
            T.fill(top, -T.infinity("float32"))
            for n in T.serial(N // block_N):
                T.copy(K[n * block_N, 0], K_s)
                T.copy(V[n * block_N, 0], V_s)
                T.clear(S_f)
                T.gemm(Q_s, K_s, S_f, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
                T.copy(top, before)
                T.reduce_max(S_f, top, dim=1, clear=False)
                for i in T.Parallel(block_M):
                    rescale[i] = T.exp(before[i] - top[i])
                for i, j in T.Parallel(block_M, block_N):
                    S_f[i, j] = T.exp(S_f[i, j] - top[i])
                T.reduce_sum(S_f, part, dim=1)
                for i in T.Parallel(block_M):
                    total[i] = total[i] * rescale[i] + part[i]
                for i, j in T.Parallel(block_M, D):
                    O_f[i, j] *= rescale[i]
                T.copy(S_f, P_s)
                T.gemm(P_s, V_s, O_f, policy=T.GemmWarpPolicy.FullRow)
            for i, j in T.Parallel(block_M, D):
                O_f[i, j] /= total[i]
            T.copy(O_f, O)

    return kernel


def cast(N, source, result, threads=64):
    """y[i] = x[i] in another type."""

    @T.prim_func
    def kernel(x: T.Tensor((N,), source), y: T.Tensor((N,), result)):
        with T.Kernel(T.ceildiv(N, threads), threads=threads) as block:
            for i in T.Parallel(threads):
                y[block * threads + i] = T.cast(x[block * threads + i], result)

    return kernel


def scale_rows(columns=96):
    """y[i, j] = factor * x[i, j] for as many rows as x has."""
    rows = T.dynamic("rows")

    @T.prim_func
    def kernel(x: T.Tensor((rows, columns), "float32"), factor: T.float32, y: T.Tensor((rows, columns), "float32")):
        with T.Kernel(rows, threads=32) as row:
            for j in T.Parallel(columns):
                y[row, j] = factor * x[row, j]

    return kernel


def row_statistics(rows=4, columns=512, threads=256):
    """Sum, maximum and minimum over each row, across waves."""

    @T.prim_func
    def kernel(
        x: T.Tensor((rows, columns), "float32"), total: T.Tensor((rows,), "float32"), most: T.Tensor((rows,), "float32"),
        least: T.Tensor((rows,), "float32"),
    ):  # fmt: skip
        with T.Kernel(rows, threads=threads) as row:
            values = T.alloc_fragment((1, columns), "float32")
            result = T.alloc_fragment((1,), "float32")
            T.copy(x[row : row + 1, :], values)
            T.reduce_sum(values, result, dim=1)
            T.copy(result, total[row : row + 1])
            T.reduce_max(values, result, dim=1)
            T.copy(result, most[row : row + 1])
            T.reduce_min(values, result, dim=1)
            T.copy(result, least[row : row + 1])

    return kernel

"""Operands and a kernel of T.mxfp4_scaled_matmul that the tests of every target share."""

# Without `from __future__ import annotations`: this file holds kernels.

import torch

from tilelang_ext import formats, quantization, reference
from tilelang_ext import language as T

L = T.BlockScaledLayout
MX, ROW = L.e8m0_k32(), L.per_row()
KINDS = ["bfloat16", "float16", "fp8 per row", "e5m2 per row", "fp8 per 32", "fp4 per 32"]


def values(rows, K, seed):
    """Magnitudes that change by powers of two from row to row and from group to group."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-3, 4, (rows, 1), generator=generator) + torch.randint(-3, 4, (1, K // 32), generator=generator)
    return torch.randn(rows, K, generator=generator) * torch.exp2(exponents.float()).repeat_interleave(32, 1)


def weights(N, K, seed=1):
    return quantization.quantize(values(N, K, seed), formats.E2M1, MX)


def activations(kind, M, K, seed=0):
    """Return (codes, scales or None, the numbers that they stand for)."""
    x = values(M, K, seed)
    if kind in ("bfloat16", "float16"):
        codes = x.to(getattr(torch, kind))
        return codes, None, codes.double()
    element = {"fp8": formats.E4M3, "e5m2": formats.E5M2, "fp4": formats.E2M1}[kind.split()[0]]
    layout = ROW if kind.endswith("row") else MX
    codes, scale = quantization.quantize(x, element, layout)
    return codes, scale, reference.dequantize(codes, scale, element, layout)


def name_of(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def tiled(A, SA, W, block_M=32, block_N=64, threads=64):
    """C = A W^T, one tile per block; the intrinsic stages K itself, rows and columns end inside a tile."""
    M, N, K = A.shape[0], W.shape[0], W.shape[1] * 2
    KA, wide = A.shape[1], SA is None
    scale_shape, scale_dtype = ((1, 1), "uint8") if wide else (tuple(SA.shape), name_of(SA))

    @T.prim_func
    def kernel(
        A: T.Tensor((M, KA), name_of(A)),
        SA: T.Tensor(scale_shape, scale_dtype),
        W: T.Tensor((N, K // 2), "uint8"),
        SW: T.Tensor((N, K // 32), "uint8"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=threads) as (bx, by):
            i, j = by * block_M, bx * block_N
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            T.mxfp4_scaled_matmul(
                A[i : i + block_M, 0:KA],
                None if wide else SA[i : i + block_M, 0 : scale_shape[1]],
                W[j : j + block_N, 0 : K // 2],
                SW[j : j + block_N, 0 : K // 32],
                C_f,
                clear_accum=True,
            )
            T.copy(C_f, C[i, j])

    return kernel

"""MXFP4 weights in one intrinsic: a product of 16-bit or fp8 activations, fast on Hopper from one row to thousands.

    python examples/mxfp4_scaled_matmul.py

On a Hopper GPU it runs there, elsewhere its Metal text runs in the simulator, with small tiles.
"""

from typing import NamedTuple

import tilelang
import torch

from tilelang_ext import formats, quantization, reference, simulate
from tilelang_ext import language as T


class Tile(NamedTuple):
    """What a block computes: rows of A by rows of W."""

    block_M: int
    block_N: int
    threads: int


FEW, SOME, MANY = Tile(8, 32, 256), Tile(16, 32, 256), Tile(256, 128, 256)  # up to 8 rows, up to 16, more


# [kernel]
def scaled_matmul(M, N, K, tile, dtype="bfloat16", chained=False):
    """C = A @ W^T; A (M, K) bfloat16 or fp8 with one scale per row, W (N, K) MXFP4, C (M, N) bfloat16.

    A `chained` kernel, on CUDA, begins while the one before it on the stream still runs, and waits for what that one writes.
    """
    block_M, block_N, threads = tile
    wide = dtype in ("bfloat16", "float16")

    @T.prim_func
    def scaled_matmul(
        A: T.Tensor((M, K), dtype),
        scale_a: T.Tensor((M,), "float32"),  # not read if A is bfloat16
        W: T.Tensor((N, K // 2), "uint8"),
        scale_w: T.Tensor((N, K // 32), "uint8"),
        C: T.Tensor((M, N), "bfloat16"),
    ):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=threads) as (bx, by):
            if chained:
                T.pdl_trigger()
                T.pdl_sync()
            i, j = by * block_M, bx * block_N
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            T.mxfp4_scaled_matmul(
                A[i : i + block_M, 0:K],
                None if wide else scale_a[i : i + block_M],
                W[j : j + block_N, 0 : K // 2],
                scale_w[j : j + block_N, 0 : K // 32],
                C_f,
                clear_accum=True,
            )
            T.copy(C_f, C[i, j])

    return scaled_matmul


# [/kernel]


# [dequant]
def dequant_matmul(M, N, K, tile, chained=False):
    """The same product of bfloat16 in a loop of tiles, decoded by `T.mxfp4_dequant` for `T.gemm`; K is a multiple of 64."""
    block_M, block_N, threads = tile

    @T.prim_func
    def dequant_matmul(
        A: T.Tensor((M, K), "bfloat16"),
        W: T.Tensor((N, K // 2), "uint8"),
        scale_w: T.Tensor((N, K // 32), "uint8"),
        C: T.Tensor((M, N), "bfloat16"),
    ):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=threads) as (bx, by):
            A_s = T.alloc_shared((block_M, 64), "bfloat16")
            W_s = T.alloc_shared((block_N, 32), "uint8")
            W_d = T.alloc_shared((block_N, 64), "bfloat16")
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            if chained:
                T.pdl_trigger()
                T.pdl_sync()
            i, j = by * block_M, bx * block_N
            T.clear(C_f)
            for k in T.Pipelined(K // 64, num_stages=3):
                T.copy(A[i, k * 64], A_s)
                T.copy(W[j, k * 32], W_s)
                T.mxfp4_dequant(W_s, scale_w[j : j + block_N, k * 2 : k * 2 + 2], W_d)
                T.gemm(A_s, W_d, C_f, transpose_B=True)
            T.copy(C_f, C[i, j])

    return dequant_matmul


# [/dequant]


def main() -> None:
    """Check the kernel: on the GPU as it would be used, in the simulator with tiles that it runs soon."""
    torch.manual_seed(0)
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    M, N, K = (300, 4096, 4096) if hopper else (40, 72, 128)
    A, scale_a = torch.randn(M, K).to(torch.bfloat16), torch.ones(M)
    W, scale_w = quantization.quantize(torch.randn(N, K), formats.E2M1, T.BlockScaledLayout.e8m0_k32())
    C, expected = torch.empty(M, N, dtype=torch.bfloat16), reference.mxfp4_matmul(A, W, scale_w)
    if hopper:
        C = C.cuda()
        tilelang.compile(scaled_matmul(M, N, K, MANY))(*(tensor.cuda() for tensor in (A, scale_a, W, scale_w)), C)
    else:
        print(simulate(scaled_matmul(M, N, K, Tile(32, 32, 64)), A, scale_a, W, scale_w, C, target="metal"))
    error = (C.cpu().double() - expected).abs().max() / expected.abs().max()
    print(f"largest error against float64: {error:.1e} of the largest value")


if __name__ == "__main__":
    main()

"""FP8 scaled matmul in one intrinsic, with DeepSeek's block scales: 1x128 for activations and 128x128 for weights.

python examples/fp8_scaled_matmul.py
"""

import torch

from tilelang_ext import formats, quantization, reference, simulate
from tilelang_ext import language as T

ACTIVATIONS, WEIGHTS = T.BlockScaledLayout.block(1, 128), T.BlockScaledLayout.block(128, 128)


def scaled_matmul(M, N, K, block_M=64, block_N=64, threads=128):
    """C = (A * scale_a) @ (B * scale_b)^T; A (M, K) and B (N, K) e4m3, C (M, N) bfloat16."""

    @T.prim_func
    def scaled_matmul(
        A: T.Tensor((M, K), "float8_e4m3fn"),
        scale_a: T.Tensor((M, T.ceildiv(K, 128)), "float32"),
        B: T.Tensor((N, K), "float8_e4m3fn"),
        scale_b: T.Tensor((T.ceildiv(N, 128), T.ceildiv(K, 128)), "float32"),
        C: T.Tensor((M, N), "bfloat16"),
    ):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=threads) as (bx, by):
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            T.fp8_scaled_matmul(
                A[by * block_M : (by + 1) * block_M, 0:K],
                scale_a,
                B[bx * block_N : (bx + 1) * block_N, 0:K],
                scale_b,
                C_f,
                transpose_B=True,
                scale_layout=(ACTIVATIONS, WEIGHTS),
                clear_accum=True,
            )
            T.copy(C_f, C[by * block_M, bx * block_N])

    return scaled_matmul


def main() -> None:
    torch.manual_seed(0)
    M, N, K = 100, 192, 512
    A, scale_a = quantization.quantize(torch.randn(M, K) * torch.rand(M, 1), formats.E4M3, ACTIVATIONS)
    B, scale_b = quantization.quantize(torch.randn(N, K), formats.E4M3, WEIGHTS)
    C = torch.empty(M, N, dtype=torch.bfloat16)
    print(simulate(scaled_matmul(M, N, K), A, scale_a, B, scale_b, C, target="metal"))
    expected = reference.scaled_matmul(A, scale_a, B, scale_b, ACTIVATIONS, WEIGHTS)
    print(
        f"largest error against float64: {(C.double() - expected).abs().max() / expected.abs().max():.1e} of the largest value"
    )


if __name__ == "__main__":
    main()

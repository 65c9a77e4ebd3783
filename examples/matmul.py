"""C = scale * (A @ B) + bias by tiles: the simulator runs the generated Metal text, and the result is checked.

python examples/matmul.py
"""

import torch

from tilelang_ext import language as T
from tilelang_ext import simulate


def matmul(M, N, K, block_M=64, block_N=64, block_K=32, dtype="float16", epilogue=False, num_stages=0, threads=128):
    """Return the prim_func of C = A @ B, or with `epilogue` C[i, j] = scale[i] * (A @ B)[i, j] + bias[j].

    A (M, K), B (K, N) and C (M, N) have `dtype`; scale (M,) and bias (N,) are float32, as is the accumulator. The blocks need
    not divide the matrix: copies mask the tails.
    """
    grid = T.ceildiv(N, block_N), T.ceildiv(M, block_M)

    @T.macro
    def multiply(A, B, C_f, bx, by):
        A_s = T.alloc_shared((block_M, block_K), dtype)
        B_s = T.alloc_shared((block_K, block_N), dtype)
        T.clear(C_f)
        for k in T.Pipelined(T.ceildiv(K, block_K), num_stages=num_stages):
            T.copy(A[by * block_M, k * block_K], A_s)
            T.copy(B[k * block_K, bx * block_N], B_s)
            T.gemm(A_s, B_s, C_f)

    @T.prim_func
    def plain(A: T.Tensor((M, K), dtype), B: T.Tensor((K, N), dtype), C: T.Tensor((M, N), dtype)):
        with T.Kernel(*grid, threads=threads) as (bx, by):
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            multiply(A, B, C_f, bx, by)
            T.copy(C_f, C[by * block_M, bx * block_N])

    @T.prim_func
    def scaled(
        A: T.Tensor((M, K), dtype),
        B: T.Tensor((K, N), dtype),
        scale: T.Tensor((M,), "float32"),
        bias: T.Tensor((N,), "float32"),
        C: T.Tensor((M, N), dtype),
    ):
        with T.Kernel(*grid, threads=threads) as (bx, by):
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            multiply(A, B, C_f, bx, by)
            for i, j in T.Parallel(block_M, block_N):
                C_f[i, j] = scale[by * block_M + i] * C_f[i, j] + bias[bx * block_N + j]
            T.copy(C_f, C[by * block_M, bx * block_N])

    return scaled if epilogue else plain


def main(M=512, N=512, K=512):
    torch.manual_seed(0)
    A, B = torch.randn(M, K).half(), torch.randn(K, N).half()
    scale, bias = torch.rand(M) / (2 * K**0.5), torch.rand(N)  # so that C is of order one
    C = torch.full((M, N), float("nan"), dtype=torch.float16)

    report = simulate(matmul(M, N, K, epilogue=True), A, B, scale, bias, C)

    expected = scale.double()[:, None] * (A.double() @ B.double()) + bias.double()
    print(report)
    print(f"largest error against float64: {(C.double() - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()

"""An MXFP8 matmul with `T.gemm_blockscaled`, whose scales are upstream's words of four E8M0 bytes, in the simulator.

python examples/gemm_blockscaled.py                      Metal
python examples/gemm_blockscaled.py "hip -mcpu=gfx950"   MMAs that take the scales
"""

import sys

import torch

from tilelang_ext import language as T
from tilelang_ext import quantization, reference, simulate
from tilelang_ext.formats import E4M3, MX_GROUP

F8, MX = E4M3.dtype, T.BlockScaledLayout.e8m0_k32()


def matmul(M, N, K, block_M=32, block_N=32, block_K=64):
    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), F8),
        SFA: T.Tensor((M, K // (4 * MX_GROUP)), "uint32"),
        B: T.Tensor((N, K), F8),
        SFB: T.Tensor((N, K // (4 * MX_GROUP)), "uint32"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=128) as (bx, by):
            i, j = by * block_M, bx * block_N
            A_s, B_s = T.alloc_shared((block_M, block_K), F8), T.alloc_shared((block_N, block_K), F8)
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            T.clear(C_f)
            for k in T.Pipelined(K // block_K, num_stages=0):
                T.copy(A[i, k * block_K], A_s)
                T.copy(B[j, k * block_K], B_s)
                T.gemm_blockscaled(
                    A_s, B_s, C_f, SFA[i : i + block_M, :], SFB[j : j + block_N, :], transpose_B=True,
                    k_start=k * block_K, sf_a_granularity_k=MX_GROUP, sf_b_granularity_k=MX_GROUP,
                )  # fmt: skip
            T.copy(C_f, C[i, j])

    return kernel


def run(M, N, K, target):
    """Return the report of a simulated launch, and the largest error against float64 relative to the largest result."""
    (A, SFA), (B, SFB) = (quantization.quantize(torch.randn(rows, K), E4M3, MX) for rows in (M, N))
    C = torch.full((M, N), torch.nan)
    report = simulate(matmul(M, N, K), A, SFA.view(torch.uint32), B, SFB.view(torch.uint32), C, target=target)
    expected = reference.scaled_matmul(A, SFA, B, SFB, MX)
    return report, float((C - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    report, error = run(100, 72, 256, sys.argv[1] if len(sys.argv) > 1 else "metal")
    print(f"{report}\nlargest error: {error:.1e} of the largest result")

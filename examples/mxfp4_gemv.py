"""An MXFP4 matrix times one vector; each byte of codes is read once.

python examples/mxfp4_gemv.py                       its Metal text in the simulator
python examples/mxfp4_gemv.py "hip -mcpu=gfx942"    its HIP text
"""

import sys

import torch

from tilelang_ext import formats, quantization, reference, simulate
from tilelang_ext import language as T

MX = T.BlockScaledLayout.e8m0_k32()


# [kernel]
def gemv(N, K, block_N=8, block_K=256, threads=128):
    """y = W @ x; W (N, K) MXFP4, x (K,) bfloat16, y (N,) float32; N and K in whole tiles."""

    @T.prim_func
    def gemv(
        x: T.Tensor((K,), "bfloat16"),
        W: T.Tensor((N, K // 2), "uint8"),
        scale: T.Tensor((N, K // 32), "uint8"),
        y: T.Tensor((N,), "float32"),
    ):
        with T.Kernel(N // block_N, threads=threads) as block:
            rows = slice(block * block_N, (block + 1) * block_N)
            W_f = T.alloc_fragment((block_N, block_K), "float32")
            products_f = T.alloc_fragment((block_N, block_K), "float32")
            y_f = T.alloc_fragment((block_N,), "float32")
            x_s = T.alloc_shared((block_K,), "bfloat16")  # once for all rows of the block
            T.clear(products_f)
            for k in T.serial(K // block_K):
                T.copy(x[k * block_K], x_s)
                codes = W[rows, k * (block_K // 2) : (k + 1) * (block_K // 2)]
                T.mxfp4_dequant(codes, scale[rows, k * (block_K // 32) : (k + 1) * (block_K // 32)], W_f)
                for j, i in T.Parallel(block_N, block_K):
                    products_f[j, i] += W_f[j, i] * T.cast(x_s[i], "float32")
            T.reduce_sum(products_f, y_f, dim=1)
            T.copy(y_f, y[block * block_N])

    return gemv


# [/kernel]


def run(N, K, target):
    """Return the report of a simulated launch, and the largest error against float64 relative to the largest result."""
    torch.manual_seed(0)
    x = torch.randn(K).to(torch.bfloat16)
    W, scale = quantization.quantize(torch.randn(N, K), formats.E2M1, MX)
    y = torch.full((N,), torch.nan)
    report = simulate(gemv(N, K), x, W, scale, y, target=target)
    expected = reference.mxfp4_matmul(x[None], W, scale)[0]
    return report, float((y - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    report, error = run(32, 1024, sys.argv[1] if len(sys.argv) > 1 else "metal")
    print(f"{report}\nlargest error: {error:.1e} of the largest result")

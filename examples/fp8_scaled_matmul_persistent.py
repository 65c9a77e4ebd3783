"""FP8 scaled matmul at the speed of `scaled_mm` on Hopper: `T.fp8_scaled_matmul` in the loop of a persistent kernel.

    python examples/fp8_scaled_matmul_persistent.py

On a Hopper GPU it runs there, elsewhere its Metal text runs in the simulator, with small tiles.
"""

from functools import partial
from typing import NamedTuple

import tilelang
import torch

from tilelang_ext import formats, quantization, reference, simulate
from tilelang_ext import language as T

ROWS = (T.BlockScaledLayout.per_row(), T.BlockScaledLayout.per_row())
BLOCKS = (T.BlockScaledLayout.block(1, 128), T.BlockScaledLayout.block(128, 128))  # DeepSeek's


class Tile(NamedTuple):
    """What a block computes at once: rows and columns of C, stages of its pipeline, threads, columns stored at once."""

    block_M: int
    block_N: int
    num_stages: int = 4
    threads: int = 256
    store_N: int = 64


WIDE = Tile(128, 256)  # for `use_fast_accum`: reads least, and its sums fill the registers
TALL = Tile(256, 128, store_N=32)  # for sums in float32: 64 rows of products beside 128 rows of sums
SMALL = Tile(64, 64, num_stages=12, threads=128)  # for up to 128 rows: one tile per SM, many loads in flight


# [kernel]
def scaled_matmul(M, N, K, layout_a, layout_b, tile, num_blocks, use_fast_accum=False):
    """C = (A * scale_a) @ (B * scale_b)^T; A (M, K) and B (N, K) e4m3, C (M, N) bfloat16; one block per SM."""
    block_M, block_N, num_stages, threads, store_N = tile
    tiles = [T.ceildiv(N, block_N), T.ceildiv(M, block_M)]
    add = partial(T.fp8_scaled_matmul, transpose_B=True, scale_layout=(layout_a, layout_b), use_fast_accum=use_fast_accum)

    def scales(scale, layout, number, rows, k):
        """Return the scales of step k of tile `number`, of `rows` rows each."""
        first, count = (0, 1) if layout.rows is None else (number * rows // layout.rows, T.ceildiv(rows, layout.rows))
        step = 0 if layout.k is None else k
        return scale[first : first + count, step : step + 1]

    @T.prim_func
    def scaled_matmul(
        A: T.Tensor((M, K), "float8_e4m3fn"),
        scale_a: T.Tensor(layout_a.scale_shape(M, K), "float32"),
        B: T.Tensor((N, K), "float8_e4m3fn"),
        scale_b: T.Tensor(layout_b.scale_shape(N, K), "float32"),
        C: T.Tensor((M, N), "bfloat16"),
    ):
        with T.Kernel(num_blocks, threads=threads) as block:
            A_s = T.alloc_shared((block_M, 128), "float8_e4m3fn")
            B_s = T.alloc_shared((block_N, 128), "float8_e4m3fn")
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            C_s = T.alloc_shared((block_M, store_N), "bfloat16")
            for bx, by in T.Persistent(tiles, num_blocks, block):
                T.clear(C_f)
                for k in T.Pipelined(T.ceildiv(K, 128), num_stages=num_stages):
                    T.copy(A[by * block_M, k * 128], A_s)
                    T.copy(B[bx * block_N, k * 128], B_s)
                    add(A_s, scales(scale_a, layout_a, by, block_M, k), B_s, scales(scale_b, layout_b, bx, block_N, k), C_f)
                for j in T.unroll(block_N // store_N):
                    T.copy(C_f[:, j * store_N : (j + 1) * store_N], C_s)
                    T.copy(C_s, C[by * block_M, bx * block_N + j * store_N])

    return scaled_matmul


# [/kernel]


def main() -> None:
    """Check the kernel: on the GPU as it would be used, in the simulator with tiles that it runs soon."""
    torch.manual_seed(0)
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    M, N, K = (4096, 4096, 7168) if hopper else (100, 72, 256)
    for name, layouts, tile in (("rows", ROWS, WIDE), ("blocks", BLOCKS, TALL)):
        A, scale_a = quantization.quantize(torch.randn(M, K) * torch.rand(M, 1), formats.E4M3, layouts[0])
        B, scale_b = quantization.quantize(torch.randn(N, K), formats.E4M3, layouts[1])
        C = torch.empty(M, N, dtype=torch.bfloat16)
        expected = reference.scaled_matmul(A, scale_a, B, scale_b, *layouts)
        if hopper:
            num_blocks = torch.cuda.get_device_properties().multi_processor_count
            kernel = tilelang.compile(scaled_matmul(M, N, K, *layouts, tile, num_blocks, use_fast_accum=name == "rows"))
            C = C.cuda()
            kernel(*(tensor.cuda() for tensor in (A, scale_a, B, scale_b)), C)
        else:
            kernel = scaled_matmul(M, N, K, *layouts, Tile(32, 32, 2, 128, 32), num_blocks=3)
            print(simulate(kernel, A, scale_a, B, scale_b, C, target="metal"))
        error = (C.cpu().double() - expected).abs().max() / expected.abs().max()
        print(f"{name}: largest error against float64: {error:.1e} of the largest value")


if __name__ == "__main__":
    main()

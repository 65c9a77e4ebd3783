"""A mixture of experts with MXFP4 weights from tile intrinsics: gather, GEMM, SwiGLU, GEMM, scatter.

    python examples/moe.py                       its Metal text in the simulator
    python examples/moe.py "hip -mcpu=gfx942"    its HIP text; "cuda" on a GPU

`mxfp4_moe` is the ready operator; this is where a kernel of your own begins. On Hopper each product of a block is one call that
decodes weights in registers, if its rows of weights are a multiple of 64 for each warpgroup (128 threads).
"""

import sys
from typing import NamedTuple

import tilelang
import torch

from tilelang_ext import formats, quantization, reference, simulate
from tilelang_ext import language as T

MX = T.BlockScaledLayout.e8m0_k32()
BF16, F32, I32, U8 = "bfloat16", "float32", "int32", "uint8"


class Tile(NamedTuple):
    """What a block computes: rows of tokens by rows of weights, with so many threads."""

    block_M: int = 32
    block_N: int = 64
    threads: int = 128


SMALL = Tile()
FEW, MANY = Tile(16, 192, 384), Tile(144, 192, 384)  # for 8 and for 256 tokens per expert on Hopper, in one and in two blocks


# [kernel]
def gate_up(tokens, H, I, experts, blocks, block_M=32, block_N=64, threads=128, block_K=64):
    """hidden[row] = swiglu(w13[e] . x[token(row)]); rows of w13 are gate and up in turn, as gpt-oss has them."""

    @T.prim_func
    def gate_up(
        x: T.Tensor((tokens, H), BF16),
        token_ids: T.Tensor((blocks * block_M,), I32),
        expert_ids: T.Tensor((blocks,), I32),
        w13: T.Tensor((experts, 2 * I, H // 2), U8),
        scale13: T.Tensor((experts, 2 * I, H // 32), U8),
        hidden: T.Tensor((blocks * block_M, I), BF16),
    ):
        with T.Kernel(2 * I // block_N, blocks, threads=threads) as (bx, by):
            row, column = by * block_M, bx * block_N
            x_s = T.alloc_shared((block_M, block_K), BF16)
            sums_f = T.alloc_fragment((block_M, block_N), F32)
            hidden_f = T.alloc_fragment((block_M, block_N // 2), BF16)
            e = expert_ids[by]
            if e >= 0:  # else the block has no rows
                T.clear(sums_f)
                for k in T.serial(H // block_K):
                    T.moe_gather(x[0:tokens, k * block_K : (k + 1) * block_K], token_ids[row : row + block_M], x_s)
                    T.mxfp4_scaled_matmul(
                        x_s,
                        None,
                        w13[e, column : column + block_N, k * (block_K // 2) : (k + 1) * (block_K // 2)],
                        scale13[e, column : column + block_N, k * (block_K // 32) : (k + 1) * (block_K // 32)],
                        sums_f,
                    )
                T.swiglu(sums_f, hidden_f)
                T.copy(hidden_f, hidden[row, column // 2])

    return gate_up


def down(tokens, top_k, H, I, experts, blocks, block_M=32, block_N=64, threads=128):
    """y[token(row), slot(row)] = weight[row] * (w2[e] . hidden[row])."""

    @T.prim_func
    def down(
        hidden: T.Tensor((blocks * block_M, I), BF16),
        token_ids: T.Tensor((blocks * block_M,), I32),
        expert_ids: T.Tensor((blocks,), I32),
        weights: T.Tensor((blocks * block_M,), F32),
        w2: T.Tensor((experts, H, I // 2), U8),
        scale2: T.Tensor((experts, H, I // 32), U8),
        y: T.Tensor((tokens, top_k, H), F32),
    ):
        with T.Kernel(H // block_N, blocks, threads=threads) as (bx, by):
            row, column = by * block_M, bx * block_N
            rows, columns = slice(row, row + block_M), slice(column, column + block_N)
            sums_f = T.alloc_fragment((block_M, block_N), F32)
            e = expert_ids[by]
            if e >= 0:
                W, scale = w2[e, columns, 0 : I // 2], scale2[e, columns, 0 : I // 32]
                T.mxfp4_scaled_matmul(hidden[rows, 0:I], None, W, scale, sums_f, clear_accum=True)
                T.moe_scatter(sums_f, token_ids[rows], weights[rows], y[0:tokens, 0:top_k, columns])

    return down


# [/kernel]


def moe(x, topk_ids, topk_weights, w13, scale13, w2, scale2, run, tile=SMALL):
    """Return the mixture for tokens x (tokens, H); `run` is called with a kernel and its arguments.

    2 I and H are multiples of tile.block_N, and H of 64.
    """
    (tokens, H), (experts, I), top_k = x.shape, (w2.shape[0], w2.shape[2] * 2), topk_ids.shape[1]
    rows = reference.moe_sort(topk_ids, topk_weights, experts, tile.block_M)
    blocks = len(rows.expert_ids)
    hidden, y = torch.empty(blocks * tile.block_M, I, dtype=torch.bfloat16), torch.zeros(tokens, top_k, H)
    run(gate_up(tokens, H, I, experts, blocks, *tile), x, rows.token_ids, rows.expert_ids, w13, scale13, hidden)
    run(down(tokens, top_k, H, I, experts, blocks, *tile), hidden, rows.token_ids, rows.expert_ids, rows.weights, w2, scale2, y)
    return y.sum(1)


def problem(tokens=20, H=128, I=64, experts=3, top_k=2):
    """Return arguments of `moe`, and what it should return."""
    torch.manual_seed(0)
    x, probabilities = torch.randn(tokens, H).to(torch.bfloat16), torch.randn(tokens, experts).softmax(-1)
    topk_weights, topk_ids = probabilities.topk(top_k)
    w13, w2 = (quantization.quantize(torch.randn(experts, *shape) / 8, formats.E2M1, MX) for shape in ((2 * I, H), (H, I)))
    stored = [reference.dequantize(*each, formats.E2M1, MX) for each in (w13, w2)]
    return (x, topk_ids, topk_weights, *w13, *w2), reference.moe(x, topk_ids, topk_weights, *stored, between="bfloat16")


def main(target: str) -> None:
    def run(kernel, *arguments):
        if target != "cuda":
            print(simulate(kernel, *arguments, target=target))
            return
        on_gpu = [argument.cuda() for argument in arguments]
        tilelang.compile(kernel, target=target)(*on_gpu)
        arguments[-1].copy_(on_gpu[-1])

    arguments, expected = problem()
    error = (moe(*arguments, run) - expected).abs().max() / expected.abs().max()
    print(f"largest error against float64: {error:.1e} of the largest value")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "metal")

"""What a consumer of the scan on Hopper writes: the results of a chunk, and the last state."""

from tilelang_ext import language as T
from tilelang_ext.kernels.gated_delta.sm90_config import PANEL, WGMMA_M
from tilelang_ext.kernels.sm90.roles import WARPGROUP, warpgroup_sync

VECTOR = 8  # elements of 16 bytes


@T.macro
def store(traits, operands, block, consumer, chunk, stage, rows):
    """Store the results through the shared memory of the chunk's v, which this consumer alone reads."""
    for j in T.unroll(traits.problem.chunk // 8):
        for r in T.unroll(2):
            for i in T.unroll(2):
                block.v_s[stage, consumer.number, 8 * j + consumer.column + i, consumer.row + 8 * r] = T.cast(
                    consumer.O[4 * j + 2 * r + i], traits.problem.dtype
                )
    T.fence_proxy_async()  # before TMA writes there again
    warpgroup_sync(consumer.number)
    for turn in T.unroll(traits.problem.chunk * (PANEL // VECTOR) // WARPGROUP):
        piece = turn * WARPGROUP + consumer.thread
        if piece // 8 < rows:
            for e in T.vectorized(VECTOR):
                operands.out[
                    block.span.batch,
                    block.span.first + chunk * traits.problem.chunk + piece // 8,
                    block.head,
                    block.row + consumer.number * WGMMA_M + piece % 8 * VECTOR + e,
                ] = block.v_s[stage, consumer.number, piece // 8, piece % 8 * VECTOR + e]


@T.macro
def store_state(traits, operands, block, consumer):
    for j in T.unroll(traits.problem.K // 8):
        for r in T.unroll(2):
            for i in T.vectorized(2):
                operands.final[
                    block.sequence,
                    block.head,
                    block.row + consumer.number * WGMMA_M + consumer.row + 8 * r,
                    8 * j + consumer.column + i,
                ] = T.cast(consumer.S[4 * j + 2 * r + i], traits.problem.state_dtype)

"""A consumer of the persistent kernel for Hopper: the MMAs of its part of a unit, K block by K block."""

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.sm90_block import WGMMA_M, Block, Consumer, Traits, alloc_unit, find_unit, num_units
from tilelang_ext.kernels.matmul.sm90_store import finish_unit, store_due, store_rest
from tilelang_ext.kernels.sm90.epilogue import (
    SubtileStores,
    alloc_deferred,
)
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP

_K_BLOCKS_PER_STORE = 2  # of the next unit, from one deferred subtile to the next


@T.macro
def consume(traits, operands, block, number, accumulators, stores):
    """Multiply and store the consumer's rows, unit after unit."""
    traits.roles.begin_consumer()
    step = T.alloc_var("int32", init=0)  # K blocks since the kernel began
    unit = alloc_unit()
    consumer = _alloc_consumer(traits, number, accumulators, stores)
    for wave in T.serial(num_units(block)):
        find_unit(traits, block, wave, unit)
        for k in T.serial(unit.num_k[0]):
            _multiply(traits, block, consumer, k, step)
            step = step + 1
            store_due(consumer, k, wave > 0)
        T.wait_wgmma(0)
        block.pipeline.release(block.pipeline.stage(step - 1), block.thread % WARP)
        _fence(traits, accumulators)
        finish_unit(traits, operands, block, consumer, unit)
    store_rest(consumer, block)


def _alloc_consumer(traits: Traits, number, accumulators: list, stores: SubtileStores | None) -> Consumer:
    deferred = None
    if stores is not None:
        deferred = alloc_deferred(stores, traits.subtiles, traits.config.deferred, _K_BLOCKS_PER_STORE)
    return Consumer(number * traits.mma_tiles * WGMMA_M, accumulators, stores, deferred)


def _multiply(traits: Traits, block: Block, consumer: Consumer, k, step) -> None:
    """Issue the MMAs of a K block, which add to the accumulators; then wait for those before and release their stage."""
    pipeline, problem, lane = block.pipeline, traits.problem, block.thread % WARP
    stage, mma_tiles = pipeline.stage(step), traits.mma_tiles

    def mma(m: int):
        row = consumer.row + m * WGMMA_M
        return T.wgmma_gemm(
            _rows_of_stage(traits, block.A_s, stage, row),
            _columns_of_stage(traits, block.B_s, stage),
            consumer.accumulators[m],
            transpose_A=not problem.a_is_k_major,
            transpose_B=problem.b_is_k_major,
            policy=T.GemmWarpPolicy.FullRow,
            clear_accum=k == 0,
        )

    @T.macro
    def release_previous():
        if k > 0:
            T.wait_wgmma(mma_tiles)
            pipeline.release(pipeline.stage(step - 1), lane)

    pipeline.wait(stage, pipeline.full_phase(step))
    for m in range(mma_tiles):
        T.evaluate(mma(m))
    release_previous()


def _rows_of_stage(traits: Traits, A_s, stage, row: int):
    """Return the operand of an MMA: 64 rows of the tile. Below the last one of a thin stage lies what the MMA discards."""
    if not traits.problem.a_is_k_major:
        return A_s[stage, row // WGMMA_M, :, :]
    if traits.is_thin:
        return A_s[stage * traits.config.a_rows : stage * traits.config.a_rows + WGMMA_M, :]
    return A_s[stage, row : row + WGMMA_M, :]


def _columns_of_stage(traits: Traits, B_s, stage):
    """Return the other operand of an MMA: the columns of the tile."""
    return B_s[stage, :, :] if traits.problem.b_is_k_major else B_s[stage, :, 0 : traits.config.block_N]


def _fence(traits: Traits, accumulators: list) -> None:
    for accumulator in accumulators:
        T.warpgroup_fence_operand(accumulator, num_regs=WGMMA_M * traits.config.block_N // WARPGROUP)

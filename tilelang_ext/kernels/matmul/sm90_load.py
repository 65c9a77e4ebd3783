"""The producer of the persistent kernel for Hopper: TMA loads of A and B."""

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.problem import Operands
from tilelang_ext.kernels.matmul.sm90_block import WGMMA_M, Block, Traits, Unit, alloc_unit, find_unit, num_units, origin_of
from tilelang_ext.kernels.matmul.sm90_config import BLOCK_K, columns_loaded
from tilelang_ext.kernels.sm90.multicast import BLOCKS, multicast
from tilelang_ext.kernels.sm90.roles import WARP

_IN_STEP = 8  # blocks that load the same K block of rows that all have


@T.macro
def produce(traits, operands, block):
    """Keep the pipeline filled, unit after unit."""
    traits.roles.begin_producer()
    step = T.alloc_var("int32", init=0)  # K blocks since the kernel began
    unit = alloc_unit()
    # One warp: nobody waits for the others, and a thread that is late by all stages would miss a phase and wait for ever.
    if block.thread < WARP:
        for wave in T.serial(num_units(block)):
            find_unit(traits, block, wave, unit)
            row, column = origin_of(traits, block, unit)
            for k in T.serial(unit.num_k[0]):
                k_block = _k_block(traits, block, unit, k)
                _load_k_block(traits, operands, block, row, column, k_block * BLOCK_K, step)
                step = step + 1
    if traits.config.joined > 1:
        T.sync_warp()
        for _ in T.serial(2 * block.scheduler.num_waves):
            T.cluster_sync()  # the consumers' two of each unit


def _k_block(traits: Traits, block: Block, unit: Unit, k):
    """Return the k-th K block of a unit: where all blocks have the same rows, a few at a time begin with the same one."""
    if not traits.config.rotates:
        return unit.first_k[0] + k
    return unit.first_k[0] + T.truncmod(k + T.truncdiv(T.get_block_binding(), _IN_STEP), unit.num_k[0])


def _load_k_block(traits: Traits, operands: Operands, block: Block, row, column, k, step) -> None:
    """Fill the stage of a step with the K block that begins at k."""
    pipeline, a, b, A_s, B_s = block.pipeline, operands.a, operands.b, block.A_s, block.B_s
    stage, a_rows = pipeline.stage(step), traits.config.a_rows
    b_width = columns_loaded(traits.config.block_N, traits.problem.b_is_k_major)
    ks, columns = slice(k, k + BLOCK_K), slice(column, column + b_width)

    @T.macro
    def load_if(is_inside, source, to):
        # The last block of a cluster may have no row or no column, and TMA takes long to fill what lies past the end.
        if is_inside:
            T.tma_copy(source, to, barrier=pipeline.full[stage])

    def load_rows(rows, to):
        load_if(traits.tiles_below == 1 or row < traits.M, rows, to)

    def load_a():
        if traits.tiles_beside > 1:
            half, blocks = traits.column_in_cluster(block.rank), 3
            if traits.tiles_below > 1:
                blocks = T.shift_left(3, BLOCKS * traits.row_in_cluster(block.rank))
            multicast(a, A_s, stage, pipeline.full[stage], (k, row), traits.problem.a_is_k_major, half, blocks)
            return
        if traits.problem.a_is_k_major:
            to = A_s[stage * a_rows : (stage + 1) * a_rows, :] if traits.is_thin else A_s[stage, :, :]
            load_rows(a[row : row + a_rows, ks], to)
            return
        for m in range(a_rows // WGMMA_M):
            rows = slice(row + m * WGMMA_M, row + (m + 1) * WGMMA_M)
            T.evaluate(T.tma_copy(a[ks, rows], A_s[stage, m, :, :], barrier=pipeline.full[stage]))

    def load_b():
        if traits.tiles_below > 1:
            half, blocks = traits.row_in_cluster(block.rank), 3
            if traits.tiles_beside > 1:
                blocks = T.shift_left(5, traits.column_in_cluster(block.rank))
            multicast(b, B_s, stage, pipeline.full[stage], (k, column), traits.problem.b_is_k_major, half, blocks)
            return
        from_b = b[columns, ks] if traits.problem.b_is_k_major else b[ks, columns]
        load_if(traits.tiles_beside == 1 or column < traits.N, from_b, B_s[stage, :, :])

    pipeline.acquire(stage, pipeline.empty_phase(step))
    T.evaluate(T.sync_warp())
    load_a()
    load_b()
    pipeline.commit_once(stage)

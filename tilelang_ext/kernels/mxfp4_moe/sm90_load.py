"""The producer of the WGMMA kernels: TMA loads of activations, of weights, and of what the epilogue reads."""

from tilelang_ext import language as T
from tilelang_ext.kernels.mxfp4_moe.sm90_block import Block, EpilogueArgs, Operands, Traits, used_tokens
from tilelang_ext.kernels.mxfp4_moe.sm90_config import ROLES
from tilelang_ext.kernels.mxfp4_moe.sm90_tiles import TILE
from tilelang_ext.kernels.sm90 import pdl
from tilelang_ext.kernels.sm90.pipeline import PRODUCER_START, start_state
from tilelang_ext.kernels.sm90.roles import WARPGROUP

_LOADS_UNROLLED = 4  # at most, or the producer's few registers overflow


@T.macro
def produce(traits, operands, args, block):
    """Keep the pipeline filled, tile after tile."""
    ROLES.begin_producer()
    state = start_state(traits.config.num_stages, PRODUCER_START)
    pdl.wait()
    pdl.trigger()
    for wave in T.serial(block.scheduler.num_waves):
        by = T.alloc_var("int32", block.tile_row(wave))
        row_tile = T.alloc_var("int32", block.tile_column(wave, by) * traits.config.block_tiles)
        expert = T.alloc_var("int32", operands.expert_ids[by])
        used = used_tokens(traits, operands, by)
        for step in T.serial(operands.steps):
            stage = state.stage
            block.pipeline.acquire(stage, state.phase)
            _load_activations(traits, operands, block, stage, by, step, used)
            _load_weights(traits, operands, block, stage, expert, row_tile, step)
            if step == 0:
                block.aux.acquire(block.aux.stage(wave), block.aux.empty_phase(wave))
                if T.shuffle_elect(WARPGROUP):
                    _load_row_vectors(traits, operands, args, block, stage, expert, row_tile, block.aux.stage(wave))
                    _load_token_vectors(traits, args, block, stage, by, block.aux.stage(wave))
            block.pipeline.commit(stage)
            state.advance()


def _load_activations(traits: Traits, operands: Operands, block: Block, stage, by, step, used) -> None:
    """Issue the loads of one step of the tokens of a tile that are used."""
    x, X_s, block_M, K, box_M = (
        operands.activations,
        block.X_s,
        traits.config.block_M,
        traits.tile_format.K,
        traits.config.box_M,
    )

    @T.macro
    def load(first):
        T.tma_copy(
            x[by * block_M + first : by * block_M + first + box_M, step * K : (step + 1) * K],
            X_s[stage, first : first + box_M, :],
            barrier=block.pipeline.full[stage],
        )

    @T.macro
    def load_all():
        for box in T.unroll(T.truncdiv(used, box_M), unroll_factor=1):
            load(box * box_M)

    load_all() if traits.config.narrower else load(0)


@T.macro
def _load_weights(traits, operands, block, stage, expert, row_tile, step):
    """Issue the loads of one step of the tile's weights. Tiles past the last are loaded too, as the last.

    This is not T.tma_copy, which takes one dimension only where it can prove that it stays inside, and the expert is a number
    that was loaded.
    """
    if T.shuffle_elect(WARPGROUP):
        T.mbarrier_expect_tx(block.pipeline.full[stage], traits.config.block_tiles * traits.tile_format.tile_words * 4)
        for i in T.unroll(traits.config.block_tiles, unroll_factor=_LOADS_UNROLLED):
            tile = T.min(row_tile + i, operands.row_tiles - 1)
            T.tma_load(
                T.address_of(block.W_s[stage, i, 0]), T.address_of(operands.tiles[expert, tile, step, 0]),
                block.pipeline.full[stage], traits.tile_format.tile_words * 4, 0,
            )  # fmt: skip


@T.macro
def _load_row_vectors(traits, operands, args, block, stage, expert, row_tile, buffer):
    """Issue the loads of bias and scale of the tile's rows, by one thread; they complete with the first stage of the tile."""
    T.mbarrier_expect_tx(block.pipeline.full[stage], traits.config.block_tiles * TILE * 4 * (2 if traits.is_scaled else 1))
    for i in T.unroll(traits.config.block_tiles):
        row = T.min(row_tile + i, operands.row_tiles - 1) * TILE
        bias_s, row_scale_s = T.address_of(args.bias_s[buffer, i * TILE]), T.address_of(args.row_scale_s[buffer, i * TILE])
        T.tma_load(bias_s, T.address_of(args.tensors.bias[expert, row]), block.pipeline.full[stage], TILE * 4, 0)
        if traits.is_scaled:
            T.tma_load(row_scale_s, T.address_of(args.tensors.row_scale[expert, row]), block.pipeline.full[stage], TILE * 4, 0)


def _load_token_vectors(traits: Traits, args: EpilogueArgs, block: Block, stage, by, buffer) -> None:
    """Issue the loads of ids, weights and scale of the tile's tokens, likewise."""
    tensors, vectors = args.tensors, []
    if tensors.token_ids is not None:
        vectors += [(tensors.token_ids, args.token_ids_s), (tensors.token_weights, args.token_weights_s)]
    if traits.is_scaled:
        vectors.append((tensors.token_scale, args.token_scale_s))
    for vector, vector_s in vectors:
        _load_token_vector(vector, vector_s, block.pipeline.full, stage, by * traits.config.block_M, buffer)


@T.macro
def _load_token_vector(vector, vector_s, full, stage, first, buffer):
    T.mbarrier_expect_tx(full[stage], vector_s.shape[1] * 4)
    T.tma_load(T.address_of(vector_s[buffer, 0]), T.address_of(vector[first]), full[stage], vector_s.shape[1] * 4, 0)

"""A consumer of the WGMMA kernels: it decodes weights into registers and issues their MMAs."""

import functools

from tilelang_ext import language as T
from tilelang_ext.kernels.mxfp4_moe.sm90_block import Block, Consumer, Operands, Tile, Traits, used_tokens
from tilelang_ext.kernels.mxfp4_moe.sm90_config import ROLES, TILE_REGISTERS
from tilelang_ext.kernels.mxfp4_moe.sm90_decode import decode
from tilelang_ext.kernels.sm90 import pdl
from tilelang_ext.kernels.sm90.pipeline import CONSUMER_START, start_state
from tilelang_ext.kernels.sm90.roles import WARPGROUP

_MMAS_PER_STEP = 4  # of one tile, 32 bytes of K each
_ROW_BYTES = 128  # of a token in a stage: one swizzled row of shared memory
_SWIZZLE_128B = 1  # the swizzle mode of a shared memory descriptor
_SWIZZLE_ATOM_BYTES = 1024  # eight rows of 128 bytes: the stride of a descriptor
_DESCRIPTOR_UNIT = 16  # bytes


@T.macro
def consume(traits, operands, args, store, block):
    """Multiply and store the consumer's rows of weights, tile after tile."""
    ROLES.begin_consumer()
    consumer = _alloc_consumer(traits, block)
    pdl.wait()
    for wave in T.serial(block.scheduler.num_waves):
        by = T.alloc_var("int32", block.tile_row(wave))
        first_tile = consumer.warpgroup * traits.config.consumer_tiles  # of the block's
        row_tile = T.alloc_var("int32", block.tile_column(wave, by) * traits.config.block_tiles + first_tile)
        used = used_tokens(traits, operands, by)
        block.pipeline.wait(consumer.state.stage, consumer.state.phase)
        _multiply(traits, operands, block, consumer, used)
        block.pipeline.release(consumer.state.stage, consumer.lane)
        consumer.state.advance()
        store(traits, args, consumer, Tile(by * traits.config.block_M, row_tile, block.aux.stage(wave), used))
        block.aux.release(block.aux.stage(wave), consumer.lane)


def _alloc_consumer(traits: Traits, block: Block) -> Consumer:
    config, X_s = traits.config, block.X_s

    @T.macro
    def alloc():
        A_r = T.alloc_local((2 * config.group_tiles * TILE_REGISTERS,), "uint32")
        acc = T.alloc_local((config.consumer_tiles * traits.tile_accumulators,), "float32")
        codes = T.alloc_local((traits.tile_format.lane_words,), "uint32")
        scales = T.alloc_local((traits.lane_scale_words,), "uint32")
        descriptor = T.alloc_wgmma_desc()
        stride = _SWIZZLE_ATOM_BYTES // _DESCRIPTOR_UNIT
        T.initialize_wgmma_descriptor(descriptor, X_s.access_ptr("r"), _SWIZZLE_128B, 1, stride)
        return A_r, acc, codes, scales, descriptor

    registers = alloc()
    state = start_state(traits.config.num_stages, CONSUMER_START)
    return Consumer(*registers, state, warpgroup=block.thread // WARPGROUP, thread=block.thread % WARPGROUP)


def _multiply(traits: Traits, operands: Operands, block: Block, consumer: Consumer, used) -> None:
    """Multiply all steps of a tile, in the loop for its number of tokens."""
    *narrower, widest = (functools.partial(_multiply_width, traits, operands, block, consumer, n) for n in traits.config.widths)

    def among(loops: list, widths: list) -> None:
        if not loops:
            widest()
            return
        first, width = loops[0], widths[0]

        @T.macro
        def emit():
            if used == width:
                first()
            else:
                among(loops[1:], widths[1:])

        emit()

    among(narrower, list(traits.config.narrower))


def _multiply_width(traits: Traits, operands: Operands, block: Block, consumer: Consumer, width: int) -> None:
    """The main loop of a tile of `width` tokens: a group of tiles of weights is multiplied while the next one is decoded."""
    config = traits.config
    groups = config.consumer_tiles // config.group_tiles

    def of_step(step) -> None:
        for group in range(groups):
            _multiply_and_decode(traits, operands, block, consumer, width, step, group, group % 2)

    @T.macro
    def begin():
        for i in T.unroll(config.consumer_tiles * traits.tile_accumulators):
            consumer.accumulators[i] = T.float32(0)
        _decode_group(traits, block, consumer, 0, 0)

    @T.macro
    def of_several_groups():
        for step in T.serial(operands.steps):
            of_step(step)

    @T.macro
    def of_one_group():
        # Two steps per iteration, since the registers that a step is decoded to must be constants.
        for pair in T.serial(T.ceildiv(operands.steps, 2)):
            _multiply_and_decode(traits, operands, block, consumer, width, 2 * pair, 0, 0)
            if 2 * pair + 1 < operands.steps:
                _multiply_and_decode(traits, operands, block, consumer, width, 2 * pair + 1, 0, 1)

    begin()
    if groups == 1:
        of_one_group()
    else:
        of_several_groups()
    T.evaluate(T.wait_wgmma(0))  # here, since the compiler moves no registers of MMAs in flight to where loops meet


def _multiply_and_decode(
    traits: Traits, operands: Operands, block: Block, consumer: Consumer, width: int, step, group: int, half: int
) -> None:
    """Issue the MMAs of a group of a step, which is decoded in one half of A_r; decode the next group to the other half."""
    state, pipeline, config = consumer.state, block.pipeline, traits.config
    is_last = group == config.consumer_tiles // config.group_tiles - 1

    @T.macro
    def multiply():
        T.warpgroup_arrive()
        _issue_mmas(traits, consumer, width, group, half)
        T.warpgroup_commit_batch()

    @T.macro
    def wait_for_previous():
        T.wait_wgmma(1)

    @T.macro
    def wait_and_release():
        if step > 0:
            T.wait_wgmma(1)
            pipeline.release(state.previous_stage, consumer.lane)

    @T.macro
    def decode_next_step():
        if step + 1 < operands.steps:
            state.advance()
            pipeline.wait(state.stage, state.phase)
            _decode_group(traits, block, consumer, 0, 1 - half)

    multiply()
    if group == 0:
        wait_and_release()
    else:
        wait_for_previous()
    if is_last:
        decode_next_step()
    else:
        _decode_group(traits, block, consumer, group + 1, 1 - half)


def _issue_mmas(traits: Traits, consumer: Consumer, width: int, group: int, half: int) -> None:
    """Issue the MMAs of a group of tiles of weights of a step by `width` tokens."""
    tile_format, tiles, block_M = traits.tile_format, traits.config.group_tiles, traits.config.block_M
    A_r, accumulators, descriptor = consumer.A_r, consumer.accumulators, consumer.descriptor
    shape = f"m64n{width}k{tile_format.K // _MMAS_PER_STEP}"

    @T.macro
    def emit():
        # All threads have the same stage; from a shuffle the compiler sees it, and keeps descriptors in uniform registers.
        stage = T.alloc_var("int32", T.call_pure_extern("int32", "__shfl_sync", T.uint32(0xFFFFFFFF), consumer.state.stage, 0))
        for k in T.unroll(_MMAS_PER_STEP):
            for m in T.unroll(tiles):
                T.ptx_wgmma_rs(
                    "float32", shape, True, tile_format.ptx, tile_format.ptx, "fp32",
                    A_r.data, (half * tiles + m) * TILE_REGISTERS + 4 * k,
                    descriptor.data, (stage * block_M * _ROW_BYTES + k * 32) // _DESCRIPTOR_UNIT,
                    accumulators.data, (group * tiles + m) * traits.tile_accumulators, T.bool(True), 1, 1,
                )  # fmt: skip

    emit()


def _decode_group(traits: Traits, block: Block, consumer: Consumer, group: int, half: int) -> None:
    """Decode a group of tiles of the consumer's stage to one half of A_r."""
    tiles = traits.config.group_tiles
    for m in range(tiles):
        _decode_tile(traits, block, consumer, group * tiles + m, (half * tiles + m) * TILE_REGISTERS)


def _decode_tile(traits: Traits, block: Block, consumer: Consumer, m: int, begin: int) -> None:
    """Decode the lane's part of the consumer's tile m to A_r[begin:]."""
    W_s, codes, scales, A_r, stage = block.W_s, consumer.codes, consumer.scales, consumer.A_r, consumer.state.stage
    lane_words, scale_words, warp, lane = traits.tile_format.lane_words, traits.lane_scale_words, consumer.warp, consumer.lane
    tile = consumer.warpgroup * traits.config.consumer_tiles + m

    @T.macro
    def emit():
        for part in T.unroll(lane_words // 4):
            for v in T.vectorized(4):
                codes[part * 4 + v] = W_s[stage, tile, ((warp * (lane_words // 4) + part) * 32 + lane) * 4 + v]
        for v in T.vectorized(scale_words):
            scales[v] = W_s[stage, tile, 128 * lane_words + (warp * 8 + lane // 4) * scale_words + v]
        decode(traits.tile_format, codes, scales, A_r, begin)

    emit()

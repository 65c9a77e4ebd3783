"""A consumer of `sm90_forward`: scores, softmax and values of its rows, block by block of keys."""

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import Operands
from tilelang_ext.kernels.attention.sm90_block import (
    PTX_TYPES,
    ROW_BYTES,
    SWIZZLE_128B,
    SWIZZLE_ATOM,
    Block,
    Consumer,
    Traits,
    uniform,
)
from tilelang_ext.kernels.attention.sm90_config import WGMMA_K, WGMMA_M
from tilelang_ext.kernels.attention.sm90_softmax import alloc_softmax
from tilelang_ext.kernels.attention.sm90_store import end_stores, finish
from tilelang_ext.kernels.attention.tiles import Tile, alloc_tile, of_head
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, warpgroup_sync

_FIRST_TURN = 8  # number of the named barrier of consumer 0's turn
_UNIT = 16  # bytes of a unit of a descriptor
_STEP_BYTES = 32  # of an MMA's K
_FP8_BITS = 8  # P is up to 2^8 where it is rounded to e4m3, whose largest number is 448, and whose least 2^-9


@T.macro
def consume(traits, operands, block, number):
    """Compute the consumer's queries, tile after tile."""
    traits.roles.begin_consumer()
    consumer = _alloc_consumer(traits, block, number)
    step = T.alloc_var("int32", init=0)  # key blocks since the kernel began
    tiles = T.alloc_var("int32", init=0)  # tiles that have key blocks
    tile = alloc_tile(traits.problem, traits.config.block_N)
    _give_first_turn(traits, number)
    for wave in T.serial(block.order.num_waves):
        block.order.find(wave, tile)
        for i in T.unroll(traits.outputs):
            consumer.O[i] = T.float32(0)
        consumer.softmax.start()
        _start_scale(traits, operands, consumer, tile)
        if tile.num_blocks > 0:
            block.q_pipeline.wait(block.q_pipeline.stage(tiles), block.q_pipeline.full_phase(tiles))
            _attend(traits, block, consumer, tile, tiles, step)
            step = step + tile.num_blocks
            tiles = tiles + 1
        finish(traits, operands, block, consumer, tile, tiles)
    end_stores(traits, block, consumer)


def _alloc_consumer(traits: Traits, block: Block, number: int) -> Consumer:
    is_fp8 = traits.problem.is_fp8
    v_leading = 1 if is_fp8 else traits.v_panel_bytes // _UNIT

    @T.macro
    def alloc():
        S = T.alloc_local((traits.scores,), "float32")
        P = T.alloc_local((traits.scores // 4 if is_fp8 else traits.scores,), "uint32" if is_fp8 else traits.problem.dtype)
        O = T.alloc_local((traits.outputs,), "float32")
        q_descriptor, k_descriptor, v_descriptor = T.alloc_wgmma_desc(), T.alloc_wgmma_desc(), T.alloc_wgmma_desc()
        T.initialize_wgmma_descriptor(q_descriptor, block.q_s.access_ptr("r"), SWIZZLE_128B, 1, SWIZZLE_ATOM)
        T.initialize_wgmma_descriptor(k_descriptor, block.k_s.access_ptr("r"), SWIZZLE_128B, 1, SWIZZLE_ATOM)
        T.initialize_wgmma_descriptor(v_descriptor, block.v_s.access_ptr("r"), SWIZZLE_128B, v_leading, SWIZZLE_ATOM)
        stored = T.alloc_local((1,), "int32")
        stored[0] = -1
        return stored, S, P, O, q_descriptor, k_descriptor, v_descriptor

    @T.macro
    def alloc_scale():
        return T.alloc_local((1,), "float32")

    thread = block.thread % WARPGROUP
    lane = thread % WARP
    scale = alloc_scale() if is_fp8 else None
    softmax = alloc_softmax(
        traits.problem, number * WGMMA_M + thread // WARP * 16 + lane // 4, lane % 4 * 2, scale[0] if is_fp8 else None,
        _FP8_BITS if is_fp8 else 0,
    )  # fmt: skip
    stored, S, P, O, *descriptors = alloc()
    return Consumer(number, S, P, O, softmax, *descriptors, scale, stored, thread)


def _start_scale(traits: Traits, operands: Operands, consumer: Consumer, tile: Tile) -> None:
    """Take the scales of a tile's codes."""
    q_scale, k_scale, scale = operands.q_scale, operands.k_scale, consumer.scale

    @T.macro
    def emit():
        of_q, of_k = of_head(q_scale, tile.head), of_head(k_scale, tile.kv_head)
        scale[0] = of_q * of_k * T.float32(traits.problem.scale_log2)

    if traits.problem.is_fp8:
        emit()


def _attend(traits: Traits, block: Block, consumer: Consumer, tile: Tile, tiles, step) -> None:
    """Add the key blocks of a tile, of which there is at least one, from the last to the first."""
    k_pipeline, v_pipeline, lane = block.k_pipeline, block.v_pipeline, consumer.lane
    S, O = consumer.S, consumer.O

    @T.macro
    def first_block():
        k_pipeline.wait(k_pipeline.stage(step), k_pipeline.full_phase(step))
        _wait_turn(traits, consumer.number)
        _issue_scores(traits, block, consumer, tiles, step)
        _give_turn(traits, consumer.number)
        end_stores(traits, block, consumer)
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(S, num_regs=traits.scores)
        k_pipeline.release(k_pipeline.stage(step), lane)
        _release_q(traits, block, consumer, tiles, tile.num_blocks == 1)
        _hide(traits, consumer, tile, tile.key(0))
        _softmax(traits, consumer)
        _round_probabilities(traits, consumer)
        if traits.problem.has_lengths:
            _clear_values(traits, block, consumer, tile, step)

    @T.macro
    def next_block(i):
        k_pipeline.wait(k_pipeline.stage(step + i), k_pipeline.full_phase(step + i))
        _wait_turn(traits, consumer.number)
        _issue_scores(traits, block, consumer, tiles, step + i)
        v_pipeline.wait(v_pipeline.stage(step + i - 1), v_pipeline.full_phase(step + i - 1))
        _issue_values(traits, block, consumer, step + i - 1)
        _give_turn(traits, consumer.number)
        T.wait_wgmma(1)
        T.warpgroup_fence_operand(S, num_regs=traits.scores)
        k_pipeline.release(k_pipeline.stage(step + i), lane)
        _release_q(traits, block, consumer, tiles, i == tile.num_blocks - 1)
        _hide(traits, consumer, tile, tile.key(i))
        _softmax(traits, consumer)
        # Or the compiler would move the softmax behind the wait for O: nvcc stops at the fence, ptxas at the loop of a wait.
        T.warpgroup_fence_operand(S, num_regs=traits.scores)
        v_pipeline.wait(v_pipeline.stage(step + i - 1), v_pipeline.full_phase(step + i - 1))
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(O, num_regs=traits.outputs)
        v_pipeline.release(v_pipeline.stage(step + i - 1), lane)
        for e in T.unroll(traits.outputs):
            O[e] = O[e] * consumer.softmax.factor[e // 2 % 2]
        _round_probabilities(traits, consumer)

    @T.macro
    def last_values(i):
        v_pipeline.wait(v_pipeline.stage(step + i), v_pipeline.full_phase(step + i))
        _issue_values(traits, block, consumer, step + i)
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(O, num_regs=traits.outputs)
        v_pipeline.release(v_pipeline.stage(step + i), lane)

    @T.macro
    def emit():
        first_block()
        for i in T.serial(tile.num_blocks - 1):
            next_block(i + 1)
        last_values(tile.num_blocks - 1)

    emit()


def _release_q(traits: Traits, block: Block, consumer: Consumer, tiles, is_last) -> None:
    """Release the queries after the last S, unless O goes through their stage."""
    pipeline = block.q_pipeline

    @T.macro
    def emit():
        if is_last:
            pipeline.release(pipeline.stage(tiles), consumer.lane)

    if not traits.keeps_q:
        emit()


@T.macro
def _issue_scores(traits, block, consumer, tiles, step):
    """Issue S = q k^T for the keys of a step."""
    stage = T.alloc_var("int32", uniform(block.k_pipeline.stage(step)))
    q_stage = T.alloc_var("int32", uniform(block.q_pipeline.stage(tiles)))
    ptx = PTX_TYPES[traits.problem.dtype]
    T.warpgroup_fence_operand(consumer.S, num_regs=traits.scores)
    T.warpgroup_arrive()
    for k in T.unroll(-(-traits.problem.head_dim * traits.element_bytes // _STEP_BYTES)):
        T.ptx_wgmma_ss(
            "float32", f"m64n{traits.config.block_N}k{_STEP_BYTES // traits.element_bytes}", True, True, ptx, ptx, "fp32",
            consumer.q_descriptor.data,
            (((q_stage * traits.panels + k // 4) * traits.config.block_M + consumer.number * WGMMA_M) * ROW_BYTES + k % 4 * 32)
            // _UNIT,
            consumer.k_descriptor.data,
            (stage * traits.k_stage_bytes + k // 4 * traits.k_panel_bytes + k % 4 * 32) // _UNIT,
            consumer.S.data, 0, k > 0, 1, 1,
        )  # fmt: skip
    T.warpgroup_commit_batch()


@T.macro
def _issue_values(traits, block, consumer, step):
    """Issue O += P v for the values of a step."""
    stage = T.alloc_var("int32", uniform(block.v_pipeline.stage(step)))
    ptx = PTX_TYPES[traits.problem.dtype]
    T.warpgroup_fence_operand(consumer.O, num_regs=traits.outputs)
    T.warpgroup_fence_operand(consumer.P, num_regs=traits.probabilities)
    T.warpgroup_arrive()
    if traits.problem.is_fp8:
        for k in T.unroll(traits.config.block_N // 32):
            T.ptx_wgmma_rs(
                "float32", f"m64n{traits.channels}k32", True, ptx, ptx, "fp32",
                consumer.P.data, 4 * k,
                consumer.v_descriptor.data,
                (stage * traits.v_stage_bytes + k // 4 * traits.v_panel_bytes + k % 4 * 32) // _UNIT,
                consumer.O.data, 0, T.bool(True), 1, 1,
            )  # fmt: skip
    else:
        for k in T.unroll(traits.config.block_N // WGMMA_K):
            T.ptx_wgmma_rs(
                "float32", f"m64n{traits.channels}k16", False, ptx, ptx, "fp32",
                consumer.P.data, 8 * k,
                consumer.v_descriptor.data, (stage * traits.v_stage_bytes + k * WGMMA_K * ROW_BYTES) // _UNIT,
                consumer.O.data, 0, T.bool(True), 1, 1,
            )  # fmt: skip
    T.warpgroup_commit_batch()


@T.macro
def _clear_values(traits, block, consumer, tile, step):
    """Clear values past the end of a sequence in its last block: 0 times an infinity of another sequence would be NaN."""
    pieces = traits.panels * traits.config.block_N * 8  # of 16 bytes
    stage = block.v_pipeline.stage(step)
    rows = T.alloc_var("int32", tile.last - tile.key(0))
    if rows < traits.config.block_N:
        block.v_pipeline.wait(stage, block.v_pipeline.full_phase(step))
        for turn in T.serial(pieces // WARPGROUP):
            piece = turn * WARPGROUP + consumer.thread
            if piece // 8 % traits.config.block_N >= rows:
                for e in T.vectorized(8):
                    block.v_s[
                        stage, piece // (8 * traits.config.block_N), piece // 8 % traits.config.block_N, piece % 8 * 8 + e
                    ] = T.cast(0, traits.problem.dtype)
        T.fence_proxy_async()
        warpgroup_sync(consumer.number)


# --- turns: while one consumer computes its softmax, the MMAs of the others run ----------------------------------------


def _give_first_turn(traits: Traits, number: int) -> None:
    if traits.config.takes_turns and number == traits.config.num_consumers - 1:
        _give_turn(traits, number)


def _wait_turn(traits: Traits, number: int) -> None:
    if traits.config.takes_turns:
        T.evaluate(T.sync_threads(barrier_id=_FIRST_TURN + number, arrive_count=2 * WARPGROUP))


def _give_turn(traits: Traits, number: int) -> None:
    """Give the turn to the next consumer: its threads and these meet at its barrier, and only its own wait there."""
    if traits.config.takes_turns:
        following = (number + 1) % traits.config.num_consumers
        T.evaluate(T.named_barrier_arrive(_FIRST_TURN + following, 2 * WARPGROUP))


def _hide(traits: Traits, consumer: Consumer, tile: Tile, key) -> None:
    consumer.softmax.hide(consumer.S, tile, key, (0, traits.config.block_M - 1), traits.config.block_N)


def _softmax(traits: Traits, consumer: Consumer) -> None:
    """Replace S by its powers under the new maximum of each row."""
    consumer.softmax.update(consumer.S, traits.config.block_N)
    consumer.softmax.exponentiate(consumer.S, 0, traits.config.block_N // 8)


def _round_probabilities(traits: Traits, consumer: Consumer) -> None:
    """P = S, rounded. Of 16 bits, registers of the accumulator, two by two, are the registers of the left operand.

    Of 8 bits a register has four neighbours of a row, and a thread has two of each eight: these become neighbours in the order
    of `probabilities.key_of`, in which `sm90_transpose` leaves the keys of v.
    """
    S, P = consumer.S, consumer.P

    @T.macro
    def round_pairs():
        for e in T.unroll(traits.scores // 2):
            for i in T.vectorized(2):
                P[2 * e + i] = T.cast(S[2 * e + i], traits.problem.dtype)

    @T.macro
    def round_codes():
        for k in T.unroll(traits.config.block_N // 16):
            for r in T.unroll(2):
                P[2 * k + r] = T.call_pure_extern(
                    "uint32", "tilelang_ext_e4m3x4",
                    S[8 * k + 2 * r], S[8 * k + 2 * r + 1], S[8 * k + 4 + 2 * r], S[8 * k + 4 + 2 * r + 1],
                )  # fmt: skip

    if traits.problem.is_fp8:
        round_codes()
    else:
        round_pairs()

"""The two GEMMs of a mixture of experts on Hopper by WGMMA: warp-specialized persistent kernels.

    hidden[row, j] = act(w13[e, j] . x[row] + bias13[e, j], w13[e, I + j] . x[row] + bias13[e, I + j])
    y[token(row), slot(row), h] = weight[row] * (w2[e, h] . hidden[row] + bias2[e, h])

Activations are bfloat16 or E4M3, in sorted order; weights are MXFP4. Weights are the left operand of the MMA, which the tensor
core reads from registers, so decoded codes never go to shared memory; tokens are its columns. A tile of the result is some rows
of weights by block_M tokens of one expert. For E4M3 the accumulator is multiplied by the scale of the token and by the power of
two of the row of weights. The MoE intrinsics are made of statements of all threads, and here warpgroups have roles, so none is
used.

Warp roles, of a block of 384 threads, one block per SM:

| warpgroup | role | registers |
| --- | --- | --- |
| 0, 1 | consumers: each decodes one half of the tile's rows of weights, issues their MMAs and runs their epilogue | 232 |
| 2 | producer: TMA loads of activations, of weights, and of what the epilogue reads | 40 |

Pipelines, producer role -> consumer role:

| pipeline | carries | full | empty |
| --- | --- | --- | --- |
| producer -> both consumers | activations and weights of one step, 128 bytes of K | 128 threads, the bytes | 8 warps |
| producer -> both epilogues, two buffers | vectors of the tile's rows and tokens | with the tile's first stage | 8 warps |
| consumer -> its stores | a subtile of the result | a named barrier of 128 threads | the same |

Steady state:

    producer    acquire | TMA activations, TMA weights | commit ; on to the next tile
                in the first step of a tile, before the commit: acquire a buffer of the epilogue | TMA bias, ids, scales
    consumers   issue the MMAs of step k | the MMAs of step k - 1 are complete: release | wait | decode step k + 1
                after the last step: release | scale, add the bias, activate or weight | store subtiles | release the buffer

The consumers do not wait for each other: one stores while the MMAs of the other run. A step reads 128 bytes per token and 34
(bfloat16) or 68 (E4M3) bytes per row of weights. So for few tokens per expert a tile has many rows of weights, and tokens are
read less often; for many it has 128 rows by up to 256 tokens, and weights are decoded less often. docs/log/mxfp4_moe.md lists
what was measured.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.formats import MX_GROUP
from tilelang_ext.kernels.mxfp4_moe import sm90_scatter
from tilelang_ext.kernels.mxfp4_moe.problem import HOPPER_LAYOUTS, TOKEN_BITS, TOKEN_MASK, Problem
from tilelang_ext.kernels.mxfp4_moe.sm90_config import FEATURES, ROLES, TILE_REGISTERS, Config, pick_configs
from tilelang_ext.kernels.mxfp4_moe.sm90_config import pick_config as pick_config  # every implementation has it
from tilelang_ext.kernels.mxfp4_moe.sm90_decode import decode
from tilelang_ext.kernels.mxfp4_moe.sm90_slots import slots_type, store_pair
from tilelang_ext.kernels.mxfp4_moe.sm90_tiles import BFLOAT16, TILE, TILE_FORMATS, TileFormat
from tilelang_ext.kernels.sm90 import pdl
from tilelang_ext.kernels.sm90.pipeline import (
    CONSUMER_START,
    PRODUCER_START,
    Pipeline,
    PipelineState,
    alloc_pipeline,
    start_state,
)
from tilelang_ext.kernels.sm90.roles import WARP, WARPGROUP, dispatch, warpgroup_sync
from tilelang_ext.kernels.sm90.scheduler import PersistentScheduler

PARTIAL_DTYPE, USES_PDL = "bfloat16", True
# The kernel's own barriers order everything here. One that upstream adds would be reached by the elected thread alone.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}
_AUX_BUFFERS = 2  # of what the epilogue reads
_PAD = 8  # elements of a row of shared memory, against bank conflicts
_LOADS_UNROLLED = 4  # at most, or the producer's few registers overflow
_MMAS_PER_STEP = 4  # of one tile, 32 bytes of K each
_ROW_BYTES = 128  # of a token in a stage: one swizzled row of shared memory
_SWIZZLE_128B = 1  # the swizzle mode of a shared memory descriptor
_SWIZZLE_ATOM_BYTES = 1024  # eight rows of 128 bytes: the stride of a descriptor
_DESCRIPTOR_UNIT = 16  # bytes


# --- what a kernel is made of ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Traits:
    """What the host knows of one kernel."""

    config: Config
    num_blocks: int
    tile_format: TileFormat

    @property
    def is_scaled(self) -> bool:
        """Whether accumulators are multiplied by scales of rows and tokens."""
        return self.tile_format != BFLOAT16

    @property
    def tile_accumulators(self) -> int:
        """Accumulator registers of a thread for one tile of weights."""
        return self.config.block_M // 2

    @property
    def lane_scale_words(self) -> int:
        """Words of scales that one lane decodes with, for rows g and g + 8 of a tile."""
        return self.tile_format.K // MX_GROUP // 2


@dataclass(frozen=True, eq=False)
class _Operands:
    """Tensors of a GEMM in global memory, and how many tiles and steps there are."""

    activations: Any  # (blocks * block_M, K), in sorted order
    tiles: Any  # uint32 (experts, row_tiles, steps, words)
    token_ids: Any  # (blocks * block_M,)
    expert_ids: Any  # (blocks,)
    num_valid: Any  # (1,)
    row_tiles: Any  # tiles of weights of one expert
    steps: Any  # of K
    tile_columns: Any  # tiles of the result for the same tokens


@dataclass(frozen=True, eq=False)
class _EpilogueTensors:
    """Tensors in global memory that an epilogue reads or writes, and the extents of the result."""

    bias: Any  # (experts, row_tiles * 64) float32
    row_scale: Any  # likewise, for E4M3
    token_scale: Any  # (blocks * block_M,) float32, for E4M3
    out: Any  # hidden or y
    columns: Any  # of hidden or y
    tokens: Any = None  # of y
    token_ids: Any = None  # (blocks * block_M,) int32, for y
    token_weights: Any = None  # (blocks * block_M,) float32, for y


@dataclass(frozen=True, eq=False)
class _EpilogueArgs:
    """What an epilogue works on beside the accumulators: tensors, two buffers of vectors in shared memory, and registers."""

    tensors: _EpilogueTensors
    out_s: Any  # (consumers, subtile_M, columns and padding) bfloat16, a subtile of each consumer
    bias_s: Any  # (2, rows)
    row_scale_s: Any  # (2, rows)
    token_scale_s: Any  # (2, block_M)
    token_ids_s: Any  # (2, block_M), for y
    token_weights_s: Any  # (2, block_M), for y
    row_bias_r: Any  # (2,), of rows g and g + 8
    row_scale_r: Any  # (2,), of rows g and g + 8
    token_scale_r: Any  # of the tokens whose results are ready together
    token_weights_r: Any
    values_r: Any  # their results


@dataclass(frozen=True, eq=False)
class _Block:
    """What the roles of a block share."""

    X_s: Any  # (num_stages, block_M, K)
    W_s: Any  # (num_stages, block_tiles, words)
    pipeline: Pipeline
    aux: Pipeline  # of the epilogue's two buffers; the first stage of a tile completes one, so it has no full barriers
    scheduler: PersistentScheduler
    tile_columns: Any  # tiles of the result for the same tokens
    thread: Any

    def tile_row(self, wave):
        """Return which block of tokens the tile of a wave has."""
        return T.truncdiv(self.scheduler.tile(wave), self.tile_columns)

    def tile_column(self, wave, tile_row):
        """Return which rows of weights the tile of a wave has, counted in tiles of the result."""
        return self.scheduler.tile(wave) - tile_row * self.tile_columns


@dataclass(frozen=True, eq=False)
class _Consumer:
    """The registers of a thread of a consumer, and which thread it is; with g = lane / 4 and t = lane % 4.

    The accumulators of tile m of weights begin at m * tile_accumulators. For each group n of eight tokens they are row g of
    tokens 8 n + 2 t and 8 n + 2 t + 1, then row g + 8 of the same tokens.
    """

    A_r: Any  # decoded weights, two buffers of a group of tiles: one is multiplied while the other is written
    accumulators: Any
    codes: Any  # of one tile, before they are decoded; allocated outside all loops, or the compiler's passes take long
    scales: Any
    descriptor: Any  # of the activations in shared memory
    state: PipelineState
    warpgroup: Any  # 0 or 1
    thread: Any  # of the warpgroup

    @property
    def warp(self):
        """The warp of the warpgroup."""
        return self.thread // WARP

    @property
    def lane(self):
        return self.thread % WARP


@dataclass(frozen=True, eq=False)
class _Tile:
    """A consumer's part of a tile of the result."""

    token: Any  # the first, in sorted order
    row_tile: Any  # the first tile of weights
    buffer: Any  # of the vectors that the epilogue reads
    used: Any  # its number of tokens: block_M, or a narrower width


def gate_up(config: Config, num_blocks: int, activation, tile_format: TileFormat = BFLOAT16):
    """Return the prim_func of the first GEMM: (x, scale_x, token_ids, expert_ids, num_valid, w13, scale13, bias13, hidden).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | x | (blocks * block_M, H), rows of tokens in sorted order | bfloat16 or E4M3 |
    | scale_x | (blocks * block_M,); for bfloat16 empty | float32 |
    | token_ids, expert_ids, num_valid | as `moe_sort` with block_M writes them | int32 |
    | w13 | (E, row tiles, steps, words), tiles of `HopperWeights` | uint32 |
    | scale13 | (E, row tiles * 64), its row_scale; for bfloat16 (0, 0) | float32 |
    | bias13 | (E, row tiles * 64), its bias | float32 |
    | hidden | (blocks * block_M, I), in sorted order; rows of padding, and past num_valid, are undefined | bfloat16 |
    """
    H, groups, blocks = T.dynamic("H"), T.dynamic("groups"), T.dynamic("blocks")
    experts, row_tiles, steps = T.dynamic("experts"), T.dynamic("row_tiles"), T.dynamic("steps")
    scaled_tokens, scaled_experts, scaled_rows = (T.dynamic(f"scaled_{name}") for name in ("tokens", "experts", "rows"))
    I, block_M = groups * MX_GROUP, config.block_M
    traits = _Traits(config, num_blocks, tile_format)
    columns, store = config.subtile_tiles * FEATURES, functools.partial(_store_hidden, activation)

    @T.prim_func
    def gate_up(
        x: T.Tensor((blocks * block_M, H), tile_format.dtype),
        scale_x: T.Tensor((scaled_tokens,), "float32"),
        token_ids: T.Tensor((blocks * block_M,), "int32"),
        expert_ids: T.Tensor((blocks,), "int32"),
        num_valid: T.Tensor((1,), "int32"),
        w13: T.Tensor((experts, row_tiles, steps, tile_format.tile_words), "uint32"),
        scale13: T.Tensor((scaled_experts, scaled_rows), "float32"),
        bias13: T.Tensor((experts, row_tiles * TILE), "float32"),
        hidden: T.Tensor((blocks * block_M, I), "bfloat16"),
    ):
        with T.Kernel(num_blocks, threads=ROLES.threads) as block:
            args = _alloc_epilogue(traits, columns, _EpilogueTensors(bias13, scale13, scale_x, hidden, I))
            operands = _Operands(x, w13, token_ids, expert_ids, num_valid, row_tiles, steps, T.ceildiv(2 * I, config.rows))
            _gemm(traits, operands, args, store, block)

    return gate_up


def down(config: Config, num_blocks: int, epilogue: str, tile_format: TileFormat = BFLOAT16):
    """Return the prim_func of the second GEMM.

    Its parameters are (hidden, scale_hidden, token_ids, weights, expert_ids, num_valid, w2, scale2, bias2, y).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | hidden | (blocks * block_M, I), in sorted order | bfloat16 or E4M3 |
    | scale_hidden | (blocks * block_M,); for bfloat16 empty | float32 |
    | token_ids, weights, expert_ids, num_valid | as `moe_sort` with block_M writes them | int32; weights float32 |
    | w2 | (E, row tiles, steps, words), tiles of `HopperWeights` | uint32 |
    | scale2 | (E, row tiles * 64), its row_scale; for bfloat16 (0, 0) | float32 |
    | bias2 | (E, row tiles * 64), its bias | float32 |
    | y | as `slots_type` returns; slots without a local expert are not written | |
    """
    tokens, top_k, groups, I, blocks = (T.dynamic(name) for name in ("tokens", "top_k", "groups", "I", "blocks"))
    experts, row_tiles, steps = T.dynamic("experts"), T.dynamic("row_tiles"), T.dynamic("steps")
    scaled_tokens, scaled_experts, scaled_rows = (T.dynamic(f"scaled_{name}") for name in ("tokens", "experts", "rows"))
    H, block_M = groups * MX_GROUP, config.block_M
    traits = _Traits(config, num_blocks, tile_format)
    store = functools.partial(_store_slots, epilogue)

    @T.prim_func
    def down(
        hidden: T.Tensor((blocks * block_M, I), tile_format.dtype),
        scale_hidden: T.Tensor((scaled_tokens,), "float32"),
        token_ids: T.Tensor((blocks * block_M,), "int32"),
        weights: T.Tensor((blocks * block_M,), "float32"),
        expert_ids: T.Tensor((blocks,), "int32"),
        num_valid: T.Tensor((1,), "int32"),
        w2: T.Tensor((experts, row_tiles, steps, tile_format.tile_words), "uint32"),
        scale2: T.Tensor((scaled_experts, scaled_rows), "float32"),
        bias2: T.Tensor((experts, row_tiles * TILE), "float32"),
        y: slots_type(epilogue, tokens, top_k, H),
    ):
        with T.Kernel(num_blocks, threads=ROLES.threads) as block:
            tensors = _EpilogueTensors(bias2, scale2, scale_hidden, y, H, tokens, token_ids, weights)
            args = _alloc_epilogue(traits, TILE, tensors)
            operands = _Operands(hidden, w2, token_ids, expert_ids, num_valid, row_tiles, steps, T.ceildiv(H, config.rows))
            _gemm(traits, operands, args, store, block)

    return down


# --- block: shared memory, barriers, scheduler, roles ----------------------------------------------------------------


def _alloc_epilogue(traits: _Traits, columns: int, tensors: _EpilogueTensors) -> _EpilogueArgs:
    """Allocate what an epilogue uses; `columns` are those of a subtile."""
    config, of_rows, of_tokens = traits.config, (_AUX_BUFFERS, traits.config.rows), (_AUX_BUFFERS, traits.config.block_M)
    has_slots = tensors.token_ids is not None
    ready_tokens = 2 * config.ready_groups  # of one thread
    values = ready_tokens * (2 if has_slots else 1)

    @T.macro
    def alloc_shared():
        out_s = T.alloc_shared((ROLES.num_consumers, config.subtile_M, columns + _PAD), "bfloat16")
        bias_s, row_scale_s = T.alloc_shared(of_rows, "float32"), T.alloc_shared(of_rows, "float32")
        token_scale_s = T.alloc_shared(of_tokens, "float32")
        return out_s, bias_s, row_scale_s, token_scale_s

    @T.macro
    def alloc_shared_of_slots():
        token_ids_s, token_weights_s = T.alloc_shared(of_tokens, "int32"), T.alloc_shared(of_tokens, "float32")
        return token_ids_s, token_weights_s

    @T.macro
    def alloc_registers():
        row_bias_r, row_scale_r = T.alloc_local((2,), "float32"), T.alloc_local((2,), "float32")
        token_scale_r, token_weights_r = T.alloc_local((ready_tokens,), "float32"), T.alloc_local((ready_tokens,), "float32")
        values_r = T.alloc_local((values,), "float32")
        return row_bias_r, row_scale_r, token_scale_r, token_weights_r, values_r

    of_slots = alloc_shared_of_slots() if has_slots else (None, None)
    return _EpilogueArgs(tensors, *alloc_shared(), *of_slots, *alloc_registers())


@T.macro
def _gemm(traits, operands, args, store, block):
    """Run the GEMM of a block. `store(traits, args, consumer, tile)` emits the epilogue of a consumer."""
    X_s = T.alloc_shared((traits.config.num_stages, traits.config.block_M, traits.tile_format.K), traits.tile_format.dtype)
    W_s = T.alloc_shared((traits.config.num_stages, traits.config.block_tiles, traits.tile_format.tile_words), "uint32")
    T.annotate_layout({X_s: make_swizzled_layout(X_s)})
    pipeline = alloc_pipeline(traits.config.num_stages, WARPGROUP, ROLES.consumer_warps)
    aux_empty = T.alloc_barrier([ROLES.consumer_warps] * _AUX_BUFFERS)
    thread = T.get_thread_binding()
    num_tiles = operands.num_valid[0] // traits.config.block_M * operands.tile_columns
    scheduler = PersistentScheduler(traits.num_blocks, block, num_tiles)
    aux = Pipeline(_AUX_BUFFERS, None, aux_empty)
    shared = _Block(X_s, W_s, pipeline, aux, scheduler, operands.tile_columns, thread)
    _dispatch_roles(traits, operands, args, store, shared)


def _dispatch_roles(traits: _Traits, operands: _Operands, args: _EpilogueArgs, store: Callable, block: _Block) -> None:
    """Make the first threads consumers and the others producers."""
    consume = functools.partial(_consume, traits, operands, args, store, block)
    produce = functools.partial(_produce, traits, operands, args, block)
    dispatch(block.thread, (ROLES.consumer_threads, consume), (WARPGROUP, produce))


# --- producer --------------------------------------------------------------------------------------------------------


def _used_tokens(traits: _Traits, operands: _Operands, by):
    """Return how many tokens of a tile are computed: the least width that holds those which the block of tokens has."""
    config, token_ids = traits.config, operands.token_ids
    first, widths = by * config.block_M, config.widths
    # Padding is last and has one id, and other ids differ. All ids are loaded together.
    padding = token_ids[first + config.block_M - 1]
    used = sum(
        (
            T.cast(token_ids[first + narrow] != padding, "int32") * (wide - narrow)
            for narrow, wide in itertools.pairwise(widths)
        ),
        T.int32(widths[0]),
    )

    @T.macro
    def emit():
        return T.alloc_var("int32", used)

    return emit() if config.narrower else config.block_M


@T.macro
def _produce(traits, operands, args, block):
    """Keep the pipeline filled, tile after tile."""
    ROLES.begin_producer()
    state = start_state(traits.config.num_stages, PRODUCER_START)
    pdl.wait()
    pdl.trigger()
    for wave in T.serial(block.scheduler.num_waves):
        by = T.alloc_var("int32", block.tile_row(wave))
        row_tile = T.alloc_var("int32", block.tile_column(wave, by) * traits.config.block_tiles)
        expert = T.alloc_var("int32", operands.expert_ids[by])
        used = _used_tokens(traits, operands, by)
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


def _load_activations(traits: _Traits, operands: _Operands, block: _Block, stage, by, step, used) -> None:
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


def _load_token_vectors(traits: _Traits, args: _EpilogueArgs, block: _Block, stage, by, buffer) -> None:
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


# --- consumers -------------------------------------------------------------------------------------------------------


@T.macro
def _consume(traits, operands, args, store, block):
    """Multiply and store the consumer's rows of weights, tile after tile."""
    ROLES.begin_consumer()
    consumer = _alloc_consumer(traits, block)
    pdl.wait()
    for wave in T.serial(block.scheduler.num_waves):
        by = T.alloc_var("int32", block.tile_row(wave))
        first_tile = consumer.warpgroup * traits.config.consumer_tiles  # of the block's
        row_tile = T.alloc_var("int32", block.tile_column(wave, by) * traits.config.block_tiles + first_tile)
        used = _used_tokens(traits, operands, by)
        block.pipeline.wait(consumer.state.stage, consumer.state.phase)
        _multiply(traits, operands, block, consumer, used)
        block.pipeline.release(consumer.state.stage, consumer.lane)
        consumer.state.advance()
        store(traits, args, consumer, _Tile(by * traits.config.block_M, row_tile, block.aux.stage(wave), used))
        block.aux.release(block.aux.stage(wave), consumer.lane)


def _alloc_consumer(traits: _Traits, block: _Block) -> _Consumer:
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
    return _Consumer(*registers, state, warpgroup=block.thread // WARPGROUP, thread=block.thread % WARPGROUP)


def _multiply(traits: _Traits, operands: _Operands, block: _Block, consumer: _Consumer, used) -> None:
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


def _multiply_width(traits: _Traits, operands: _Operands, block: _Block, consumer: _Consumer, width: int) -> None:
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
    traits: _Traits, operands: _Operands, block: _Block, consumer: _Consumer, width: int, step, group: int, half: int
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


def _issue_mmas(traits: _Traits, consumer: _Consumer, width: int, group: int, half: int) -> None:
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


def _decode_group(traits: _Traits, block: _Block, consumer: _Consumer, group: int, half: int) -> None:
    """Decode a group of tiles of the consumer's stage to one half of A_r."""
    tiles = traits.config.group_tiles
    for m in range(tiles):
        _decode_tile(traits, block, consumer, group * tiles + m, (half * tiles + m) * TILE_REGISTERS)


def _decode_tile(traits: _Traits, block: _Block, consumer: _Consumer, m: int, begin: int) -> None:
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


# --- epilogue of a consumer ------------------------------------------------------------------------------------------


@T.macro
def _consumer_sync(warpgroup):
    """Wait for the other threads of a consumer, by a named barrier of its own, whose number must be a constant."""
    if warpgroup == 0:
        warpgroup_sync(0)
    else:
        warpgroup_sync(1)


def _sigmoid(x):
    """Return a sigmoid without the branches of an exact division, across which nothing is moved; bfloat16 keeps less."""
    exponential = T.call_pure_extern("float32", "__expf", -x)
    return T.call_pure_extern("float32", "__fdividef", T.float32(1), T.float32(1) + exponential)


def _load_row_args(traits: _Traits, args: _EpilogueArgs, consumer: _Consumer, tile: _Tile, m: int) -> None:
    """Load what the epilogue needs of rows g and g + 8 of the consumer's tile m."""
    row_in_tile = consumer.warp * 16 + consumer.lane // 4
    first = (consumer.warpgroup * traits.config.consumer_tiles + m) * TILE + row_in_tile
    bias_s, scale_s, buffer = args.bias_s, args.row_scale_s, tile.buffer

    @T.macro
    def emit():
        for v in T.unroll(2):
            args.row_bias_r[v] = bias_s[buffer, first + v * 8]
            args.row_scale_r[v] = scale_s[buffer, first + v * 8] if traits.is_scaled else T.float32(1)

    emit()


def _load_token_args(traits: _Traits, args: _EpilogueArgs, consumer: _Consumer, tile: _Tile, first) -> None:
    """Load what the epilogue needs of tokens 8 n + 2 t and the next, for the ready groups n from token `first` on."""
    if args.token_weights_s is not None:
        _load_tokens(traits, args.token_weights_s, args.token_weights_r, consumer, tile, first)
    if traits.is_scaled:
        _load_tokens(traits, args.token_scale_s, args.token_scale_r, consumer, tile, first)


def _load_tokens(traits: _Traits, vector_s, vector_r, consumer: _Consumer, tile: _Tile, first) -> None:
    t = consumer.lane % 4

    @T.macro
    def emit():
        for n in T.unroll(traits.config.ready_groups):
            for i in T.vectorized(2):
                vector_r[n * 2 + i] = vector_s[tile.buffer, first + n * 8 + t * 2 + i]

    emit()


def _scale_and_add_bias(args: _EpilogueArgs, accumulator, token_scale, v):
    """Return an accumulator of row g + 8 v, scaled and with its bias."""
    return accumulator * (token_scale * args.row_scale_r[v]) + args.row_bias_r[v]


def _store_subtile(traits: _Traits, consumer: _Consumer, columns: int, token, row_tile, store_piece: Callable) -> None:
    """Store the subtile that the consumer has in shared memory, which it may write again afterwards.

    `store_piece(token, row_tile, row, column)` stores eight columns of a row; the subtile begins at `token` and `row_tile`.
    """
    rows, pieces = traits.config.subtile_M, columns // 8

    @T.macro
    def emit(token, row_tile):
        _consumer_sync(consumer.warpgroup)
        for turn in T.serial(-(-rows * pieces // WARPGROUP)):
            piece = turn * WARPGROUP + consumer.thread
            row, column = piece // pieces, piece % pieces * 8
            if row < rows:
                store_piece(token, row_tile, row, column)
        _consumer_sync(consumer.warpgroup)

    emit(token, row_tile)


def _store_hidden(activation, traits: _Traits, args: _EpilogueArgs, consumer: _Consumer, tile: _Tile) -> None:
    """The epilogue of `gate_up`: activate the consumer's tiles and store hidden rows, one subtile after the other."""
    config = traits.config

    def of_subtile(first: int, token: int) -> None:
        for m in range(first, first + config.subtile_tiles):
            _activate(activation, traits, args, consumer, tile, m, token)
        _store_hidden_subtile(traits, args, consumer, tile, first, token)

    for first in range(0, config.consumer_tiles, config.subtile_tiles):
        for token in range(0, config.block_M, config.subtile_M):
            _where_used(traits, tile, token, functools.partial(of_subtile, first, token))


def _where_used(traits: _Traits, tile: _Tile, token: int, emit: Callable) -> None:
    """Emit what is done for the subtile from `token` of the tile on, if the tile has so many tokens."""

    @T.macro
    def guarded():
        if tile.used > token:
            emit()

    if token < traits.config.widths[0]:
        emit()
    else:
        guarded()


def _activate(activation, traits: _Traits, args: _EpilogueArgs, consumer: _Consumer, tile: _Tile, m: int, token: int) -> None:
    """Write the features of the consumer's tile m to its subtile in shared memory, for tokens from `token` of the tile on."""
    ready, warpgroup = traits.config.ready_groups, consumer.warpgroup
    g, t = consumer.lane // 4, consumer.lane % 4
    feature = m % traits.config.subtile_tiles * FEATURES + consumer.warp * 8 + g

    @T.macro
    def emit():
        _load_row_args(traits, args, consumer, tile, m)
        for group in T.unroll(traits.config.subtile_M // 8 // ready):
            _load_token_args(traits, args, consumer, tile, token + group * ready * 8)
            for n in T.unroll(ready):
                for i in T.unroll(2):
                    at = m * traits.tile_accumulators + (token // 8 + group * ready + n) * 4 + i
                    scale = args.token_scale_r[n * 2 + i] if traits.is_scaled else T.float32(1)
                    gate = _scale_and_add_bias(args, consumer.accumulators[at], scale, 0)
                    up = _scale_and_add_bias(args, consumer.accumulators[at + 2], scale, 1)
                    args.values_r[n * 2 + i] = activation(gate, up, _sigmoid)
            for n in T.unroll(ready):
                for i in T.unroll(2):
                    row = (group * ready + n) * 8 + t * 2 + i
                    args.out_s[warpgroup, row, feature] = T.cast(args.values_r[n * 2 + i], "bfloat16")

    emit()


def _store_hidden_subtile(
    traits: _Traits, args: _EpilogueArgs, consumer: _Consumer, tile: _Tile, first: int, token: int
) -> None:
    """Store a subtile of hidden: features of tiles from `first` on, tokens from `token` of the tile on."""
    I, hidden, out_s = args.tensors.columns, args.tensors.out, args.out_s
    columns = traits.config.subtile_tiles * FEATURES

    @T.macro
    def store_piece(first_token, row_tile, row, column):
        if row_tile * FEATURES + column < I:
            for v in T.vectorized(8):
                hidden[first_token + token + row, row_tile * FEATURES + column + v] = out_s[consumer.warpgroup, row, column + v]

    _store_subtile(traits, consumer, columns, tile.token, tile.row_tile + first, store_piece)


def _store_slots(epilogue: str, traits: _Traits, args: _EpilogueArgs, consumer: _Consumer, tile: _Tile) -> None:
    """The epilogue of `down`: weight the results and store or add them, one subtile after the other."""
    config = traits.config

    def of_subtile(m: int, token: int) -> None:
        _weight(epilogue, traits, args, consumer, tile, m, token)
        if epilogue == "reduce":
            _store_slots_subtile(traits, args, consumer, tile, m, token)

    for m in range(config.consumer_tiles):
        for token in range(0, config.block_M, config.subtile_M):
            _where_used(traits, tile, token, functools.partial(of_subtile, m, token))
    if epilogue == "atomic":
        _consumer_sync(consumer.warpgroup)  # as _store_subtile does last: then the buffer of the epilogue is released


def _weight(epilogue: str, traits: _Traits, args: _EpilogueArgs, consumer: _Consumer, tile: _Tile, m: int, token: int) -> None:
    """Store or add the weighted results of the consumer's tile m for tokens from `token` of the tile on."""
    ready, t = traits.config.ready_groups, consumer.lane % 4

    @T.macro
    def emit():
        _load_row_args(traits, args, consumer, tile, m)
        for group in T.unroll(traits.config.subtile_M // 8 // ready):
            _load_token_args(traits, args, consumer, tile, token + group * ready * 8)
            for n in T.unroll(ready):
                for i in T.unroll(2):
                    scale = args.token_scale_r[n * 2 + i] if traits.is_scaled else T.float32(1)
                    for v in T.unroll(2):
                        at = m * traits.tile_accumulators + (token // 8 + group * ready + n) * 4 + v * 2 + i
                        result = _scale_and_add_bias(args, consumer.accumulators[at], scale, v)
                        args.values_r[(n * 2 + i) * 2 + v] = result * args.token_weights_r[n * 2 + i]
            for n in T.unroll(ready):
                for i in T.unroll(2):
                    row = (group * ready + n) * 8 + t * 2 + i
                    _store_or_add_pair(epilogue, args, consumer, tile, m, token, row, n * 2 + i)

    emit()


def _store_or_add_pair(epilogue: str, args: _EpilogueArgs, consumer: _Consumer, tile: _Tile, m: int, token: int, row, pair):
    """Emit the store of two neighbouring columns of a row to the consumer's subtile, or their addition to y.

    The row is counted in the subtile, which begins at `token` of the tile; the values are pair `pair` of values_r.
    """
    H, tokens, y, add_pair = args.tensors.columns, args.tensors.tokens, args.tensors.out, store_pair("atomic")

    @T.macro
    def emit(row_tile, row, column, pair):
        if epilogue == "reduce":
            for v in T.vectorized(2):
                args.out_s[consumer.warpgroup, row, column + v] = T.cast(args.values_r[pair * 2 + v], "bfloat16")
        else:
            id = args.token_ids_s[tile.buffer, token + row] & TOKEN_MASK
            if id < tokens and row_tile * TILE + column < H:
                add_pair(y, id, 0, row_tile * TILE + column, args.values_r, pair)

    emit(tile.row_tile + m, row, consumer.warp * 16 + 2 * (consumer.lane // 4), pair)


def _store_slots_subtile(traits: _Traits, args: _EpilogueArgs, consumer: _Consumer, tile: _Tile, m: int, token: int) -> None:
    """Store a subtile of y: the rows of the consumer's tile m, tokens from `token` of the tile on, each to its slot."""
    H, tokens, y, out_s = args.tensors.columns, args.tensors.tokens, args.tensors.out, args.out_s

    @T.macro
    def store_piece(first_token, row_tile, row, column):
        id = T.alloc_var("int32", args.token_ids_s[tile.buffer, token + row])
        if (id & TOKEN_MASK) < tokens and row_tile * TILE + column < H:
            for v in T.vectorized(8):
                y[id & TOKEN_MASK, id >> TOKEN_BITS, row_tile * TILE + column + v] = out_s[consumer.warpgroup, row, column + v]

    _store_subtile(traits, consumer, TILE, tile.token, tile.row_tile + m, store_piece)


# --- host ------------------------------------------------------------------------------------------------------------


def takes(problem: Problem) -> bool:
    """Tiles for bfloat16 or fp8, and any number of tokens."""
    return problem.weights_layout in HOPPER_LAYOUTS.values()


def compile_kernels(problem: Problem, device) -> Callable:
    """Return run(x, routing, w13, w2, y), see `problem`."""
    tile_format, num_blocks, I = TILE_FORMATS[problem.a_format], problem.num_sms, problem.intermediate_size
    scatter = sm90_scatter.compile_scatter(problem, device)
    config13, config2 = pick_configs(problem)
    first = device.compile(gate_up, config13, num_blocks, problem.activation, tile_format, pass_configs=PASS_CONFIGS)
    requantize = sm90_scatter.compile_requantize(problem, device)
    second = device.compile(down, config2, num_blocks, problem.epilogue, tile_format, pass_configs=PASS_CONFIGS)

    def run(x, routing, w13, w2, y) -> None:
        token_ids, weights, expert_ids, num_valid, _ = routing
        hidden = device.empty(token_ids.shape[0], I, dtype="bfloat16")
        first(*scatter(x, routing), token_ids, expert_ids, num_valid, w13.tiles, w13.row_scale, w13.bias, hidden)
        second(*requantize(hidden, routing), token_ids, weights, expert_ids, num_valid, w2.tiles, w2.row_scale, w2.bias, y)

    return run

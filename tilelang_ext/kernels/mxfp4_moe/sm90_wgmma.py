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

`sm90_block` has what the roles share, `sm90_load` the producer, `sm90_multiply` and `sm90_store` the consumers.
"""

import functools
from collections.abc import Callable

from tilelang.layout import make_swizzled_layout

from tilelang_ext import language as T
from tilelang_ext.formats import MX_GROUP
from tilelang_ext.kernels.mxfp4_moe import sm90_scatter
from tilelang_ext.kernels.mxfp4_moe.problem import HOPPER_LAYOUTS, Problem
from tilelang_ext.kernels.mxfp4_moe.sm90_block import Block, EpilogueArgs, EpilogueTensors, Operands, Traits
from tilelang_ext.kernels.mxfp4_moe.sm90_config import FEATURES, ROLES, Config, pick_configs
from tilelang_ext.kernels.mxfp4_moe.sm90_config import pick_config as pick_config  # every implementation has it
from tilelang_ext.kernels.mxfp4_moe.sm90_load import produce
from tilelang_ext.kernels.mxfp4_moe.sm90_multiply import consume
from tilelang_ext.kernels.mxfp4_moe.sm90_slots import slots_type
from tilelang_ext.kernels.mxfp4_moe.sm90_store import alloc_epilogue, store_hidden, store_slots
from tilelang_ext.kernels.mxfp4_moe.sm90_tiles import BFLOAT16, TILE, TILE_FORMATS, TileFormat
from tilelang_ext.kernels.sm90.pipeline import Pipeline, alloc_pipeline
from tilelang_ext.kernels.sm90.roles import WARPGROUP, dispatch
from tilelang_ext.kernels.sm90.scheduler import PersistentScheduler

PARTIAL_DTYPE, USES_PDL = "bfloat16", True
# The kernel's own barriers order everything here. One that upstream adds would be reached by the elected thread alone.
PASS_CONFIGS = {
    "tl.disable_warp_specialized": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.disable_thread_storage_sync": True,
}
_AUX_BUFFERS = 2  # of what the epilogue reads


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
    traits = Traits(config, num_blocks, tile_format)
    columns, store = config.subtile_tiles * FEATURES, functools.partial(store_hidden, activation)

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
            args = alloc_epilogue(traits, columns, EpilogueTensors(bias13, scale13, scale_x, hidden, I))
            operands = Operands(x, w13, token_ids, expert_ids, num_valid, row_tiles, steps, T.ceildiv(2 * I, config.rows))
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
    traits = Traits(config, num_blocks, tile_format)
    store = functools.partial(store_slots, epilogue)

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
            tensors = EpilogueTensors(bias2, scale2, scale_hidden, y, H, tokens, token_ids, weights)
            args = alloc_epilogue(traits, TILE, tensors)
            operands = Operands(hidden, w2, token_ids, expert_ids, num_valid, row_tiles, steps, T.ceildiv(H, config.rows))
            _gemm(traits, operands, args, store, block)

    return down


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
    shared = Block(X_s, W_s, pipeline, aux, scheduler, operands.tile_columns, thread)
    _dispatch_roles(traits, operands, args, store, shared)


def _dispatch_roles(traits: Traits, operands: Operands, args: EpilogueArgs, store: Callable, block: Block) -> None:
    """Make the first threads consumers and the others producers."""
    as_consumer = functools.partial(consume, traits, operands, args, store, block)
    as_producer = functools.partial(produce, traits, operands, args, block)
    dispatch(block.thread, (ROLES.consumer_threads, as_consumer), (WARPGROUP, as_producer))


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

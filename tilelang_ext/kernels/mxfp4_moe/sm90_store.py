"""The epilogue of the WGMMA kernels: scales, bias, activation or weights of tokens, and the stores of subtiles."""

import functools
from collections.abc import Callable

from tilelang_ext import language as T
from tilelang_ext.kernels.mxfp4_moe.problem import TOKEN_BITS, TOKEN_MASK
from tilelang_ext.kernels.mxfp4_moe.sm90_block import Consumer, EpilogueArgs, EpilogueTensors, Tile, Traits
from tilelang_ext.kernels.mxfp4_moe.sm90_config import FEATURES, ROLES
from tilelang_ext.kernels.mxfp4_moe.sm90_slots import store_pair
from tilelang_ext.kernels.mxfp4_moe.sm90_tiles import TILE
from tilelang_ext.kernels.sm90.roles import WARPGROUP, warpgroup_sync

_AUX_BUFFERS = 2  # of what the epilogue reads
_PAD = 8  # elements of a row of shared memory, against bank conflicts


def alloc_epilogue(traits: Traits, columns: int, tensors: EpilogueTensors) -> EpilogueArgs:
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
    return EpilogueArgs(tensors, *alloc_shared(), *of_slots, *alloc_registers())


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


def _load_row_args(traits: Traits, args: EpilogueArgs, consumer: Consumer, tile: Tile, m: int) -> None:
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


def _load_token_args(traits: Traits, args: EpilogueArgs, consumer: Consumer, tile: Tile, first) -> None:
    """Load what the epilogue needs of tokens 8 n + 2 t and the next, for the ready groups n from token `first` on."""
    if args.token_weights_s is not None:
        _load_tokens(traits, args.token_weights_s, args.token_weights_r, consumer, tile, first)
    if traits.is_scaled:
        _load_tokens(traits, args.token_scale_s, args.token_scale_r, consumer, tile, first)


def _load_tokens(traits: Traits, vector_s, vector_r, consumer: Consumer, tile: Tile, first) -> None:
    t = consumer.lane % 4

    @T.macro
    def emit():
        for n in T.unroll(traits.config.ready_groups):
            for i in T.vectorized(2):
                vector_r[n * 2 + i] = vector_s[tile.buffer, first + n * 8 + t * 2 + i]

    emit()


def _scale_and_add_bias(args: EpilogueArgs, accumulator, token_scale, v):
    """Return an accumulator of row g + 8 v, scaled and with its bias."""
    return accumulator * (token_scale * args.row_scale_r[v]) + args.row_bias_r[v]


def _store_subtile(traits: Traits, consumer: Consumer, columns: int, token, row_tile, store_piece: Callable) -> None:
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


def store_hidden(activation, traits: Traits, args: EpilogueArgs, consumer: Consumer, tile: Tile) -> None:
    """The epilogue of `gate_up`: activate the consumer's tiles and store hidden rows, one subtile after the other."""
    config = traits.config

    def of_subtile(first: int, token: int) -> None:
        for m in range(first, first + config.subtile_tiles):
            _activate(activation, traits, args, consumer, tile, m, token)
        _store_hidden_subtile(traits, args, consumer, tile, first, token)

    for first in range(0, config.consumer_tiles, config.subtile_tiles):
        for token in range(0, config.block_M, config.subtile_M):
            _where_used(traits, tile, token, functools.partial(of_subtile, first, token))


def _where_used(traits: Traits, tile: Tile, token: int, emit: Callable) -> None:
    """Emit what is done for the subtile from `token` of the tile on, if the tile has so many tokens."""

    @T.macro
    def guarded():
        if tile.used > token:
            emit()

    if token < traits.config.widths[0]:
        emit()
    else:
        guarded()


def _activate(activation, traits: Traits, args: EpilogueArgs, consumer: Consumer, tile: Tile, m: int, token: int) -> None:
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


def _store_hidden_subtile(traits: Traits, args: EpilogueArgs, consumer: Consumer, tile: Tile, first: int, token: int) -> None:
    """Store a subtile of hidden: features of tiles from `first` on, tokens from `token` of the tile on."""
    I, hidden, out_s = args.tensors.columns, args.tensors.out, args.out_s
    columns = traits.config.subtile_tiles * FEATURES

    @T.macro
    def store_piece(first_token, row_tile, row, column):
        if row_tile * FEATURES + column < I:
            for v in T.vectorized(8):
                hidden[first_token + token + row, row_tile * FEATURES + column + v] = out_s[consumer.warpgroup, row, column + v]

    _store_subtile(traits, consumer, columns, tile.token, tile.row_tile + first, store_piece)


def store_slots(epilogue: str, traits: Traits, args: EpilogueArgs, consumer: Consumer, tile: Tile) -> None:
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


def _weight(epilogue: str, traits: Traits, args: EpilogueArgs, consumer: Consumer, tile: Tile, m: int, token: int) -> None:
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


def _store_or_add_pair(epilogue: str, args: EpilogueArgs, consumer: Consumer, tile: Tile, m: int, token: int, row, pair):
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


def _store_slots_subtile(traits: Traits, args: EpilogueArgs, consumer: Consumer, tile: Tile, m: int, token: int) -> None:
    """Store a subtile of y: the rows of the consumer's tile m, tokens from `token` of the tile on, each to its slot."""
    H, tokens, y, out_s = args.tensors.columns, args.tensors.tokens, args.tensors.out, args.out_s

    @T.macro
    def store_piece(first_token, row_tile, row, column):
        id = T.alloc_var("int32", args.token_ids_s[tile.buffer, token + row])
        if (id & TOKEN_MASK) < tokens and row_tile * TILE + column < H:
            for v in T.vectorized(8):
                y[id & TOKEN_MASK, id >> TOKEN_BITS, row_tile * TILE + column + v] = out_s[consumer.warpgroup, row, column + v]

    _store_subtile(traits, consumer, TILE, tile.token, tile.row_tile + m, store_piece)

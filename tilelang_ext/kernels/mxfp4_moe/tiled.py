"""The two GEMMs of an MXFP4 mixture of experts, tile by tile, on every target; activations in 16, 8 or 4 bits.

    hidden[row, j] = act(x[token(row)] . w13[e, j] + bias13[e, j], x[token(row)] . w13[e, I + j] + bias13[e, I + j])
    y[token, h] = sum over slots of weight * (hidden[row] . w2[e, h] + bias2[e, h])

Rows come sorted by expert (`routing`): a block of rows has one expert, and blocks past `num_valid` end at once. Operands are
decoded to 16-bit tiles in shared memory. Tokens, top_k, experts and sizes are run-time values, so other sizes compile nothing.
Weights may be stored wider than they are: along K nothing past the sizes of x and hidden is read, and rows of weights past the
sizes of hidden and y are not stored. There is no branch on the target.

No MoE intrinsics (`examples/moe.py` has them): `T.mxfp4_scaled_matmul` would decode an 8- or 4-bit A for gate and again for up,
and could not load the codes of the next step meanwhile; `T.swiglu` would exchange gate and up, which one thread has here,
through shared memory; and `T.moe_gather` and `T.moe_scatter` know no codes with scales and no bias.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tilelang_ext import language as T
from tilelang_ext.formats import CODES_PER_BYTE, MX_GROUP
from tilelang_ext.kernels.metal_tile import FP8_OPERATIONS, MXFP4_OPERATIONS, Gemm, pick_tile
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.formats import (
    SIXTEEN_BITS,
    OperandTile,
    compile_quantize,
    empty_tensors,
    hidden_format,
    store_tile,
    tensor_types,
    tile_dtype,
)
from tilelang_ext.kernels.mxfp4_moe.problem import GENERAL_LAYOUT, TOKEN_BITS, TOKEN_MASK, Problem
from tilelang_ext.marks import READ_ONCE

PARTIAL_DTYPE, USES_PDL = "float32", False
_GROUP_BYTES = MX_GROUP // CODES_PER_BYTE  # bytes of codes that share a scale


@dataclass(frozen=True)
class Config:
    """Tile sizes and threads; block_N counts columns of hidden, and of y."""

    block_M: int
    block_N: int = 64
    block_K: int = 64
    threads: int = 128


def pick_config(problem: Problem) -> Config:
    """Return the tile for a problem, by the rows that an expert has when all experts are equally busy."""
    if problem.target_kind == "metal":
        tile = pick_tile(_gemms(problem), blocks_K=(64,), blocks_M=(16, 32, 64, 128))
        return Config(tile.block_M, tile.block_N, tile.block_K, tile.threads)
    table = [
        # (rows up to, config)
        (16, Config(16)),  # the smallest M of a matrix unit
        (32, Config(32)),
        (64, Config(64)),
        (None, Config(128, threads=256)),  # two accumulators of 128 rows take 64 registers per thread
    ]
    return next(config for most, config in table if most is None or problem.rows_per_expert <= most)


def pick_configs(problem: Problem) -> tuple[Config]:
    """Return the one configuration of both GEMMs."""
    return (pick_config(problem),)


def _gemms(problem: Problem) -> tuple[Gemm, Gemm]:
    """Return what the model for Metal is told of the two GEMMs."""
    a_bytes = 2 if problem.a_format in SIXTEEN_BITS else 0.5 if problem.a_format == "mxfp4" else 1
    a_decoding = 0 if problem.a_format in SIXTEEN_BITS else MXFP4_OPERATIONS if problem.a_format == "mxfp4" else FP8_OPERATIONS

    def gemm(N: int, products: int) -> Gemm:
        return Gemm(
            problem.rows_per_expert,
            N,
            a_device_bytes=a_bytes,
            b_device_bytes=(_GROUP_BYTES + 1) / MX_GROUP,
            a_decoding=a_decoding,
            b_decoding=MXFP4_OPERATIONS,
            b_group=MX_GROUP,
            is_prefetched=True,
            products=products,
            batch=min(problem.num_experts, problem.slots),
        )

    return gemm(problem.intermediate_size, 2), gemm(problem.hidden_size, 1)


class _Codes(NamedTuple):
    """Rows of activations; the scale is None for 16 bits."""

    codes: Any
    scale: Any


class _SortedRows(NamedTuple):
    """What the sort says about rows."""

    token_ids: Any
    weights: Any
    expert_ids: Any
    num_valid: Any


class _Weights(NamedTuple):
    codes: Any
    scale: Any
    bias: Any


def _gathered(row_s):
    """Return the index of row i of a tile whose rows are listed in shared memory."""
    return lambda i: (row_s[i],)


def _of_expert(expert, row):
    """Return the index of row i of a tile that starts at `row` of the weights of one expert."""
    return lambda i: (expert, row + i)


def gate_up(config: Config, activation: Activation, a_format: str):
    """Return the prim_func of the first GEMM.

    Its parameters are (x, [scale_x,] token_ids, expert_ids, num_valid, w13, scale13, bias13, hidden[, scale_hidden]).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | x, scale_x | (tokens, H) in the format `a_format`; no scale_x for 16 bits | as `formats` says |
    | token_ids, expert_ids, num_valid | as `moe_sort` with block_M writes them | int32 |
    | w13 | (E, 2 * stored I, stored H / 32, 16), gate above up | uint8 |
    | scale13 | (E, 2 * stored I, stored H / 32) | uint8 |
    | bias13 | (E, 2 * stored I) | float32 |
    | hidden, scale_hidden | (blocks * block_M, I) in `hidden_format(a_format)`, in sorted order; undefined past num_valid | |
    """
    tokens, groups_H, groups_I = T.dynamic("tokens"), T.dynamic("groups_H"), T.dynamic("groups_I")
    blocks, experts, rows, groups = T.dynamic("blocks"), T.dynamic("experts"), T.dynamic("rows"), T.dynamic("groups")
    block_M, block_N, block_K, threads = config.block_M, config.block_N, config.block_K, config.threads
    dtype, h_format = tile_dtype(a_format), hidden_format(a_format)
    stored_I = rows // 2
    x_type, scale_x_type = tensor_types(a_format, tokens, groups_H)
    hidden_type, scale_hidden_type = tensor_types(h_format, blocks * block_M, groups_I)
    ids_type, expert_ids_type = T.Tensor((blocks * block_M,), "int32"), T.Tensor((blocks,), "int32")
    num_valid_type = T.Tensor((1,), "int32")
    w_type, scale_w_type, bias_type = _weight_types(experts, rows, groups)

    @T.macro
    def body(x, sorted_rows, w13, hidden):
        with T.Kernel(T.ceildiv(groups_I * MX_GROUP, block_N), blocks, threads=threads) as (bx, by):
            token_s = T.alloc_shared((block_M,), "int32")
            A_s = T.alloc_shared((block_M, block_K), dtype)
            gate_s = T.alloc_shared((block_N, block_K), dtype)
            up_s = T.alloc_shared((block_N, block_K), dtype)
            a = OperandTile(a_format, block_M, block_K)
            gate, up = OperandTile("mxfp4", block_N, block_K), OperandTile("mxfp4", block_N, block_K)
            gate_f = T.alloc_fragment((block_M, block_N), "float32")
            up_f = T.alloc_fragment((block_M, block_N), "float32")
            num_valid = T.alloc_var("int32", sorted_rows.num_valid[0])
            if by * block_M < num_valid:
                expert = T.alloc_var("int32", sorted_rows.expert_ids[by])
                for i in T.Parallel(block_M):
                    token_s[i] = sorted_rows.token_ids[by * block_M + i] & TOKEN_MASK
                T.clear(gate_f)
                T.clear(up_f)
                x_rows, gate_rows = _gathered(token_s), _of_expert(expert, bx * block_N)
                up_rows = _of_expert(expert, stored_I + bx * block_N)
                a.fetch(x.codes, x.scale, x_rows, 0, groups_H)
                gate.fetch(w13.codes, w13.scale, gate_rows, 0, groups_H)
                up.fetch(w13.codes, w13.scale, up_rows, 0, groups_H)
                for k in T.serial(T.ceildiv(groups_H * MX_GROUP, block_K)):
                    a.decode_to(A_s)
                    gate.decode_to(gate_s)
                    up.decode_to(up_s)
                    a.fetch(x.codes, x.scale, x_rows, k + 1, groups_H)
                    gate.fetch(w13.codes, w13.scale, gate_rows, k + 1, groups_H)
                    up.fetch(w13.codes, w13.scale, up_rows, k + 1, groups_H)
                    T.gemm(A_s, gate_s, gate_f, transpose_B=True)
                    T.gemm(A_s, up_s, up_f, transpose_B=True)
                if a_format == "fp8":
                    for i, j in T.Parallel(block_M, block_N, annotations={READ_ONCE: 1}):
                        gate_f[i, j] *= x.scale[token_s[i]]
                        up_f[i, j] *= x.scale[token_s[i]]
                for i, j in T.Parallel(block_M, block_N, annotations={READ_ONCE: 1}):
                    gate_f[i, j] += w13.bias[expert, bx * block_N + j]
                    up_f[i, j] += w13.bias[expert, stored_I + bx * block_N + j]
                for i, j in T.Parallel(block_M, block_N):
                    gate_f[i, j] = activation(gate_f[i, j], up_f[i, j])
                store_tile(h_format, block_M, block_N)(gate_f, hidden.codes, hidden.scale, by * block_M, bx)

    if a_format in SIXTEEN_BITS:

        @T.prim_func
        def gate_up(
            x: x_type,
            token_ids: ids_type,
            expert_ids: expert_ids_type,
            num_valid: num_valid_type,
            w13: w_type,
            scale13: scale_w_type,
            bias13: bias_type,
            hidden: hidden_type,
        ):
            sorted_rows = _SortedRows(token_ids, None, expert_ids, num_valid)
            body(_Codes(x, None), sorted_rows, _Weights(w13, scale13, bias13), _Codes(hidden, None))
    else:

        @T.prim_func
        def gate_up(
            x: x_type,
            scale_x: scale_x_type,
            token_ids: ids_type,
            expert_ids: expert_ids_type,
            num_valid: num_valid_type,
            w13: w_type,
            scale13: scale_w_type,
            bias13: bias_type,
            hidden: hidden_type,
            scale_hidden: scale_hidden_type,
        ):
            sorted_rows = _SortedRows(token_ids, None, expert_ids, num_valid)
            body(_Codes(x, scale_x), sorted_rows, _Weights(w13, scale13, bias13), _Codes(hidden, scale_hidden))

    return gate_up


def down(config: Config, a_format: str, epilogue: str):
    """Return the prim_func of the second GEMM.

    Its parameters are (hidden, [scale_hidden,] token_ids, weights, expert_ids, num_valid, w2, scale2, bias2, y).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | hidden, scale_hidden | (blocks * block_M, I) in the format `a_format`; no scale_hidden for 16 bits | as `formats` says |
    | token_ids, weights, expert_ids, num_valid | as `moe_sort` with block_M writes them | int32; weights float32 |
    | w2 | (E, stored H, stored I / 32, 16) | uint8 |
    | scale2 | (E, stored H, stored I / 32) | uint8 |
    | bias2 | (E, stored H) | float32 |
    | y | `reduce`: (tokens, top_k, H), one row per slot; `atomic`: (tokens, H), zeros, to which slots are added | float32 |

    Slots without a local expert are not written.
    """
    tokens, top_k, H, groups_I = T.dynamic("tokens"), T.dynamic("top_k"), T.dynamic("H"), T.dynamic("groups_I")
    blocks, experts, stored_H, groups = T.dynamic("blocks"), T.dynamic("experts"), T.dynamic("stored_H"), T.dynamic("groups")
    block_M, block_N, block_K, threads = config.block_M, config.block_N, config.block_K, config.threads
    dtype = tile_dtype(a_format)
    hidden_type, scale_hidden_type = tensor_types(a_format, blocks * block_M, groups_I)
    ids_type, weights_type = T.Tensor((blocks * block_M,), "int32"), T.Tensor((blocks * block_M,), "float32")
    expert_ids_type, num_valid_type = T.Tensor((blocks,), "int32"), T.Tensor((1,), "int32")
    w_type, scale_w_type, bias_type = _weight_types(experts, stored_H, groups)
    y_type = T.Tensor((tokens, top_k, H) if epilogue == "reduce" else (tokens, H), "float32")

    @T.macro
    def store(y, token, slot, column, value):
        if epilogue == "reduce":
            y[token, slot, column] = value
        else:
            T.atomic_add(y[token, column], value)

    @T.macro
    def body(hidden, sorted_rows, w2, y):
        with T.Kernel(T.ceildiv(H, block_N), blocks, threads=threads) as (bx, by):
            row_s = T.alloc_shared((block_M,), "int32")
            A_s = T.alloc_shared((block_M, block_K), dtype)
            W_s = T.alloc_shared((block_N, block_K), dtype)
            a, w = OperandTile(a_format, block_M, block_K), OperandTile("mxfp4", block_N, block_K)
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            num_valid = T.alloc_var("int32", sorted_rows.num_valid[0])
            if by * block_M < num_valid:
                expert = T.alloc_var("int32", sorted_rows.expert_ids[by])
                for i in T.Parallel(block_M):
                    row_s[i] = by * block_M + i
                T.clear(C_f)
                hidden_rows, w_rows = _gathered(row_s), _of_expert(expert, bx * block_N)
                a.fetch(hidden.codes, hidden.scale, hidden_rows, 0, groups_I)
                w.fetch(w2.codes, w2.scale, w_rows, 0, groups_I)
                for k in T.serial(T.ceildiv(groups_I * MX_GROUP, block_K)):
                    a.decode_to(A_s)
                    w.decode_to(W_s)
                    a.fetch(hidden.codes, hidden.scale, hidden_rows, k + 1, groups_I)
                    w.fetch(w2.codes, w2.scale, w_rows, k + 1, groups_I)
                    T.gemm(A_s, W_s, C_f, transpose_B=True)
                for i, j in T.Parallel(block_M, block_N, annotations={READ_ONCE: 1}):
                    C_f[i, j] = sorted_rows.weights[by * block_M + i] * (C_f[i, j] + w2.bias[expert, bx * block_N + j])
                for i, j in T.Parallel(block_M, block_N, annotations={READ_ONCE: 1}):
                    row, column = by * block_M + i, bx * block_N + j
                    token = T.alloc_var("int32", sorted_rows.token_ids[row] & TOKEN_MASK)
                    slot = T.alloc_var("int32", sorted_rows.token_ids[row] >> TOKEN_BITS)
                    if token < tokens and column < H:
                        store(y, token, slot, column, C_f[i, j])

    if a_format in SIXTEEN_BITS:

        @T.prim_func
        def down(
            hidden: hidden_type,
            token_ids: ids_type,
            weights: weights_type,
            expert_ids: expert_ids_type,
            num_valid: num_valid_type,
            w2: w_type,
            scale2: scale_w_type,
            bias2: bias_type,
            y: y_type,
        ):
            sorted_rows = _SortedRows(token_ids, weights, expert_ids, num_valid)
            body(_Codes(hidden, None), sorted_rows, _Weights(w2, scale2, bias2), y)
    else:

        @T.prim_func
        def down(
            hidden: hidden_type,
            scale_hidden: scale_hidden_type,
            token_ids: ids_type,
            weights: weights_type,
            expert_ids: expert_ids_type,
            num_valid: num_valid_type,
            w2: w_type,
            scale2: scale_w_type,
            bias2: bias_type,
            y: y_type,
        ):
            sorted_rows = _SortedRows(token_ids, weights, expert_ids, num_valid)
            body(_Codes(hidden, scale_hidden), sorted_rows, _Weights(w2, scale2, bias2), y)

    return down


def _weight_types(experts, rows, groups) -> tuple:
    return (
        T.Tensor((experts, rows, groups, _GROUP_BYTES), "uint8"),
        T.Tensor((experts, rows, groups), "uint8"),
        T.Tensor((experts, rows), "float32"),
    )


def takes(problem: Problem) -> bool:
    """Weights in the general layout, on every target."""
    return problem.weights_layout == GENERAL_LAYOUT


def compile_kernels(problem: Problem, device) -> Callable:
    """Return run(x, routing, w13, w2, y), see `problem`."""
    config, h_format = pick_config(problem), hidden_format(problem.a_format)
    quantize = compile_quantize(problem, device)
    first = device.compile(gate_up, config, problem.activation, problem.a_format)
    second = device.compile(down, config, h_format, problem.epilogue)

    def run(x, routing, w13, w2, y) -> None:
        token_ids, weights, expert_ids, num_valid, _ = routing
        hidden = empty_tensors(h_format, token_ids.shape[0], problem.intermediate_size, device)
        first(*quantize(x), token_ids, expert_ids, num_valid, *_by_groups(w13), *hidden)
        second(*hidden, token_ids, weights, expert_ids, num_valid, *_by_groups(w2), y)

    return run


def _by_groups(weights) -> tuple:
    """Return codes (E, rows, K / 32, 16), scales and biases of `MXFP4Weights`, as the kernels take them."""
    return weights.codes.unflatten(2, (weights.scale.shape[2], -1)), weights.scale, weights.bias

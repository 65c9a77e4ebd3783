"""The two products of an MXFP4 mixture of experts, by tiles; activations in 16, 8 or 4 bits, products of 16-bit tiles.

    hidden[row, j] = act(x[token(row)] . w13[e, j] + bias13[e, j], x[token(row)] . w13[e, I + j] + bias13[e, I + j])
    y[token, h] = sum over slots of weight * (hidden[row] . w2[e, h] + bias2[e, h])

Rows come sorted by expert (`routing`), a block of rows has one expert, and blocks past `num_valid` end at once. Tokens,
top_k, experts and sizes are run-time values. Weights may be stored wider than they are: of K nothing past the sizes of x and
hidden is read, of rows nothing past those of hidden and y is stored. No branch on the target.
"""

from dataclasses import dataclass

from tilelang_ext import language as T
from tilelang_ext.formats import CODES_PER_BYTE, MX_GROUP
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.formats import WIDE, Operand, between, store_tile, tensors, tile_dtype
from tilelang_ext.kernels.mxfp4_moe.routing import TOKEN_BITS

_GROUP_BYTES = MX_GROUP // CODES_PER_BYTE  # of weights that share a scale
_TOKEN = (1 << TOKEN_BITS) - 1


@dataclass(frozen=True)
class Config:
    """Tile sizes and threads; block_N counts columns of hidden, and of y."""

    block_M: int
    block_N: int = 64
    block_K: int = 64
    threads: int = 128


def pick_config(tokens: int, top_k: int, num_experts: int, kind: str) -> Config:
    """Return the tile: block_M by the rows that an expert has when all are equally busy."""
    rows = -(-tokens * top_k // num_experts)
    table = [
        # (rows up to, config)
        (16, Config(16)),  # the least that a matrix unit takes
        (32, Config(32)),
        (64, Config(64)),
        # Two tiles of weights and one of 64 rows: 27 of 32 KB on Metal. Elsewhere two sums of 128 rows: 64 registers a thread.
        (None, Config(64) if kind == "metal" else Config(128, threads=256)),
    ]
    return next(config for most, config in table if most is None or rows <= most)


def _by_row(row_s):
    """Index rows that shared memory names."""
    return lambda i: (row_s[i],)


def _of_expert(expert, row):
    """Index the weights' rows from `row` on of one expert."""
    return lambda i: (expert, row + i)


def gate_up(config: Config, activation: Activation, kind: str):
    """The prim_func of stage 1: (x, [scale_x,] token_ids, expert_ids, num_valid, w13, scale13, bias13, hidden[, scale_hidden]).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | x, scale_x | (tokens, H) as `kind` of formats; scale_x not of 16 bits | of `kind` |
    | token_ids, expert_ids, num_valid | of `moe_sort`, with block_M | int32 |
    | w13 | (E, 2 * stored I, stored H / 32, 16), gate above up | uint8 |
    | scale13 | (E, 2 * stored I, stored H / 32) | uint8 |
    | bias13 | (E, 2 * stored I) | float32 |
    | hidden, scale_hidden | (blocks * block_M, I) as `between(kind)`, in sorted order; undefined past num_valid | |
    """
    tokens, groups_H, groups_I = T.dynamic("tokens"), T.dynamic("groups_H"), T.dynamic("groups_I")
    blocks, experts, rows, groups = T.dynamic("blocks"), T.dynamic("experts"), T.dynamic("rows"), T.dynamic("groups")
    block_M, block_N, block_K, threads = config.block_M, config.block_N, config.block_K, config.threads
    dtype, kind_hidden = tile_dtype(kind), between(kind)
    stored_I = rows // 2
    x_type, scale_x_type = tensors(kind, tokens, groups_H)
    hidden_type, scale_hidden_type = tensors(kind_hidden, blocks * block_M, groups_I)
    ids_type, expert_ids_type = T.Tensor((blocks * block_M,), "int32"), T.Tensor((blocks,), "int32")
    num_valid_type = T.Tensor((1,), "int32")
    w_type, scale_w_type, bias_type = _weight_types(experts, rows, groups)

    @T.macro
    def run(x, scale_x, token_ids, expert_ids, num_valid, w13, scale13, bias13, hidden, scale_hidden):
        with T.Kernel(T.ceildiv(groups_I * MX_GROUP, block_N), blocks, threads=threads) as (bx, by):
            token_s = T.alloc_shared((block_M,), "int32")
            A_s = T.alloc_shared((block_M, block_K), dtype)
            gate_s = T.alloc_shared((block_N, block_K), dtype)
            up_s = T.alloc_shared((block_N, block_K), dtype)
            a = Operand(kind, block_M, block_K)
            gate, up = Operand("mxfp4", block_N, block_K), Operand("mxfp4", block_N, block_K)
            gate_f = T.alloc_fragment((block_M, block_N), "float32")
            up_f = T.alloc_fragment((block_M, block_N), "float32")
            if by * block_M < num_valid[0]:
                expert = T.alloc_var("int32", expert_ids[by])
                for i in T.Parallel(block_M):
                    token_s[i] = token_ids[by * block_M + i] & _TOKEN
                T.clear(gate_f)
                T.clear(up_f)
                rows_x, rows_gate = _by_row(token_s), _of_expert(expert, bx * block_N)
                rows_up = _of_expert(expert, stored_I + bx * block_N)
                a.fetch(x, scale_x, rows_x, 0, groups_H)
                gate.fetch(w13, scale13, rows_gate, 0, groups_H)
                up.fetch(w13, scale13, rows_up, 0, groups_H)
                for k in T.serial(T.ceildiv(groups_H * MX_GROUP, block_K)):
                    a.place(A_s)
                    gate.place(gate_s)
                    up.place(up_s)
                    a.fetch(x, scale_x, rows_x, k + 1, groups_H)
                    gate.fetch(w13, scale13, rows_gate, k + 1, groups_H)
                    up.fetch(w13, scale13, rows_up, k + 1, groups_H)
                    T.gemm(A_s, gate_s, gate_f, transpose_B=True)
                    T.gemm(A_s, up_s, up_f, transpose_B=True)
                if kind == "fp8":
                    for i, j in T.Parallel(block_M, block_N):
                        gate_f[i, j] *= scale_x[token_s[i]]
                        up_f[i, j] *= scale_x[token_s[i]]
                for i, j in T.Parallel(block_M, block_N):
                    gate_f[i, j] += bias13[expert, bx * block_N + j]
                    up_f[i, j] += bias13[expert, stored_I + bx * block_N + j]
                for i, j in T.Parallel(block_M, block_N):
                    gate_f[i, j] = activation(gate_f[i, j], up_f[i, j])
                store_tile(kind_hidden, block_M, block_N)(gate_f, hidden, scale_hidden, by * block_M, bx)

    if kind in WIDE:

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
            run(x, None, token_ids, expert_ids, num_valid, w13, scale13, bias13, hidden, None)
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
            run(x, scale_x, token_ids, expert_ids, num_valid, w13, scale13, bias13, hidden, scale_hidden)

    return gate_up


def down(config: Config, kind: str, epilogue: str):
    """The prim_func of stage 2: (hidden, [scale_hidden,] token_ids, weights, expert_ids, num_valid, w2, scale2, bias2, y).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | hidden, scale_hidden | (blocks * block_M, I) as `kind`, of `gate_up`; scale_hidden not of 16 bits | of `kind` |
    | token_ids, weights, expert_ids, num_valid | of `moe_sort`, with block_M | int32; weights float32 |
    | w2 | (E, stored H, stored I / 32, 16) | uint8 |
    | scale2 | (E, stored H, stored I / 32) | uint8 |
    | bias2 | (E, stored H) | float32 |
    | y | `reduce`: (tokens, top_k, H), each slot by itself; `atomic`: (tokens, H), zeros, to which slots are added | float32 |

    Slots without a local expert are not written.
    """
    tokens, top_k, H, groups_I = T.dynamic("tokens"), T.dynamic("top_k"), T.dynamic("H"), T.dynamic("groups_I")
    blocks, experts, stored_H, groups = T.dynamic("blocks"), T.dynamic("experts"), T.dynamic("stored_H"), T.dynamic("groups")
    block_M, block_N, block_K, threads = config.block_M, config.block_N, config.block_K, config.threads
    dtype = tile_dtype(kind)
    hidden_type, scale_hidden_type = tensors(kind, blocks * block_M, groups_I)
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
    def run(hidden, scale_hidden, token_ids, weights, expert_ids, num_valid, w2, scale2, bias2, y):
        with T.Kernel(T.ceildiv(H, block_N), blocks, threads=threads) as (bx, by):
            row_s = T.alloc_shared((block_M,), "int32")
            A_s = T.alloc_shared((block_M, block_K), dtype)
            W_s = T.alloc_shared((block_N, block_K), dtype)
            a, w = Operand(kind, block_M, block_K), Operand("mxfp4", block_N, block_K)
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            if by * block_M < num_valid[0]:
                expert = T.alloc_var("int32", expert_ids[by])
                for i in T.Parallel(block_M):
                    row_s[i] = by * block_M + i
                T.clear(C_f)
                rows_hidden, rows_w = _by_row(row_s), _of_expert(expert, bx * block_N)
                a.fetch(hidden, scale_hidden, rows_hidden, 0, groups_I)
                w.fetch(w2, scale2, rows_w, 0, groups_I)
                for k in T.serial(T.ceildiv(groups_I * MX_GROUP, block_K)):
                    a.place(A_s)
                    w.place(W_s)
                    a.fetch(hidden, scale_hidden, rows_hidden, k + 1, groups_I)
                    w.fetch(w2, scale2, rows_w, k + 1, groups_I)
                    T.gemm(A_s, W_s, C_f, transpose_B=True)
                for i, j in T.Parallel(block_M, block_N):
                    row, column = by * block_M + i, bx * block_N + j
                    token = T.alloc_var("int32", token_ids[row] & _TOKEN)
                    slot = T.alloc_var("int32", token_ids[row] >> TOKEN_BITS)
                    if token < tokens and column < H:
                        store(y, token, slot, column, weights[row] * (C_f[i, j] + bias2[expert, column]))

    if kind in WIDE:

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
            run(hidden, None, token_ids, weights, expert_ids, num_valid, w2, scale2, bias2, y)
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
            run(hidden, scale_hidden, token_ids, weights, expert_ids, num_valid, w2, scale2, bias2, y)

    return down


def _weight_types(experts, rows, groups) -> tuple:
    return (
        T.Tensor((experts, rows, groups, _GROUP_BYTES), "uint8"),
        T.Tensor((experts, rows, groups), "uint8"),
        T.Tensor((experts, rows), "float32"),
    )

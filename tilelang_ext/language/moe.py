"""`T.moe_gather` and `T.moe_scatter`: move rows between tokens and their experts.

A row of a block belongs to the token `id & 0xFFFFFF` and its slot `id >> 24`, where id is an entry of `sorted_token_ids`
(int32). A token that does not exist marks padding.
"""

from __future__ import annotations

import tilelang.language as T
from tilelang.utils.language import to_buffer_region

from tilelang_ext.language.tile import tile
from tilelang_ext.marks import MOE_GATHER

TOKEN_BITS = 24  # of a sorted token id; the slot lies above
_TOKEN_MASK = (1 << TOKEN_BITS) - 1
_ACCUMULATOR_DTYPES = ("float32", "float16", "bfloat16")


def moe_gather(X, sorted_token_ids, out) -> None:
    """Write out[i, j] = X[token of row i, j], or zero where there is no such token or column.

    X: (tokens, columns) global, a buffer or a region of all its rows; its first column goes to out[:, 0].
    sorted_token_ids: (block_M,) int32. out: (block_M, block_K) of X's dtype, in a fragment or shared memory.
    Columns past the end of X's buffer are not read.

    Raises TypeError for dtypes and scopes, ValueError for shapes.
    """
    name = "T.moe_gather"
    x, ids, o = tile(name, "X", X), tile(name, "sorted_token_ids", sorted_token_ids, 1), tile(name, "out", out)
    x.check_scope("global", hint="rows are read where they lie")
    o.check_dtype(x.dtype, hint="gather into a tile of X's dtype, then cast")
    o.check_scope("fragment", "shared", hint="a copy to global memory follows with T.copy")
    o.check_constant()
    ids.check_dtype("int32", hint="pass the sorted ids as they are")
    ids.check_shape(o.shape[0], hint="slice the ids as the rows of out")
    block_M, block_K = o.shape
    tokens, columns = x.shape[0], x.buffer.shape[-1]
    mark = {MOE_GATHER: [to_buffer_region(operand) for operand in (X, sorted_token_ids, out)]}

    @T.macro
    def gather():
        for i, j in T.Parallel(block_M, block_K, annotations=mark):
            token = ids[i,] & _TOKEN_MASK
            inside = T.And(token < tokens, x.begin[1] + j < columns)
            o.buffer[o.index(i, j)] = T.if_then_else(inside, x[token, j], T.cast(0, x.dtype))

    gather()


def moe_scatter(acc, sorted_token_ids, weights, Y, mode: str = "reduce") -> None:
    """Write the weighted rows of a block, weights[i] * acc[i, j] computed in float32, to their tokens in Y.

    mode "atomic": they are added to Y (tokens, columns), float32, which the caller zeroes, in unspecified order.
    mode "reduce": they are stored in Y (tokens, top_k, columns) by slot, to be summed over the slots afterwards, which is
    deterministic; Y is float32, float16 or bfloat16, and slots that no row has are not written.
    acc: (block_M, block_N) float32, float16 or bfloat16, fragment or shared. sorted_token_ids: (block_M,) int32.
    weights: (block_M,) float32. Y: global, a buffer or a region of all its tokens (and slots). Rows without a token, slots
    past top_k and columns past the end of Y's buffer are dropped.

    Raises TypeError for dtypes and scopes, ValueError for shapes and modes.
    """
    name = "T.moe_scatter"
    if mode not in ("atomic", "reduce"):
        raise ValueError(f"{name}: mode must be 'atomic' or 'reduce'; got {mode!r}; 'reduce' is deterministic")
    a, ids = tile(name, "acc", acc), tile(name, "sorted_token_ids", sorted_token_ids, 1)
    w, y = tile(name, "weights", weights, 1), tile(name, "Y", Y, 2 if mode == "atomic" else 3)
    a.check_dtype(*_ACCUMULATOR_DTYPES, hint="cast it")
    a.check_scope("fragment", "shared")
    a.check_constant()
    block_M, block_N = a.shape
    ids.check_dtype("int32", hint="pass the sorted ids as they are")
    ids.check_shape(block_M, hint="slice the ids as the rows of acc")
    w.check_dtype("float32", hint="weights are float32")
    w.check_shape(block_M, hint="slice the weights as the rows of acc")
    if mode == "atomic":
        y.check_dtype("float32", hint="not every target adds 16-bit floats atomically: convert the sum")
    else:
        y.check_dtype(*_ACCUMULATOR_DTYPES, hint="store a float")
    y.check_scope("global", hint="rows are written where they lie")
    tokens, columns = y.shape[0], y.buffer.shape[-1]

    @T.macro
    def scatter():
        for i, j in T.Parallel(block_M, block_N):
            token = ids[i,] & _TOKEN_MASK
            slot = ids[i,] >> TOKEN_BITS
            if mode == "atomic":
                if T.And(token < tokens, y.begin[1] + j < columns):
                    T.atomic_add(y.buffer[y.index(token, j)], T.cast(a[i, j], "float32") * w[i,])
            else:
                if T.And(T.And(token < tokens, slot < y.shape[1]), y.begin[2] + j < columns):
                    y.buffer[y.index(token, slot, j)] = T.cast(T.cast(a[i, j], "float32") * w[i,], y.dtype)

    scatter()

"""The result of the second GEMM on Hopper: one row per slot, or slots added to the row of their token."""

from tilelang_ext import language as T


def slots_type(epilogue: str, tokens, top_k, H):
    """Return the type of y: for `reduce` bfloat16, one row per slot; for `atomic` float32, zeros to which slots are added."""
    return T.Tensor((tokens, top_k, H), "bfloat16") if epilogue == "reduce" else T.Tensor((tokens, H), "float32")


def store_pair(epilogue: str):
    """Return the macro store_pair(y, token, slot, column, values, pair), which stores or adds two neighbours of a slot's row.

    They are pair `pair` of `values`, in columns `column` and `column` + 1.
    """

    @T.macro
    def store_pair(y, token, slot, column, values, pair):
        if epilogue == "reduce":
            for v in T.vectorized(2):
                y[token, slot, column + v] = T.cast(values[pair * 2 + v], "bfloat16")
        else:
            for v in T.unroll(2):
                T.atomic_add(y[token, column + v], values[pair * 2 + v])

    return store_pair

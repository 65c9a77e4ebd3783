"""A kernel that converts, adds and multiplies two fp8 types, and the types that are not a chip's own."""

# Without `from __future__ import annotations`: this file holds kernels.

from tilelang_ext import formats
from tilelang_ext import language as T

CODES, HALVES = 256, 1 << 16
FOREIGN = {"gfx942": (formats.E4M3, formats.E5M2), "gfx950": (formats.E4M3_FNUZ, formats.E5M2_FNUZ)}
CONSTANT = 0.3  # between two numbers of each format


def conversions(dtypes, floats):
    """Values of all codes, codes of `floats` floats, codes of sums of neighbours, and a constant, of two types."""
    e4, e5 = dtypes

    @T.prim_func
    def kernel(
        A4: T.Tensor((CODES,), e4), A5: T.Tensor((CODES,), e5), X: T.Tensor((floats,), "float32"),
        V4: T.Tensor((CODES,), "float32"), V5: T.Tensor((CODES,), "float16"), C4: T.Tensor((floats,), e4),
        C5: T.Tensor((floats,), e5), S4: T.Tensor((CODES,), e4), S5: T.Tensor((CODES,), e5), K: T.Tensor((2,), e4),
    ):  # fmt: skip
        with T.Kernel(1, threads=64):
            for i in T.Parallel(CODES):
                V4[i] = T.cast(A4[i], "float32")
            for i in T.Parallel(CODES):
                V5[i] = T.cast(A5[i], "float16")
            for i in T.Parallel(floats):
                C4[i] = T.cast(X[i], e4)
            for i in T.Parallel(floats):
                C5[i] = T.cast(X[i], e5)
            for i in T.Parallel(CODES):
                S4[i] = A4[i] + A4[CODES - 1 - i]
            for i in T.Parallel(CODES):
                S5[i] = T.max(A5[i] * A5[CODES - 1 - i], A5[i])
            for i in T.Parallel(2):
                K[i] = T.cast(CONSTANT, e4)

    return kernel

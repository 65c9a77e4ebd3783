"""T.Parallel on target c: upstream prints vectors of + - * / alone, all else is computed by scalars."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import tilelang
import torch

from tilelang_ext import language as T

SIZE = 128


@T.prim_func
def operators(
    X: T.Tensor((SIZE,), "int32"),
    Y: T.Tensor((SIZE,), "float32"),
    B: T.Tensor((SIZE,), "uint8"),
    C: T.Tensor((8, SIZE), "int32"),
    F: T.Tensor((2, SIZE), "float32"),
    D: T.Tensor((SIZE,), "uint8"),
):
    with T.Kernel(1, threads=32):
        for i in T.Parallel(SIZE):
            C[0, i] = T.max(X[i], 3)
        for i in T.Parallel(SIZE):
            C[1, i] = X[i] // 3 + X[i] % 5
        for i in T.Parallel(SIZE):
            C[2, i] = (X[i] << 2) | (X[i] >> 1)
        for i in T.Parallel(SIZE):
            C[3, i] = T.if_then_else(X[i] > i, X[i], i)
        for i in T.Parallel(SIZE):
            C[4, i] = i
        for i in T.Parallel(SIZE):
            C[5, i] = T.cast(B[i], "int32")
        for i in T.Parallel(SIZE):
            C[6, i] = X[X[i] % SIZE]
        for i in T.Parallel(SIZE):
            C[7, i] = X[i] * 2 + 1
        for i in T.Parallel(SIZE):
            F[0, i] = T.min(Y[i], 0.5)
        for i in T.Parallel(SIZE):
            F[1, i] = Y[i] + i
        for i in T.Parallel(SIZE):
            D[i] = B[i] + 3


def test_values():
    x, y = torch.randint(-100, 100, (SIZE,), dtype=torch.int32), torch.randn(SIZE)
    b, i = torch.randint(0, 256, (SIZE,), dtype=torch.uint8), torch.arange(SIZE, dtype=torch.int32)
    C, F, D = torch.zeros(8, SIZE, dtype=torch.int32), torch.zeros(2, SIZE), torch.zeros(SIZE, dtype=torch.uint8)
    tilelang.compile(operators, target="c")(x, y, b, C, F, D)
    expected = [x.clamp(min=3), x // 3 + x % 5, x << 2 | x >> 1, torch.maximum(x, i), i, b.int(), x[x % SIZE], x * 2 + 1]
    assert torch.equal(C, torch.stack(expected))
    assert torch.equal(F, torch.stack([y.clamp(max=0.5), y + i]))
    assert torch.equal(D, b + 3)

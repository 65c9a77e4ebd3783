"""Tiles of fewer elements than threads, whose fragments lie in several threads: memory is updated once, and in order."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import pytest
import torch
from passes.run import run

from tilelang_ext import language as T

N = 16


@T.prim_func
def small_tiles(
    A: T.Tensor((4, N), "float32"),  # in place
    B: T.Tensor((N,), "float32"),  # in place, once more in shared memory
    C: T.Tensor((8, 64), "float32"),
    state: T.Tensor((8,), "float32"),
    D: T.Tensor((16, 100), "float32"),  # in place: several threads hold what one stores, since 128 do not divide 100
):
    with T.Kernel(4, threads=128) as bx:
        a = T.alloc_fragment((1, N), "float32")
        b_s, b = T.alloc_shared((N,), "float32"), T.alloc_fragment((N,), "float32")
        c, row = T.alloc_fragment((8, 64), "float32"), T.alloc_fragment((8,), "float32")
        state_s = T.alloc_shared((8,), "float32")
        T.copy(A[bx, 0], a)
        for i, j in T.Parallel(1, N):
            a[i, j] += 1
        T.copy(a, A[bx, 0])
        if bx == 0:
            T.copy(B, b_s)
            for i in T.Parallel(N):
                b_s[i] = b_s[i] + 1
                b[i] = b_s[i]
            for i in T.Parallel(N):
                B[i] = B[i] + b[i]
                b[i] = B[i]
            for i in T.Parallel(N):
                B[i] = 2 * b[i]
        if bx == 1:
            T.clear(state_s)
            for _ in T.serial(3):
                T.copy(C, c)
                T.reduce_sum(c, row, dim=1)
                for i in T.Parallel(8):
                    state_s[i] = state_s[i] * 0.5 + row[i]
                    row[i] = state_s[i]
            T.copy(row, state)
        if bx == 2:
            d, most = T.alloc_fragment((16, 100), "float32"), T.alloc_fragment((16,), "float32")
            T.copy(D, d)
            T.reduce_max(d, most, dim=1)
            for i, j in T.Parallel(16, 100):
                d[i, j] += most[i]
            T.copy(d, D)


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx942", "hip -mcpu=gfx1100"])
def test_small_tiles(target):
    A, B, C = torch.arange(4 * N).reshape(4, N).float(), torch.arange(N).float(), torch.arange(512).reshape(8, 64).float()
    state, D = torch.full((8,), torch.nan), torch.arange(1600).reshape(16, 100).float()
    expected = A + 1, 2 * (2 * B + 1), C.sum(1) * 1.75, D + D[:, 99:]
    run(small_tiles, A, B, C, state, D, target=target)
    assert torch.equal(A, expected[0])
    assert torch.equal(B, expected[1])
    assert torch.equal(state, expected[2])
    assert torch.equal(D, expected[3])

"""An atomic of a tile that asks for TMA adds on targets that have none, too."""

import pytest
import tilelang
import torch

from tilelang_ext import language as T
from tilelang_ext import simulate


@T.prim_func
def adds(A: T.Tensor((64, 64), "float32"), C: T.Tensor((64, 64), "float32")):
    with T.Kernel(2, threads=64):
        tile = T.alloc_shared((64, 64), "float32")
        T.copy(A, tile)
        T.atomic_add(C, tile, use_tma=True)


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx942", "c"])
def test_atomic_that_asks_for_tma(target):
    a, c = torch.randn(64, 64), torch.ones(64, 64)
    tilelang.compile(adds, target="c")(a, c) if target == "c" else simulate(adds, a, c, target=target)
    torch.testing.assert_close(c, 1 + 2 * a)

"""A scalar parameter that no host code passes is refused by name."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import pytest
import tilelang

from tilelang_ext import language as T
from tilelang_ext import metal
from tilelang_ext.rocm import program


@T.prim_func
def scaled(A: T.Tensor((32,), "float32"), s: T.bfloat16):
    with T.Kernel(1, threads=32):
        for i in T.Parallel(32):
            A[i] = A[i] * T.cast(s, "float32")


@pytest.mark.parametrize(
    "lower",
    [metal.lower, lambda func: program.lower(func, "hip -mcpu=gfx942"), lambda func: tilelang.compile(func, target="c")],
    ids=["metal", "hip", "c"],
)
def test_bfloat16(lower):
    with pytest.raises(TypeError, match=r"^s: a scalar parameter must be .*; got bfloat16; declare it as T.float32, and write"):
        lower(scaled)

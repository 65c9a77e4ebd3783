"""What upstream's LayoutInference cannot lay out is one line that names the tiles and the threads."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import pytest

from tilelang_ext import language as T
from tilelang_ext import metal
from tilelang_ext.rocm import program

HIP = "hip -mcpu=gfx942"


@T.prim_func
def cast(A: T.Tensor((24, 40), "float16"), C: T.Tensor((24, 40), "float32")):
    with T.Kernel(1, threads=128):
        h = T.alloc_fragment((24, 40), "float16")
        g = T.alloc_fragment((24, 40), "bfloat16")
        f = T.alloc_fragment((24, 40), "float32")
        T.copy(A, h)
        for i, j in T.Parallel(24, 40):
            g[i, j] = T.cast(h[i, j], "bfloat16")
        for i, j in T.Parallel(24, 40):
            f[i, j] = T.cast(g[i, j], "float32") + T.cast(h[i, j], "float32")
        T.copy(g, A)
        T.copy(f, C)


@pytest.mark.parametrize("lower", [metal.lower, lambda func: program.lower(func, HIP)], ids=["metal", "hip"])
def test_fragments_without_a_common_layout(lower):
    with pytest.raises(ValueError, match=r"^T.Parallel: .* got h \(24, 40\) of float16, .* and 128 threads; take .*$"):
        lower(cast)

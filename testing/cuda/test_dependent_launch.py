"""T.pdl_sync: a kernel that calls it is launched so that it may begin before the kernel ahead of it ends."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import pytest
import tilelang
from tvm.target import Target

from tilelang_ext import language as T


def kernel(waits: bool):
    @T.prim_func
    def kernel(A: T.Tensor((128,), "float32")):
        with T.Kernel(2, threads=64) as block:
            T.pdl_trigger()
            if waits:
                T.pdl_sync()
            for i in T.Parallel(64):
                A[block * 64 + i] = 1.0

    return kernel


@pytest.mark.parametrize("waits", [True, False])
def test_only_a_kernel_that_waits_is_a_dependent_launch(waits):
    target = Target({"kind": "cuda", "arch": "sm_90a"})
    with target:
        mod = tilelang.lower(kernel(waits), target=target, enable_device_compile=False).device_mod
    [function] = mod.functions.values()
    *_, grid, x, y, z = names = list(map(str, function.attrs["tirx.kernel_launch_params"]))
    assert [grid, x, y, z] == ["blockIdx.x", "threadIdx.x", "threadIdx.y", "threadIdx.z"]
    assert names[:-4] == (["tirx.use_programtic_dependent_launch"] if waits else [])

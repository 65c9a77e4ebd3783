"""What upstream's passes refuse by an InternalError is one line that says the rule."""

import pytest
import tilelang
from cuda.kernels import lower
from tvm.error import InternalError

from tilelang_ext import language as T
from tilelang_ext import metal
from tilelang_ext.passes.upstream_errors import in_our_words
from tilelang_ext.rocm import program as rocm


@T.prim_func
def largest(A: T.Tensor((64, 64), "float16"), C: T.Tensor((64,), "float16")):
    with T.Kernel(1, threads=128):
        f = T.alloc_fragment((64, 64), "float16")
        r = T.alloc_fragment((64,), "float16")
        T.copy(A, f)
        T.reduce_max(f, r, dim=1, nan_propagate=True)
        T.copy(r, C)


@pytest.mark.parametrize("target", ["hip", "c"])
def test_nan_of_halves(target):
    with pytest.raises(NotImplementedError, match=rf"^T.reduce_max: nan_propagate .*; got it on target {target}; leave it out"):
        tilelang.compile(largest, target="c") if target == "c" else rocm.lower(largest, "hip -mcpu=gfx942")


def lowered_for_amd(kernel):
    return rocm.lower(kernel, "hip -mcpu=gfx942")


def lowered_for_hopper(kernel):
    return lower(kernel, "sm_90a")


@T.prim_func
def two_rows(A: T.Tensor((64,), "float32"), C: T.Tensor((2, 64), "float32")):
    with T.Kernel(1, threads=64):
        f = T.alloc_fragment((2, 64), "float32")
        for i in T.Parallel(64):
            f[0, i] = A[i]
            f[1, i] = -A[i]
        T.copy(f, C)


@pytest.mark.parametrize(
    ("target", "lowered"), [("metal", metal.lower), ("hip", lowered_for_amd), ("cuda", lowered_for_hopper)]
)
def test_a_fragment_at_two_places(target, lowered):
    message = rf"^T.Parallel: .*; got f at \(0, i\) and at \(1, i\) on target {target}; write one T.Parallel"
    with pytest.raises(ValueError, match=message):
        lowered(two_rows)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (
            "[ThreadSync] Cannot lower a required shared-memory sync inside the then branch: its participating threads are not "
            "warp-uniform.\nCondition: 32 <= tx and tx < 96\n  more",
            ValueError,
            r"^T.sync_threads: .* whole warps or waves; got the condition 32 <= tx and tx < 96 on target hip; let the branch "
            r".* with {\"tl.disable_thread_storage_sync\": True} in pass_configs$",
        ),
        (
            "Check failed: finalize_reducer: batch (8) exceeds total output elements (4)",
            ValueError,
            r"^T.finalize_reducer: .*; got 8 for 4 on target hip; pass batch=4$",
        ),
        (
            "Check failed: cannot reinterpret fragment Fragment((128,) -> (2,)) as 32-bit elements: more",
            ValueError,
            r"^T.view: .* in one thread; got a view as 32-bit elements on target hip; annotate a layout .* shared memory$",
        ),
        ("Check failed: of another kind", InternalError, "of another kind"),
    ],
)
def test_texts(text, kind, message):
    @in_our_words("hip")
    def lower():
        raise InternalError(text)

    with pytest.raises(kind, match=message):
        lower()

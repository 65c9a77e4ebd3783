"""From which thread a reduction counts its groups, told by the conditions around it."""

import pytest
import tilelang  # noqa: F401  its TVM is found once it is imported
import torch
from tvm import IRModule, tirx
from tvm.script import tirx as T

from tilelang_ext import language, simulate
from tilelang_ext.passes.reduction_groups import CountFromFirstThread, Reduction, reduction_of


def program(condition, name="all_reduce_shared<SumOp, 64, 1, 0>", threads=256):
    @T.prim_func(private=True)
    def func(n: T.int32):
        tx = T.launch_thread("threadIdx.x", threads)
        own = T.alloc_buffer((1,), scope="local")
        workspace = T.alloc_buffer((256,), scope="shared")
        if condition(tx, n):
            own[0] = T.call_extern("float32", name, own[0], workspace.data)

    return func


def first_of(condition, **kwargs) -> int | None:
    """Return the first thread that a reduction under `condition` is told to count from, None if it was right."""
    told = []

    def respell(call: tirx.Call, reduction: Reduction) -> tirx.Call:
        told.append(reduction.first)
        return call

    CountFromFirstThread(IRModule({"main": program(condition, **kwargs)}), respell)
    return told[0] if told else None


@pytest.mark.parametrize(
    ("condition", "first"),
    [
        (lambda tx, n: tx < 128, None),
        (lambda tx, n: tx >= 64, None),  # a multiple of the group
        (lambda tx, n: tirx.And(tx >= 32, tx < 96), 32),
        (lambda tx, n: tirx.And(tirx.And(tx < 200, n > 3), tx >= 8), 8),
        (lambda tx, n: tx < n, None),  # says nothing of threads that is known here
        (lambda tx, n: tirx.Or(tx < 64, tx >= 192), None),
    ],
)
def test_first(condition, first):
    assert first_of(condition) == first


def test_threads_that_no_groups_hold():
    with pytest.raises(NotImplementedError, match="whole groups of 64, one after another; got 128 threads from 0 to 159"):
        first_of(lambda tx, n: tirx.Or(tx < 64, tirx.And(tx >= 96, tx < 160)))


@pytest.mark.parametrize(
    ("name", "reduction"),
    [
        ("all_reduce<SumOp, 32, 1>", Reduction("SumOp", 32, 1, 0, None, None)),
        ("all_reduce_shared<MaxOp, 128, 4, 64, 8, 256>", Reduction("MaxOp", 128, 4, 64, 8, 256)),
        ("tl::AllReduce<tl::SumOp, 64, 1, 32>::run", Reduction("tl::SumOp", 64, 1, 32, None, None)),
        ("tl::AllReduce<tl::MinOp, 64, 2, 0, 4, 128>::run_batch", Reduction("tl::MinOp", 64, 2, 0, 4, 128)),
        ("inclusive_scan<SumOp, 64, false>", None),
    ],
)
def test_what_a_name_says(name, reduction):
    assert reduction_of(tirx.call_extern("float32", name, tirx.const(1.0))) == reduction


def rows_from(first, rows, width=512, vector=8):
    """Each row divided by its sum; a row lies in the threads from `first` on."""
    threads = width // vector

    @language.prim_func
    def normalised(x: language.Tensor((rows, width), "float32"), y: language.Tensor((rows, width), "float32")):
        with language.Kernel(1, threads=128):
            f = language.alloc_fragment((rows, width), "float32")
            total = language.alloc_fragment((rows,), "float32")
            language.annotate_layout(
                {
                    f: language.Fragment(f.shape, forward_fn=lambda i, j: (first + j // vector, i * vector + j % vector)),
                    total: language.Fragment(total.shape, forward_fn=lambda i, rep: (first + rep, i), replicate=threads),
                }
            )
            for i, j in language.Parallel(rows, width):
                f[i, j] = x[i, j]
            language.reduce_sum(f, total, dim=1)
            for i, j in language.Parallel(rows, width):
                y[i, j] = f[i, j] / total[i]

    return normalised


@pytest.mark.parametrize(
    ("target", "first", "rows"),
    [("metal", 32, 1), ("metal", 32, 2), ("metal", 16, 3), ("metal", 64, 2), ("hip -mcpu=gfx1100", 32, 2)],
)
def test_several_rows_from_any_thread(target, first, rows):
    """The sums of several rows are one call behind the condition; it counted from thread 0."""
    x, y = torch.rand(rows, 512), torch.full((rows, 512), torch.nan)
    assert simulate(rows_from(first, rows), x, y, target=target).findings == ()
    torch.testing.assert_close(y, x / x.sum(1, keepdim=True))

"""From which thread a reduction counts its groups, told by the conditions around it."""

import pytest
import tilelang  # noqa: F401  its TVM is found once it is imported
from tvm import IRModule, tirx
from tvm.script import tirx as T

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

"""What z3 tries while a pass list runs: linear arithmetic, and what upstream has it try where the pass list fails."""

import threading

import pytest
import tilelang
import z3
from tilelang import tvm

from tilelang_ext import language as T
from tilelang_ext.passes import solver
from tilelang_ext.passes.solver import in_linear_arithmetic

NAMES = tuple(solver._LINEAR)
InternalError, pass_instrument = tvm.error.InternalError, tvm.ir.instrument.pass_instrument
LINEAR, UPSTREAMS = tuple(solver._LINEAR.values()), ("6", "true")


def parameters():
    return tuple(z3.get_param(name) for name in NAMES)


def test_parameters():
    assert parameters() == UPSTREAMS
    assert in_linear_arithmetic(lambda value: (value, parameters()))(7) == (7, LINEAR)
    assert parameters() == UPSTREAMS


def test_second_attempt():
    """What linear arithmetic cannot prove is tried as upstream would; what fails then too is raised."""
    seen = []

    @in_linear_arithmetic
    def lower(error):
        seen.append(parameters())
        if parameters() == LINEAR or error is not InternalError:
            raise error("not proved")
        return "lowered"

    assert lower(InternalError) == "lowered"
    assert seen == [LINEAR, UPSTREAMS]
    with pytest.raises(ValueError, match="not proved"):
        lower(ValueError)
    assert seen[2:] == [LINEAR]
    assert parameters() == UPSTREAMS


def test_threads():
    """A second attempt has upstream's parameters also while others lower, and the last one to end restores them."""
    failed, done = threading.Event(), threading.Event()
    seen = []

    @in_linear_arithmetic
    def first():
        failed.wait(10)
        seen.append(parameters())
        done.set()

    @in_linear_arithmetic
    def second():
        if parameters() == LINEAR:
            raise InternalError
        failed.set()
        done.wait(10)

    threads = [threading.Thread(target=function) for function in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [UPSTREAMS]
    assert parameters() == UPSTREAMS


@T.prim_func
def turn(A: T.Tensor((64,), "float32")):
    with T.Kernel(1, threads=64):
        A_s = T.alloc_shared((64,), "float32")
        for i in T.Parallel(64):
            A_s[i] = A[i]
        for i in T.Parallel(64):
            A[i] = A_s[63 - i]


@pass_instrument
class Recorder:
    def __init__(self):
        self.seen = {}

    def run_after_pass(self, mod, info):
        self.seen.setdefault(info.name, set()).add(parameters())


@pytest.mark.parametrize(
    "target", ["metal", {"kind": "hip", "mcpu": "gfx942"}, {"kind": "cuda", "arch": "sm_90a"}, "c"], ids=str
)
def test_passes(target):
    """Of those that every target has; which of them ask z3 is up to upstream."""
    with tvm.transform.PassContext(instruments=[recorder := Recorder()]), tvm.target.Target(target):
        tilelang.lower(turn, target=tvm.target.Target(target), enable_device_compile=False)
    assert LINEAR in recorder.seen["tl.LayoutInference"]
    assert recorder.seen.get("tl.ThreadSync", {UPSTREAMS}) == {UPSTREAMS}
    assert ("tl.ThreadSync" in recorder.seen) == (target != "c")
    assert parameters() == UPSTREAMS

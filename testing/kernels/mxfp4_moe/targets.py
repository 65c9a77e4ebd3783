"""Run MoE kernels without a GPU: on target c, and from their Metal and HIP texts in the simulator."""

import functools

import tilelang

from tilelang_ext import metal, simulate
from tilelang_ext.rocm import program as rocm

TARGETS = ("c", "metal", "hip -mcpu=gfx942")
REPORTS = {}  # by the function that makes a prim_func: the report of its last run on Metal, and the first argument


@functools.cache
def compiled(make, arguments_of_make, target):
    """The kernel that `make(*arguments_of_make)` returns, compiled once for all tests; it runs on CPU tensors, and fails on
    what the simulator finds. REPORTS has the last report of each on Metal."""
    prim_func = make(*arguments_of_make)
    if target == "c":
        return tilelang.compile(prim_func, target="c")
    program = metal.lower(prim_func) if target == "metal" else rocm.lower(prim_func, target)

    def run(*arguments):
        report = simulate(program, *arguments, target=target, timeout=300)
        assert not report.findings, str(report)
        if target == "metal":
            REPORTS[make] = report, arguments_of_make[0]

    return run

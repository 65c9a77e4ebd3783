"""What z3 tries while a kernel is lowered: linear arithmetic.

Upstream's simplifier asks z3 about what its rules leave open, thousands of times per kernel. Most of it cannot be proved, and
z3 spends its steps on products of unknowns, such as of strides, before it gives up: up to half of the time of lowering. Here it
takes such products for unknowns of their own, and has its older solver of linear arithmetic, which gives up sooner. What it
proves holds as before, but it may prove less. So ThreadSync, which adds barriers where it cannot prove that there need be none,
asks as upstream does, and where a pass fails the module is lowered once more, all of it as upstream would.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

import z3
from tvm import IRModule
from tvm.error import InternalError
from tvm.ir.instrument import pass_instrument
from tvm.ir.transform import PassInfo

from tilelang_ext.passes.instruments import instrumented

_LINEAR = {"smt.arith.solver": "2", "smt.arith.nl": "false"}  # of the process: upstream's contexts are out of reach
_AS_UPSTREAM = ("tl.ThreadSync",)
_Lower = TypeVar("_Lower", bound=Callable)

_lock = threading.Lock()
_running: Counter[bool] = Counter()  # how many threads lower by linear arithmetic, and how many as upstream does
_upstream: dict[str, str] = {}  # the parameters' values elsewhere


def in_linear_arithmetic(lower: _Lower) -> _Lower:
    """Return `lower`, a pass list, with z3 restricted to linear arithmetic, and without where that fails."""

    @functools.wraps(lower)
    def lowered(*arguments):
        with linear_arithmetic(), contextlib.ExitStack() as full, instrumented(_AsUpstream(full)):
            try:
                return lower(*arguments)
            except InternalError:
                pass
        with _arithmetic(is_linear=False):
            return lower(*arguments)

    return lowered


def linear_arithmetic() -> contextlib.AbstractContextManager[None]:
    """Return a context in which z3 tries linear arithmetic, unless another thread lowers as upstream does."""
    return _arithmetic(is_linear=True)


@pass_instrument
class _AsUpstream:
    """Has z3 try, in some passes, what upstream has it try."""

    def __init__(self, within: contextlib.ExitStack):
        self.within = within

    def run_before_pass(self, mod: IRModule, info: PassInfo) -> None:
        if info.name in _AS_UPSTREAM:
            self.within.enter_context(_arithmetic(is_linear=False))

    def run_after_pass(self, mod: IRModule, info: PassInfo) -> None:
        if info.name in _AS_UPSTREAM:
            self.within.close()


@contextlib.contextmanager
def _arithmetic(is_linear: bool) -> Iterator[None]:
    _count(is_linear, 1)
    try:
        yield
    finally:
        _count(is_linear, -1)


def _count(is_linear: bool, by: int) -> None:
    """Count a thread in or out; the parameters are linear while some threads want that and none does not."""
    with _lock:
        was_linear = _is_linear()
        _running[is_linear] += by
        if _is_linear() and not was_linear:
            _upstream.update({name: z3.get_param(name) for name in _LINEAR})
            _set(_LINEAR)
        elif was_linear and not _is_linear():
            _set(_upstream)


def _is_linear() -> bool:
    return _running[True] > 0 and not _running[False]


def _set(parameters: dict[str, str]) -> None:
    for name, value in parameters.items():
        z3.set_param(name, value)

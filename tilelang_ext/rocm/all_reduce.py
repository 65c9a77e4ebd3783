"""Reductions over the threads of a block for what upstream's `tl::AllReduce` does not do: groups that begin at any thread, and
threads that come along for the barriers alone."""

from __future__ import annotations

from tvm import tirx

from tilelang_ext.passes.reduction_groups import Reduction, reduction_of
from tilelang_ext.rocm.device_text import NAMESPACE


def _call(call: tirx.Call, reduction: Reduction, *taken: tirx.PrimExpr) -> tirx.Call:
    numbers = [reduction.operator, reduction.threads, reduction.scale, reduction.first]
    numbers += [] if reduction.batch is None else [reduction.batch, reduction.stride]
    name = f"{NAMESPACE}::all_reduce<{', '.join(map(str, numbers))}>"
    return tirx.Call(call.dtype, call.op, [tirx.StringImm(name), *call.args[1:], *taken])


def with_participants(call: tirx.Call, taken: tirx.PrimExpr) -> tirx.Call:
    """Return the call that every thread makes and that only those of `taken` take part in."""
    name, value, *workspace = call.args
    if value.dtype != "handle":
        value = tirx.if_then_else(taken, value, tirx.const(0, value.dtype))
    return _call(tirx.Call(call.dtype, call.op, [name, value, *workspace]), reduction_of(call), taken)


def count_from(call: tirx.Call, reduction: Reduction) -> tirx.Call:
    """Return the call whose groups are counted from `reduction.first`."""
    if len(call.args) < 3:
        raise NotImplementedError(
            f"T.reduce_*: threads that share a value within a wave must begin at a multiple of their number; got "
            f"{reduction.threads} threads from thread {reduction.first}; annotate a layout that begins at such a multiple"
        )
    return _call(call, reduction)

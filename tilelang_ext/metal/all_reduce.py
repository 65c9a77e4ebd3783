"""Calls of the reductions over threads, as the prelude of the generator defines them."""

from __future__ import annotations

from tvm import tirx

from tilelang_ext.passes.reduction_groups import Reduction


def with_participants(call: tirx.Call, taken: tirx.PrimExpr) -> tirx.Call:
    """Return the call of `all_reduce_shared` that every thread makes and that only those of `taken` take part in."""
    name, value, workspace = call.args
    if value.dtype != "handle":
        value = tirx.if_then_else(taken, value, tirx.const(0, value.dtype))
    return tirx.Call(call.dtype, call.op, [name, value, workspace, taken])


def count_from(call: tirx.Call, reduction: Reduction) -> tirx.Call:
    """Return a call of `all_reduce_shared` whose groups are counted from `reduction.first`."""
    if not call.args[0].value.startswith("all_reduce_shared<"):
        raise NotImplementedError(
            f"T.reduce_*: threads that share a value within a simdgroup must begin at a multiple of their number; got "
            f"{reduction.threads} threads from thread {reduction.first}; annotate a layout that begins at such a multiple"
        )
    numbers = [reduction.operator, reduction.threads, reduction.scale, reduction.first]
    numbers += [] if reduction.batch is None else [reduction.batch, reduction.stride]
    name = f"all_reduce_shared<{', '.join(map(str, numbers))}>"
    return tirx.Call(call.dtype, call.op, [tirx.StringImm(name), *call.args[1:]])

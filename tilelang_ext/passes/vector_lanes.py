"""One lane of a vector without the vector, where it is known how each lane comes about.

    Before  Shuffle([Ramp(n, 5, 4)], [3])      Shuffle([Broadcast(x, 2) * v[Ramp(i, 1, 2)]], [1])
    After   n + 5 * 3                          x * v[i + 1]

Upstream's vectoriser has no rule for a Shuffle, and the generators of AMD and C none either. `T.vectorlow`, `T.vectorhigh` and
`T.vectorcombine` are spelled as Shuffles first. A loop that still holds one is not vectorised.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import DataType, tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import ir_transform, post_order_visit
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten

_BINARY = (
    tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max, tirx.EQ, tirx.NE,
    tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.And, tirx.Or,
)  # fmt: skip
_PARTS = ("tirx.vectorlow", "tirx.vectorhigh", "tirx.vectorcombine")
_NOT_BY_LANE = (*_PARTS, "tirx.reinterpret", "tirx.address_of", "tirx.tvm_access_ptr")
_EXTERN = ("tirx.call_extern", "tirx.call_pure_extern")  # any function, but for those that our rules call


def _lane(vector: tirx.PrimExpr, lane: int) -> tirx.PrimExpr | None:
    """Return one lane of `vector`; None where it is not known how it comes about."""
    if isinstance(vector, tirx.Broadcast):
        return vector.value
    if isinstance(vector, tirx.Ramp):
        return vector.base + vector.stride * tirx.const(lane, vector.base.dtype)
    if isinstance(vector, tirx.Shuffle):
        index = int(vector.indices[lane])
        for part in vector.vectors:
            lanes = DataType(part.dtype).lanes
            if index < lanes:
                return _lane(part, index) if lanes > 1 else part
            index -= lanes
    if isinstance(vector, _BINARY):
        a, b = _lane(vector.a, lane), _lane(vector.b, lane)
        return None if a is None or b is None else type(vector)(a, b)
    if isinstance(vector, tirx.Not):
        a = _lane(vector.a, lane)
        return None if a is None else tirx.Not(a)
    if isinstance(vector, tirx.Cast):
        value = _lane(vector.value, lane)
        return None if value is None else tirx.Cast(_scalar(vector.dtype), value)
    if isinstance(vector, tirx.BufferLoad):
        return _lane_of_load(vector, lane)
    if isinstance(vector, tirx.Call) and isinstance(vector.op, Op) and vector.op.name.startswith("tirx.") and _by_lane(vector):
        operands = [_lane(operand, lane) if DataType(operand.dtype).lanes > 1 else operand for operand in vector.args]
        return None if any(operand is None for operand in operands) else tirx.Call(_scalar(vector.dtype), vector.op, operands)
    return None


def _by_lane(call: tirx.Call) -> bool:
    """Whether a call computes each lane from the same lane of its operands: all of its lanes, and no others."""
    lanes = DataType(call.dtype).lanes
    if call.op.name in _EXTERN and call.args[0].value not in ("fma", "fmaf"):
        return False
    return call.op.name not in _NOT_BY_LANE and all(
        DataType(operand.dtype).lanes in (1, lanes) for operand in call.args if operand.dtype != "handle"
    )


def _lane_of_load(load: tirx.BufferLoad, lane: int) -> tirx.PrimExpr | None:
    indices = [_lane(index, lane) if DataType(index.dtype).lanes > 1 else index for index in load.indices]
    if any(index is None for index in indices) or DataType(load.buffer.dtype).lanes > 1:
        return None
    return tirx.BufferLoad(load.buffer, indices)


def _scalar(dtype) -> str:
    return str(DataType(dtype).with_lanes(1))


def _select(node: tirx.PrimExpr) -> tirx.PrimExpr | None:
    if isinstance(node, tirx.Shuffle):
        return _lane(node, 0) if DataType(node.dtype).lanes == 1 else None
    if not isinstance(node.op, Op) or node.op.name not in _PARTS:
        return None
    lanes = DataType(node.dtype).lanes
    first = lanes if node.op.name == "tirx.vectorhigh" else 0
    return tirx.Shuffle(list(node.args), [tirx.const(first + lane) for lane in range(lanes)])


def _select_lanes(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    return func.with_body(rewritten(func.body, _select, ["tirx.Shuffle", "tirx.Call"]))


def _holds(stmt: tirx.Stmt, wanted: Callable[[object], bool]) -> bool:
    found = []
    post_order_visit(stmt, lambda node: found.append(node) if wanted(node) else None)
    return bool(found)


def serialized(body: tirx.Stmt, is_scalar: Callable[[object], bool]) -> tirx.Stmt:
    """Return the statement with every vectorised loop serial that holds a node for which `is_scalar` is true."""

    def serial(loop: tirx.For) -> tirx.For | None:
        if loop.kind != tirx.ForKind.VECTORIZED or not _holds(loop.body, is_scalar):
            return None
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    return ir_transform(body, None, serial, ["tirx.For"])


def _serialize(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    return func.with_body(serialized(func.body, lambda node: isinstance(node, tirx.Shuffle)))


# Runs first, on tile programs; the other one just before upstream's VectorizeLoop.
SelectLanes = prim_func_pass(_select_lanes, opt_level=0, name="tilelang_ext.SelectLanes")
KeepShufflesScalar = prim_func_pass(_serialize, opt_level=0, name="tilelang_ext.KeepShufflesScalar")

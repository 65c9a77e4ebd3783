"""An atomic sum of four 16-bit floats is two of pairs, for which Metal has 32-bit words.

    Before  atomic_addx4_elem_op(&C[4 * t], &A[4 * t])
    After   atomic_addx2_elem_op(&C[4 * t], &A[4 * t]); atomic_addx2_elem_op(&C[4 * t + 2], &A[4 * t + 2])

Runs on tile programs.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten

_FOUR, _PAIR = "tl.atomic_addx4_elem_op", "tl.atomic_addx2_elem_op"
_HALVES = ("float16", "bfloat16")


def _split(stmt: tirx.Evaluate) -> tirx.Stmt | None:
    call = stmt.value
    if not isinstance(call, tirx.Call) or not isinstance(call.op, Op) or call.op.name != _FOUR:
        return None
    to, value, *order = call.args
    if not all(isinstance(pointer, tirx.Call) and _is_of_halves(pointer) for pointer in (to, value)):
        return None
    pair = Op.get(_PAIR)
    parts = [tirx.Call(call.dtype, pair, [_at(to, by), _at(value, by), *order]) for by in (0, 2)]
    return tirx.SeqStmt([tirx.Evaluate(part) for part in parts])


def _is_of_halves(pointer: tirx.Call) -> bool:
    place = pointer.args[0] if pointer.args else None
    return isinstance(place, tirx.BufferLoad) and str(place.buffer.dtype) in _HALVES


def _at(pointer: tirx.Call, by: int) -> tirx.Call:
    """Return a pointer to the element that stands `by` further."""
    place, *rest = pointer.args
    moved = tirx.BufferLoad(place.buffer, [*place.indices[:-1], place.indices[-1] + by])
    return tirx.Call(pointer.dtype, pointer.op, [moved, *rest])


def _split_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    return func.with_body(rewritten(func.body, _split, ["tirx.Evaluate"]))


SplitQuadAtomics = prim_func_pass(_split_all, opt_level=0, name="tilelang_ext.SplitQuadAtomics")

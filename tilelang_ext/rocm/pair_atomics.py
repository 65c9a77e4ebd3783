"""Atomic sums of two or four 16-bit floats, which tilelang's HIP templates have for float32 only.

    Before  atomic_addx2_elem_op(&C[2 * t], x)           x of float16x2 or bfloat16x2, or a pointer to the two
    After   tilelang_ext::add_2(&C[2 * t], x)            a loop of compare-and-exchange on the word

Four are two pairs. Those that return what was there are refused (`passes/foreign_calls.py`). Runs where text is generated.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten
from tilelang_ext.rocm.device_text import NAMESPACE, add_pairs_text

_SUMS = {f"tl.atomic_addx{count}_elem_op": count for count in (2, 4)}
_HALVES = ("float16", "bfloat16")


def _spell_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    found = False

    def spell(call):
        nonlocal found
        count = _SUMS.get(call.op.name) if isinstance(call.op, Op) else None
        if count is None or _element(call.args[0]) not in _HALVES:
            return None
        found = True
        return tirx.call_extern(call.dtype, f"{NAMESPACE}::add_{count}", *call.args[:2])

    body = rewritten(func.body, spell, ["tirx.Call"])
    if found:
        body = tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_c", tirx.StringImm(add_pairs_text()), body)
    return func.with_body(body)


def _element(pointer) -> str:
    """Return the type that a pointer points to."""
    place = pointer.args[0] if isinstance(pointer, tirx.Call) and pointer.args else None
    return str(place.buffer.dtype) if isinstance(place, tirx.BufferLoad) else ""


SpellPairAtomics = prim_func_pass(_spell_all, opt_level=0, name="tilelang_ext.SpellPairAtomics")

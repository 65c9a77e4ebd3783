"""Atomic sums of two 16-bit floats, which tilelang's HIP templates have for float32 only.

    Before  atomic_addx2_elem_op(&C[2 * t], x)           x of float16x2 or bfloat16x2
    After   tilelang_ext::add_pair(&C[2 * t], x)         a loop of compare-and-exchange on the word

Runs where text is generated.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten
from tilelang_ext.rocm.device_text import NAMESPACE, add_pair_text

_PAIR = "tl.atomic_addx2_elem_op"


def _spell_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    found = False

    def spell(call):
        nonlocal found
        if not isinstance(call.op, Op) or call.op.name != _PAIR or str(call.args[1].dtype) not in ("float16x2", "bfloat16x2"):
            return None
        found = True
        return tirx.call_extern("handle", f"{NAMESPACE}::add_pair", *call.args[:2])

    body = rewritten(func.body, spell, ["tirx.Call"])
    if found:
        body = tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_c", tirx.StringImm(add_pair_text()), body)
    return func.with_body(body)


SpellPairAtomics = prim_func_pass(_spell_all, opt_level=0, name="tilelang_ext.SpellPairAtomics")

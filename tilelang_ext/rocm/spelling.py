"""Say in other words what tilelang's HIP generator cannot spell: eight bits repeated in a vector, and numbers of E5M2.

    Before                          After
    Broadcast(x, 16), x uint8       reinterpret("uint8x16", Broadcast(Cast("uint32", x) * 0x01010101, 4))
    Broadcast(x, 16), x of E5M2     the same of x's code
    float8_e5m2(1.0)                reinterpret("float8_e5m2", uint8(0x3c))

The generator hands sixteen lanes to the constructor of a type that keeps four of them in a word, `make_uint4(x, x, x, ...)`,
fails on four, whose constant it has just put in a variable, and knows no numbers of E5M2. Masked copies of such tiles hold
them all. Runs last; what the generator can spell stays as it is.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.stmt_functor import ir_transform
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.formats import E4M3, E4M3_FNUZ, E5M2, E5M2_FNUZ, format_of

_E5M2 = (E5M2.dtype, E5M2_FNUZ.dtype)
# The lanes that the generator cannot spell.
_LANES = {
    **dict.fromkeys(("int8", "uint8"), (4, 8, 16)),
    **dict.fromkeys((E4M3.dtype, E4M3_FNUZ.dtype), (2,)),
    **dict.fromkeys(_E5M2, (2, 4, 8, 16)),
}
_WORD_LANES = 4  # of eight bits


def _code(value: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return the bits of an 8-bit value as uint8."""
    if isinstance(value, tirx.FloatImm):
        values = format_of(str(value.dtype)).values
        return tirx.IntImm("uint8", [repr(v) for v in values].index(repr(value.value)))  # tells the zeros apart
    return value if str(value.dtype) == "uint8" else tirx.reinterpret("uint8", value)


def _spell(node: tirx.PrimExpr) -> tirx.PrimExpr | None:
    if isinstance(node, tirx.FloatImm):
        return tirx.reinterpret(node.dtype, _code(node)) if str(node.dtype) in _E5M2 else None
    lanes = int(node.lanes)
    if lanes not in _LANES.get(str(node.value.dtype), ()):
        return None
    word = "uint16" if lanes < _WORD_LANES else "uint32"
    repeated = tirx.Cast(word, _code(node.value)) * tirx.const(0x0101 if word == "uint16" else 0x01010101, word)
    words = lanes // _WORD_LANES
    return tirx.reinterpret(node.dtype, tirx.Broadcast(repeated, words) if words > 1 else repeated)


def _spell_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    # Before its operands: a constant inside a vector goes with the vector.
    return func.with_body(ir_transform(func.body, _spell, None, ["tirx.Broadcast", "ir.FloatImm"]))


SpellEightBits = prim_func_pass(_spell_all, opt_level=0)

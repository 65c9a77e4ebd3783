"""Rewrite what tilelang's HIP generator spells wrongly: broadcasts of 8- and 16-bit values, ramps of 8, and constants of E5M2.

    Before                          After
    Broadcast(x, 16), x uint8       reinterpret("uint8x16", Broadcast(Cast("uint32", x) * 0x01010101, 4))
    Broadcast(x, 16), x of E5M2     the same of x's code
    Broadcast(x, 8), x uint16       reinterpret("uint16x8", Broadcast(Cast("uint32", x) * 0x00010001, 4))
    Ramp(x, 1, 4), x uint8          Cast("uint8x4", Ramp(Cast("int32", x), 1, 4))
    float8_e5m2(1.0)                reinterpret("float8_e5m2", uint8(0x3c))

For sixteen lanes the generator passes sixteen values to the constructor of a type that packs four of them per word,
`make_uint4(x, x, x, ...)`; it fails on four lanes whose constant it has put in a variable; and it knows no constants of E5M2.
Masked copies of such tiles have all three. The pass runs last, and leaves what the generator spells correctly.
"""

from __future__ import annotations

import math

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import ir_transform
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.formats import E4M3, E4M3_FNUZ, E5M2, E5M2_FNUZ, format_of
from tilelang_ext.passes.vector_lanes import serialized

_E5M2 = (E5M2.dtype, E5M2_FNUZ.dtype)
_E4M3 = (E4M3.dtype, E4M3_FNUZ.dtype)
# The numbers of lanes that the generator cannot spell.
_LANES = {
    **dict.fromkeys(("int8", "uint8"), (4, 8, 16)),
    **dict.fromkeys(("int16", "uint16"), (8,)),
    **dict.fromkeys(_E4M3, (2,)),
    **dict.fromkeys(_E5M2, (2, 4, 8, 16)),
}
_WORD_LANES = 4  # 8-bit values per word
_OPERATORS = (
    tirx.Call, tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max, tirx.Select,
)  # fmt: skip


def _code(value: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return the bits of an 8-bit value as uint8."""
    if isinstance(value, tirx.FloatImm):
        return tirx.IntImm("uint8", format_of(str(value.dtype)).encode(value.value))
    return value if str(value.dtype) == "uint8" else tirx.reinterpret("uint8", value)


def _word_of(value: tirx.PrimExpr, word: str) -> tirx.PrimExpr:
    """Return the bits of a value of 8 or 16 bits as a word. What operators make of integers so narrow is an int in C."""
    dtype = str(value.dtype)
    if isinstance(value, _OPERATORS) and dtype in ("int8", "int16", "uint8", "uint16"):
        return tirx.bitwise_and(tirx.Cast(word, value), tirx.const(0xFF if dtype.endswith("8") else 0xFFFF, word))
    if dtype.endswith("int16"):
        return tirx.Cast(word, value if dtype == "uint16" else tirx.reinterpret("uint16", value))
    return tirx.Cast(word, _code(value))


def _spell(node: tirx.PrimExpr) -> tirx.PrimExpr | None:
    if isinstance(node, tirx.FloatImm):
        dtype = str(node.dtype)
        # Zero has one code in either flavour of E4M3, which the generator spells.
        is_ours = dtype in _E5M2 or (dtype in _E4M3 and (node.value != 0 or math.copysign(1.0, node.value) < 0))
        return tirx.reinterpret(node.dtype, _code(node)) if is_ours else None
    if isinstance(node, tirx.Ramp):
        if node.base.dtype not in ("int8", "uint8"):
            return None
        base, stride = (tirx.Cast("int32", value) for value in (node.base, node.stride))
        return tirx.Cast(node.dtype, tirx.Ramp(base, stride, node.lanes))
    lanes = int(node.lanes)
    if lanes not in _LANES.get(str(node.value.dtype), ()):
        return None
    if node.value.dtype in ("int16", "uint16"):
        pair = _word_of(node.value, "uint32") * tirx.const(0x00010001, "uint32")
        return tirx.reinterpret(node.dtype, tirx.Broadcast(pair, lanes // 2))
    word = "uint16" if lanes < _WORD_LANES else "uint32"
    repeated = _word_of(node.value, word) * tirx.const(0x0101 if word == "uint16" else 0x01010101, word)
    words = lanes // _WORD_LANES
    return tirx.reinterpret(node.dtype, tirx.Broadcast(repeated, words) if words > 1 else repeated)


def _spell_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    # Vectors are visited before their operands, so that a constant inside one is rewritten with it.
    return func.with_body(ir_transform(func.body, _spell, None, ["tirx.Broadcast", "tirx.Ramp", "ir.FloatImm"]))


def _keep_selects(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    def becomes_select(node) -> bool:
        is_clamp = isinstance(node, tirx.Call) and isinstance(node.op, Op) and node.op.name == "tl.clamp"
        return (is_clamp or isinstance(node, tirx.Select)) and node.dtype in ("float16", "bfloat16")

    return func.with_body(serialized(func.body, becomes_select))


SpellEightBits = prim_func_pass(_spell_all, opt_level=0)
# Just before upstream's VectorizeLoop: of a Select the generator makes a vector of 16-bit floats as `uint4(h, h, ...)`.
KeepSelectsScalar = prim_func_pass(_keep_selects, opt_level=0, name="tilelang_ext.KeepSelectsScalar")

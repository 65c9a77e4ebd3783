"""Operators that upstream's HIP generator lacks or gets wrong, in words that it knows."""

from __future__ import annotations

from tilelang.rocm.target import target_get_mcpu
from tvm import DataType, tirx
from tvm.ir import Op
from tvm.target import Target

from tilelang_ext.formats import FORMATS
from tilelang_ext.passes.operators import Rule, device_assert, infinity, nearest_even, no_hints
from tilelang_ext.passes.plain_words import arithmetic, likely, plain_copies, unsigned_bits, wide_nextafter

_NARROW = {format.dtype for format in FORMATS}
_SHUFFLES = {f"tirx.tvm_warp_shuffle{way}": f"tl.shfl{way}_sync" for way in ("", "_up", "_down")}

_NOT_OF_HALVES = ("pow", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "log1p")
_FAST = ("exp", "exp10", "log", "log2", "log10", "tan", "cos", "sin")


def _round(call: tirx.Call) -> tirx.Call | None:
    """`roundf` goes away from zero; for halves the generator has `hrint`, which goes to even."""
    return nearest_even(call) if DataType(call.dtype).bits > 16 else None


def _in_float(call: tirx.Call) -> tirx.Cast | None:
    """A function that AMD's headers lack for 16 bits, or, as `hpow`, have for integers only: computed in float32."""
    if DataType(call.dtype).bits > 16:
        return None
    wide = f"float32x{DataType(call.dtype).lanes}" if DataType(call.dtype).lanes > 1 else "float32"
    return tirx.Cast(call.dtype, tirx.Call(wide, call.op, [tirx.Cast(wide, operand) for operand in call.args]))


def _precise(call: tirx.Call) -> tirx.Call:
    """Fast math is a permission, of which nothing is made here."""
    return tirx.Call(call.dtype, Op.get("tirx." + call.op.name.removeprefix("tl.__")), call.args)


def _print(call: tirx.Call) -> tirx.Call | None:
    """`T.print` of a narrow float as a float: upstream's text reads its code as the chip's own format has it."""
    name, *operands = call.args
    if not name.value.startswith("debug_print_") or str(DataType(call.args[-1].dtype)) not in _NARROW:
        return None
    return tirx.Call(call.dtype, call.op, [name, *operands[:-1], tirx.Cast("float32", operands[-1])])


def _shuffle(call: tirx.Call) -> tirx.Call:
    """TVM's shuffles, whose names in HIP have no definition, by those of tilelang; the last operand is the warp's size."""
    return tirx.Call(call.dtype, Op.get(_SHUFFLES[call.op.name]), call.args[:4])


def _active(call: tirx.Call) -> tirx.Cast:
    return tirx.Cast(call.dtype, tirx.Call("uint64", Op.get("tl.activemask"), []))


RULES: dict[str, Rule] = {
    "tl.infinity": infinity,
    "tl.device_assert": device_assert,
    "tl.device_assert_with_msg": device_assert,
    "tirx.call_extern": _print,
    "tirx.round": _round,
    **dict.fromkeys((f"tirx.{name}" for name in _NOT_OF_HALVES), _in_float),
    **{f"tl.__{name}": _precise for name in _FAST},
    **dict.fromkeys(_SHUFFLES, _shuffle),
    "tirx.tvm_warp_activemask": _active,
    "tirx.popcount": unsigned_bits,
    "tirx.likely": likely,
    "tirx.nextafter": wide_nextafter,
    **arithmetic("AMD"),
    **no_hints(),
}


def rules_of(target: Target) -> dict[str, Rule]:
    """Return the rules of an architecture. RDNA has no loads to shared memory, which `T.async_copy` asks for: it copies."""
    if not (target_get_mcpu(target) or "").startswith("gfx1"):
        return RULES
    return {**RULES, **plain_copies(), "tl.tileop.async_copy": _copy}


def _copy(call: tirx.Call) -> tirx.Call:
    return tirx.Call(call.dtype, Op.get("tl.tileop.copy"), call.args, call.annotations)

"""Calls of operators, by name, in words that mean on a target what they mean in the language.

    Before  round(x)                   to the nearest even number; C's function goes away from zero
    After   nearbyint(x)

A target gives a rule for each name that its generator lacks or gets wrong. Runs first, on tile programs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from tvm import IRModule, tirx
from tvm.ir import Op

from tilelang_ext.formats import FORMATS
from tilelang_ext.passes.rewrite import rewritten

Rule = Callable[[tirx.Call], tirx.PrimExpr | None]  # None: it stays as it is

_WITHOUT_INFINITY = {format.dtype for format in FORMATS if not format.inf_codes}
_IEEE = ("add", "sub", "mul", "fdiv", "fmaf", "frcp", "fsqrt")
ASSERT = "TL_ASSERT"  # a macro of generated text; the simulator has its own
_HINTS = (
    "no_set_max_nreg",
    "set_max_nreg",
    "annotate_producer_reg_dealloc",
    "annotate_consumer_reg_alloc",
    "warpgroup_fence_operand",
    "fence_proxy_async",
    "pdl_trigger",
    "pdl_sync",
)
_DIRECTED = ("rz", "ru", "rd")


def spell_operators(mod: IRModule, rules: dict[str, Rule]) -> IRModule:
    """Rewrite the calls that have a rule."""

    def spell(node):
        rule = rules.get(node.op.name) if isinstance(node.op, Op) else None
        return rule(node) if rule else None

    def rewrite(func):
        return func.with_body(rewritten(func.body, spell, ["tirx.Call"]))

    return IRModule({name: rewrite(func) for name, func in mod.functions_items()}, attrs=mod.attrs)


def infinity(call: tirx.Call) -> tirx.FloatImm:
    """`T.infinity` as a number; ValueError for a type that has none."""
    dtype = str(call.dtype)
    if dtype in _WITHOUT_INFINITY or not dtype.startswith(("float", "bfloat")):
        raise ValueError(f"T.infinity: dtype must be one with infinity; got {dtype}; use T.max_value({dtype!r})")
    return tirx.FloatImm(dtype, math.inf)


def nearest_even(call: tirx.Call) -> tirx.Call:
    """`T.round` by the function that rounds ties to even."""
    return tirx.Call(call.dtype, Op.get("tirx.nearbyint"), call.args)


def away_from_zero(call: tirx.Call) -> tirx.Call:
    """`T.round` with "ties-away-from-zero" by the function of C that does so."""
    return tirx.Call(call.dtype, Op.get("tirx.round"), call.args)


def device_assert(call: tirx.Call) -> tirx.Call:
    """`T.device_assert` as a call of ASSERT(condition, message)."""
    condition, *message = call.args
    text = re.sub(r"\S*/(?=[^/\s]+:\d+ in )", "", message[0].value.strip()) if message else ""  # files without folders
    return tirx.call_extern("int32", ASSERT, condition, text or "T.device_assert fails")


def no_hints() -> dict[str, Rule]:
    """Return rules that drop what only tells NVIDIA's hardware how to run a kernel, and changes no value."""
    return {f"tl.{name}": lambda call: tirx.const(0) for name in _HINTS}


def only_to_nearest(target: str) -> dict[str, Rule]:
    """Return rules that refuse the rounding modes of `T.ieee_*` that `target` has not, by name."""

    def check(call: tirx.Call) -> None:
        mode = call.args[-1].value if isinstance(call.args[-1], tirx.StringImm) else "rn"
        if mode in _DIRECTED:
            name = call.op.name.removeprefix("tl.")
            raise NotImplementedError(
                f"T.{name}: the rounding mode must be 'rn' on {target}, which has no other; got {mode!r}; leave it out"
            )

    return {f"tl.ieee_{name}": check for name in _IEEE}

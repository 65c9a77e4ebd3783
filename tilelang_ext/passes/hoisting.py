"""Upstream's HoistIfThenElse, whose simplification runs only behind a guard that was hoisted.

Before  for i in serial(4):        After  if tx < 8:
            if tx < 8: body                   for i in serial(4): body
"""

from __future__ import annotations

from tvm import IRModule, ir, s_tir, tirx
from tvm.ir.transform import PassContext

_SIMPLIFICATION = ("tirx.Simplify", "tirx.RemoveNoOp")


def hoist_guards(mod: IRModule) -> IRModule:
    """Move guards out of loops that they do not depend on; where there is none, return the module, which is simplified."""
    given = PassContext.current()
    disabled = [*(given.disabled_pass or ()), *_SIMPLIFICATION]
    with PassContext(given.opt_level, given.required_pass, disabled, config=dict(given.config)):
        hoisted = s_tir.transform.HoistIfThenElse()(mod)
    if ir.structural_equal(hoisted, mod):
        return mod
    return tirx.transform.RemoveNoOp()(tirx.transform.Simplify()(hoisted))

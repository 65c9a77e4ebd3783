"""`T.atomic_add(..., use_tma=True)` asks for an instruction, not for another result: a target without TMA adds as it does else.

    Before  tileop.atomicadd(C[...], S[...]), {"use_tma": 1}       "TMA atomic_add is only supported by the CUDA backend"
    After   the same without the annotation

Runs on tile programs, on targets other than CUDA.
"""

from __future__ import annotations

from tvm import IRModule, tirx
from tvm.ir import Op

from tilelang_ext.passes.rewrite import rewritten

_HINT = "use_tma"


def drop_tma_hints(mod: IRModule) -> IRModule:
    """Return the module without the hints."""
    functions = {var: func.with_body(rewritten(func.body, _without, ["tirx.Call"])) for var, func in mod.functions_items()}
    return IRModule(functions, attrs=mod.attrs)


def _without(call: tirx.Call) -> tirx.Call | None:
    if not isinstance(call.op, Op) or not call.op.name.startswith("tl.tileop.atomic") or _HINT not in call.annotations:
        return None
    annotations = {name: value for name, value in call.annotations.items() if name != _HINT}
    return tirx.Call(call.dtype, call.op, list(call.args), annotations=annotations)

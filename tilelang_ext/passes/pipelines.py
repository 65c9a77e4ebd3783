"""Software pipelines, but where a statement that runs stages ahead needs what its own round computes: those loops run in order.

    for k in pipelined(n, 2): index[0] = k * 32; copy(A[index[0]], A_s); use(A_s)        index in shared memory

Upstream gives the store of the index the stage that computes and the copy the first one, and fails on that order.
"""

from __future__ import annotations

import tilelang
from tvm import IRModule, tirx
from tvm.error import InternalError

from tilelang_ext.passes.rewrite import rewritten

_STAGES = "num_stages"
_OUT_OF_ORDER = "src_info.stage <= dst_info.stage"


def pipelined(mod: IRModule) -> IRModule:
    """Plan and inject the pipelines of a module; without any in it if one cannot be."""
    try:
        return _injected(mod)
    except InternalError as error:
        if _OUT_OF_ORDER not in str(error):
            raise
    functions = {var: func.with_body(rewritten(func.body, _in_order, ["tirx.For"])) for var, func in mod.functions_items()}
    return _injected(IRModule(functions, attrs=mod.attrs))


def _injected(mod: IRModule) -> IRModule:
    return tilelang.transform.InjectSoftwarePipeline()(tilelang.transform.PipelinePlanning()(mod))


def _in_order(loop: tirx.For) -> tirx.For | None:
    if _STAGES not in loop.annotations:
        return None
    annotations = {name: value for name, value in loop.annotations.items() if name != _STAGES}
    return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, loop.body, loop.thread_binding, annotations, loop.step)

"""Loops over K of fp8 products with scales on Hopper: a producer warpgroup, sums that cross the loop, scales behind it.

    Before                                       After
    for tile in ...:                             if thread < threads:                       consumer warpgroups
        clear(C)                                     for tile in ...:
        for k in Pipelined(K / 128, stages):             clear(C); clear(sums)
            copy(A[.., k], A_s)                          for k in serial(K / 128):
            copy(B[.., k], B_s)                              wait full; wgmma(A_s[stage], B_s[stage], partial); arrive empty
            scaled product, marked:                          sums += partial * group factors
              C += A_s . B_s * group * whole             C += sums * whole factors
        store C                                          store C
                                                 elif thread < threads + 32:                a warp that loads
                                                     for tile in ...: for k in serial(K / 128):
                                                         wait empty; tma_copy(A, B); arrive full
                                                 else:                                      three that fetch group factors
                                                     for tile in ...: for k in serial(K / 128):
                                                         wait empty; store group factors in shared memory; arrive full

The mark of `language.scaled_product` says what a step computes. Upstream's own warp specialization splits at the loop over k,
and joins all warps between two tiles of a persistent kernel; here the producer runs ahead into the next tile.

| sums | products in flight | who hides the additions |
| --- | --- | --- |
| in the matrix unit (`fast`, no group factors) | the next one | nothing is added |
| in float32, two partial products fit in registers | the next one within a turn of as many steps as stages | this warpgroup |
| in float32 | one per warpgroup | the other warpgroup's product |

Invariant: a partial product covers one step of K, in 64 rows per warpgroup or in a warpgroup's part of the columns. A kernel of
another form is left as it was, with the reason in the log (level INFO). Runs before every other pass, so that the mark still
names buffers and variables that exist.
"""

from __future__ import annotations

import logging

import tilelang
from tilelang.cuda.target import target_is_hopper
from tvm import IRModule, tirx
from tvm.target import Target

from tilelang_ext.cuda.scaled_loop_form import is_marked, recognise, tiling_of
from tilelang_ext.cuda.scaled_loop_roles import specialize
from tilelang_ext.cuda.warp_roles import OtherForm

_TURNED_OFF_BY = ("tl.disable_warp_specialized", "tl.disable_wgmma", "tl.disable_tma_lower")
_log = logging.getLogger(__name__)


def specialize_scaled_loops(mod: IRModule, target: Target) -> IRModule:
    """Rewrite the kernels of a module that have the form above, for Hopper."""
    config = tilelang.transform.get_pass_context().config
    if not target_is_hopper(target) or any(config.get(key, False) for key in _TURNED_OFF_BY):
        return mod
    functions = {
        var: _specialize(func) if isinstance(func, tirx.PrimFunc) and is_marked(func.body) else func
        for var, func in mod.functions.items()
    }
    return IRModule(functions, attrs=mod.attrs)


def _specialize(func: tirx.PrimFunc) -> tirx.PrimFunc:
    try:
        kernel = recognise(func)
        tiling = tiling_of(kernel)
    except OtherForm as reason:
        name = func.attrs["global_symbol"] if func.attrs and "global_symbol" in func.attrs else "kernel"
        _log.info("%s: T.fp8_scaled_matmul is lowered step by step: %s", name, reason)
        return func
    return specialize(func, kernel, tiling)

"""Lane, warp and warp group of a thread, and which thread is elected, by its number in the block.

    Before  get_lane_idx(20)     get_warp_idx(20)     get_warp_group_idx(20, 3)     shuffle_elect(64)
    After   t % 20               t // 20              t // 60                       t % 64 == 0

where t = tx + 128 * ty, of 128 x 2 threads.

A size that the program gives is its own affair: no lane of the hardware has anything to do with it. Runs on tile programs whose
threads have been materialised.
"""

from __future__ import annotations

from tvm import IRModule, tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import post_order_visit

from tilelang_ext.passes.rewrite import rewritten

_LANE, _WARP, _GROUP = ("tl.get_lane_idx",), ("tl.get_warp_idx", "tl.get_warp_idx_sync"), ("tl.get_warp_group_idx",)
_ELECT = ("tl.tl_shuffle_elect",)
_WARPS_PER_GROUP = 4


def CountLanes(mod: IRModule, wave: int, *, keep_default: bool) -> IRModule:
    """Rewrite the calls in `mod`; `wave` is the size where none is given, `keep_default` leaves lanes and warps of it alone."""
    return IRModule({name: _count(func, wave, keep_default) for name, func in mod.functions_items()}, attrs=mod.attrs)


def _count(func: tirx.PrimFunc, wave: int, keep_default: bool) -> tirx.PrimFunc:
    threads: dict[str, tuple[tirx.Var, tirx.PrimExpr]] = {}

    def collect(node):
        if isinstance(node, tirx.AttrStmt) and node.attr_key == "thread_extent":
            threads[node.node.thread_tag] = node.node.var, node.value

    def rewrite(call):
        name = call.op.name if isinstance(call.op, Op) else ""
        if name not in (*_LANE, *_WARP, *_GROUP, *_ELECT):
            return None
        size = call.args[0] if call.args else tirx.const(wave)
        if keep_default and name in (*_LANE, *_WARP) and isinstance(size, tirx.IntImm) and int(size) == wave:
            return None
        number = tirx.const(0)
        for axis in "zyx":
            if f"threadIdx.{axis}" in threads:
                var, extent = threads[f"threadIdx.{axis}"]
                number = number * extent + var
        if name in _ELECT:  # one thread of `size`, of 0 one of the block
            return tirx.EQ(number if _is_zero(size) else tirx.floormod(number, size), tirx.const(0))
        if name in _LANE:
            return tirx.floormod(number, size)
        if name in _WARP:
            return tirx.floordiv(number, size)
        return tirx.floordiv(number, size * (call.args[1] if len(call.args) > 1 else _WARPS_PER_GROUP))

    post_order_visit(func.body, collect)
    return func.with_body(rewritten(func.body, rewrite, ["tirx.Call"]))


def _is_zero(size: tirx.PrimExpr) -> bool:
    return isinstance(size, tirx.IntImm) and int(size) == 0

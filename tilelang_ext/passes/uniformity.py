"""Which expressions have one value for every thread of a block."""

from __future__ import annotations

from enum import IntEnum

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import post_order_visit

_LANES = ("tl.get_lane_idx", "tl.get_warp_idx", "tl.get_warp_idx_sync", "tl.get_warp_group_idx")
_EXCHANGES = ("shfl", "shuffle", "warp_reduce", "atomic", "_sync", "ballot", "extern", "activemask", "match")


class Spread(IntEnum):
    """How the values of an expression may differ between the threads of a block."""

    UNIFORM = 0
    UNKNOWN = 1
    DIVERGENT = 2


class Uniformity:
    """The spread of expressions of one device function.

    Memory that other threads write holds one value for all who read one place. What a thread's own arrays hold follows from
    what is stored in them and from the conditions around the stores.
    """

    def __init__(self, body: tirx.Stmt):
        self._vars: dict[tirx.Var, Spread] = {}
        self._arrays: dict[tirx.Var, Spread] = {}
        while self._collect(body, Spread.UNIFORM):  # loops carry what their ends store to their beginnings
            pass

    def spread(self, expr: tirx.PrimExpr) -> Spread:
        """Return the spread of an expression."""
        if isinstance(expr, (tirx.IntImm, tirx.FloatImm, tirx.StringImm)):
            return Spread.UNIFORM
        found = Spread.UNIFORM

        def visit(node):
            nonlocal found
            if found != Spread.DIVERGENT:
                found = max(found, self._of(node))

        post_order_visit(expr, visit)
        return found

    def _of(self, node) -> Spread:
        if isinstance(node, tirx.Var):
            return self._vars.get(node, Spread.UNIFORM)
        if isinstance(node, tirx.BufferLoad):
            index = max((self.spread(i) for i in node.indices), default=Spread.UNIFORM)
            if _is_local(node.buffer):
                return max(self._arrays.get(node.buffer.data, Spread.UNIFORM), min(index, Spread.UNKNOWN))
            return min(index, Spread.UNKNOWN)
        if isinstance(node, tirx.Call) and isinstance(node.op, Op):
            name = node.op.name
            if name in _LANES:
                return Spread.DIVERGENT
            if any(word in name for word in _EXCHANGES):
                return Spread.UNKNOWN
        return Spread.UNIFORM

    def _collect(self, stmt: tirx.Stmt, control: Spread) -> bool:
        """Note what variables and arrays hold under `control`; return whether anything new was seen."""
        changed = False
        if isinstance(stmt, tirx.AttrStmt):
            if stmt.attr_key == "thread_extent" and stmt.node.thread_tag.startswith("threadIdx") and int_of(stmt.value) != 1:
                changed |= self._raise(self._vars, stmt.node.var, Spread.DIVERGENT)
            changed |= self._collect(stmt.body, control)
        elif isinstance(stmt, tirx.SeqStmt):
            for child in stmt.seq:
                changed |= self._collect(child, control)
        elif isinstance(stmt, tirx.For):
            bounds = max(self.spread(stmt.min), self.spread(stmt.extent))
            changed |= self._raise(self._vars, stmt.loop_var, bounds)
            changed |= self._collect(stmt.body, max(control, bounds))
        elif isinstance(stmt, tirx.While):
            changed |= self._collect(stmt.body, max(control, self.spread(stmt.condition)))
        elif isinstance(stmt, tirx.IfThenElse):
            inner = max(control, self.spread(stmt.condition))
            changed |= self._collect(stmt.then_case, inner)
            if stmt.else_case is not None:
                changed |= self._collect(stmt.else_case, inner)
        elif isinstance(stmt, tirx.Bind):
            changed |= self._raise(self._vars, stmt.var, self.spread(stmt.value))
        elif isinstance(stmt, tirx.BufferStore):
            changed |= self._addresses(stmt.value)
            if _is_local(stmt.buffer):
                stored = max(control, self.spread(stmt.value), *(self.spread(i) for i in stmt.indices))
                changed |= self._raise(self._arrays, stmt.buffer.data, stored)
        elif isinstance(stmt, tirx.Evaluate):
            changed |= self._addresses(stmt.value)
        return changed

    def _addresses(self, expr: tirx.PrimExpr) -> bool:
        """A local array whose address is given away holds what nobody here knows."""
        changed = False

        def visit(node):
            nonlocal changed
            if isinstance(node, tirx.Call) and isinstance(node.op, Op):
                if node.op.name == "tirx.address_of":
                    changed |= self._raise(self._arrays, node.args[0].buffer.data, Spread.UNKNOWN)
                elif node.op.name == "tirx.tvm_access_ptr":
                    changed |= self._raise(self._arrays, node.args[1], Spread.UNKNOWN)

        post_order_visit(expr, visit)
        return changed

    @staticmethod
    def _raise(known: dict, key: tirx.Var, spread: Spread) -> bool:
        if known.get(key, Spread.UNIFORM) >= spread:
            return False
        known[key] = spread
        return True


def int_of(expr) -> int | None:
    """Return the value of a constant integer, else None."""
    if isinstance(expr, int):
        return expr
    return int(expr.value) if isinstance(expr, tirx.IntImm) else None


def _is_local(buffer: tirx.Buffer) -> bool:
    return buffer.scope().startswith("local")

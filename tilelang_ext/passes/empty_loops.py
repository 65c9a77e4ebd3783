"""Loops of at most one round that may also run none: upstream's Simplify runs each of them once.

    Before  for i in n: ...                                        where n is at most 1
    After   if n > 0: for i in n: ...

It simplifies a loop's extent by what holds inside the loop, where the extent is at least 1; so one that is known to be at most
1, by a condition around it or by the range of a thread index, becomes 1. Behind the condition that is right.

Runs on tile programs, before the first Simplify.
"""

from __future__ import annotations

from tvm import arith, ir, tirx
from tvm.tirx.stmt_functor import ir_transform
from tvm.tirx.transform import prim_func_pass

_SCOPES = ["tirx.For", "tirx.IfThenElse", "tirx.AttrStmt", "tirx.Bind"]
_EXTENTS = ("thread_extent", "virtual_thread")


class _Guards:
    """Rewrites one function; variables are defined once, so what is known of them is kept to the end."""

    def __init__(self):
        self._known = arith.Analyzer()

    def rewritten(self, stmt: tirx.Stmt, conditions: tuple[tirx.PrimExpr, ...]) -> tirx.Stmt:
        """Return a statement with its loops guarded, where `conditions` hold."""

        def enter(node):
            if isinstance(node, tirx.Bind):
                if not _reads_memory(node.value):
                    self._known.bind(node.var, node.value)
            elif isinstance(node, tirx.AttrStmt):
                if node.attr_key in _EXTENTS:
                    self._known.bind(node.node.var, ir.Range(0, node.value))
            elif isinstance(node, tirx.IfThenElse):
                return self._branches(node, conditions)
            else:
                return self._loop(node, conditions)
            return None

        return ir_transform(stmt, enter, None, _SCOPES)

    def _branches(self, node: tirx.IfThenElse, conditions: tuple) -> tirx.Stmt:
        then = self.rewritten(node.then_case, (*conditions, node.condition))
        otherwise = node.else_case
        if otherwise is not None:
            otherwise = self.rewritten(otherwise, (*conditions, tirx.Not(node.condition)))
        return tirx.IfThenElse(node.condition, then, otherwise)

    def _loop(self, node: tirx.For, conditions: tuple) -> tirx.Stmt:
        self._known.bind(node.loop_var, ir.Range.from_min_extent(node.min, node.extent))
        body = self.rewritten(node.body, conditions)
        loop = tirx.For(node.loop_var, node.min, node.extent, node.kind, body, node.thread_binding, node.annotations, node.step)
        extent = node.extent
        if isinstance(extent, tirx.IntImm) or node.kind == tirx.ForKind.THREAD_BINDING:
            return loop
        if self._proves(extent <= 1, conditions) and not self._proves(extent >= 1, conditions):
            return tirx.IfThenElse(extent > 0, loop, None)
        return loop

    def _proves(self, claim: tirx.PrimExpr, conditions: tuple) -> bool:
        if not conditions:
            return self._known.can_prove(claim)
        with self._known.constraint_scope(conditions[0]):
            return self._proves(claim, conditions[1:])


def _reads_memory(value: tirx.PrimExpr) -> bool:
    found = False

    def visit(node):
        nonlocal found
        found = found or isinstance(node, (tirx.BufferLoad, tirx.Call))

    tirx.stmt_functor.post_order_visit(value, visit)
    return found


def _guard(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    return func.with_body(_Guards().rewritten(func.body, ()))


GuardEmptyLoops = prim_func_pass(_guard, opt_level=0, name="tilelang_ext.GuardEmptyLoops")

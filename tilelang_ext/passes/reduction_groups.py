"""Reductions over threads count them from the first that takes part.

    Before  if 32 <= t and t < 96: total = all_reduce<64 threads, from 0>(total)
    After   if 32 <= t and t < 96: total = all_reduce<64 threads, from 32>(total)

The threads of a reduction meet in groups of a power of two, which are told apart by the bits of a thread's number, from some
thread on. On targets without named barriers upstream counts from the block's first thread, even where a layout puts a row
elsewhere. Here it is the first of the threads that come to the call. Threads that no such groups hold are refused.

A call for several values at once stands behind the condition under which their threads added up what they have. It gets the
same condition where they do not begin with a group.

Runs on flat device functions, with the conditions still around the calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tvm import IRModule, arith, tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import post_order_visit, substitute

from tilelang_ext.passes.layouts import UnevenGroupsError
from tilelang_ext.passes.rewrite import rewritten

# What upstream's lowering and ours call them: operator, threads, scale, first thread, values at once, their distance.
_NAME = re.compile(
    r"(?:tl::AllReduce|(?:tilelang_ext::)?all_reduce(?:_shared|_batch)?)<([\w:]+), (\d+), (\d+)"
    r"(?:, (-?\d+))?(?:, (\d+), (\d+))?>.*"
)


@dataclass(frozen=True)
class Reduction:
    """Values combined in groups of `threads`, counted from thread `first`, each thread with every `scale`-th other.

    `batch` values at once lie `stride` apart in the workspace; None for a single one.
    """

    operator: str
    threads: int
    scale: int
    first: int
    batch: int | None
    stride: int | None


# A call whose groups begin elsewhere than at a multiple of their size -> the call that knows.
Respell = Callable[[tirx.Call, Reduction], tirx.Call]


def reduction_of(call: tirx.Call) -> Reduction | None:
    """Return what a call of a reduction over threads combines; None for any other call."""
    if not isinstance(call.op, Op) or not call.op.name.endswith("call_extern"):
        return None
    match = _NAME.fullmatch(call.args[0].value)
    if match is None:
        return None
    operator, *numbers = match.groups()
    threads, scale, first, batch, stride = (None if number is None else int(number) for number in numbers)
    return Reduction(operator, threads, scale, first or 0, batch, stride)


class _Counting:
    def __init__(self, respell: Respell):
        self.respell = respell
        self.threads: tuple[tirx.Var, int] | None = None  # of the block, along x
        self.conditions: list[tirx.PrimExpr] = []

    def visit(self, stmt: tirx.Stmt) -> tirx.Stmt:
        if isinstance(stmt, tirx.SeqStmt):
            return tirx.SeqStmt([self.visit(child) for child in self._guarded(stmt.seq)])
        if isinstance(stmt, tirx.AttrStmt):
            if stmt.attr_key == "thread_extent" and stmt.node.thread_tag == "threadIdx.x":
                self.threads = stmt.node.var, int(stmt.value)
            return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, self.visit(stmt.body))
        if isinstance(stmt, tirx.For):
            return tirx.For(
                stmt.loop_var, stmt.min, stmt.extent, stmt.kind, self.visit(stmt.body), stmt.thread_binding, stmt.annotations,
                stmt.step,
            )  # fmt: skip
        if isinstance(stmt, tirx.While):
            return tirx.While(stmt.condition, self.visit(stmt.body))
        if isinstance(stmt, tirx.IfThenElse):
            then_case = self._under(stmt.condition, stmt.then_case)
            return tirx.IfThenElse(
                stmt.condition,
                then_case,
                None if stmt.else_case is None else self._under(tirx.Not(stmt.condition), stmt.else_case),
            )
        return rewritten(stmt, self._count, ["tirx.Call"])

    def _guarded(self, statements) -> list[tirx.Stmt]:
        """Put each reduction of several values under the condition under which the statements before it wrote the values."""
        conditions: dict[tirx.Var, tirx.PrimExpr] = {}
        guarded = []
        for stmt in statements:
            call = stmt.value if isinstance(stmt, tirx.Evaluate) else None
            reduction = reduction_of(call) if isinstance(call, tirx.Call) else None
            if reduction is not None and reduction.batch is not None:
                found = [conditions[var] for var in tirx.analysis.undefined_vars(call.args[1]) if var in conditions]
                if found and self._begins_inside(found[0], reduction):
                    stmt = tirx.IfThenElse(found[0], stmt, None)
            is_conditional = isinstance(stmt, tirx.IfThenElse) and stmt.else_case is None
            for var in _written(stmt):
                conditions.pop(var, None)
                if is_conditional:
                    conditions[var] = stmt.condition
            guarded.append(stmt)
        return guarded

    def _begins_inside(self, condition: tirx.PrimExpr, reduction: Reduction) -> bool:
        self.conditions.append(condition)
        taking_part = self._taking_part()
        self.conditions.pop()
        return bool(taking_part) and (min(taking_part) - reduction.first) % reduction.threads != 0

    def _under(self, condition: tirx.PrimExpr, stmt: tirx.Stmt) -> tirx.Stmt:
        self.conditions.append(condition)
        stmt = self.visit(stmt)
        self.conditions.pop()
        return stmt

    def _count(self, call: tirx.Call) -> tirx.Call | None:
        reduction = reduction_of(call)
        taking_part = None if reduction is None or not self.conditions else self._taking_part()
        if not taking_part:
            return None
        first = min(taking_part)
        if (first - reduction.first) % reduction.threads == 0:
            first = reduction.first
        groups = {(thread - first) // reduction.threads for thread in taking_part}
        if len(groups) * reduction.threads != len(taking_part):
            raise UnevenGroupsError(
                f"T.reduce_*: the threads that share a value must be whole groups of {reduction.threads}, one after another; "
                f"got {len(taking_part)} threads from {min(taking_part)} to {max(taking_part)}; annotate a layout that has "
                "them in a row"
            )
        if first == reduction.first:
            return None
        return self.respell(call, Reduction(**{**vars(reduction), "first": first}))

    def _taking_part(self) -> set[int] | None:
        """Return the threads for which the conditions hold, as far as they speak of threads alone."""
        var, extent = self.threads
        conditions = [part for condition in self.conditions for part in _conjuncts(condition) if _is_about(var, part)]
        if not conditions:
            return None
        analyzer = arith.Analyzer()
        held = set()
        for thread in range(extent):
            number = {var: tirx.const(thread, var.dtype)}
            if all(analyzer.simplify(substitute(condition, number)) for condition in conditions):
                held.add(thread)
        return held


def _written(stmt: tirx.Stmt) -> set[tirx.Var]:
    """Return the memory that a statement stores to."""
    written = set()

    def visit(node):
        if isinstance(node, tirx.BufferStore):
            written.add(node.buffer.data)

    post_order_visit(stmt, visit)
    return written


def _conjuncts(condition: tirx.PrimExpr) -> list[tirx.PrimExpr]:
    return [*_conjuncts(condition.a), *_conjuncts(condition.b)] if isinstance(condition, tirx.And) else [condition]


def _is_about(var: tirx.Var, condition: tirx.PrimExpr) -> bool:
    """Whether a condition holds for some values of `var` and not for others, whatever else there is."""
    reads = False

    def visit(node):
        nonlocal reads
        reads = reads or isinstance(node, (tirx.BufferLoad, tirx.Call))

    post_order_visit(condition, visit)
    return not reads and list(tirx.analysis.undefined_vars(condition)) == [var]


def CountFromFirstThread(mod: IRModule, respell: Respell) -> IRModule:
    """Rewrite the functions of `mod` that reduce over threads; see above."""
    functions = {}
    for name, func in mod.functions_items():
        reduces = False

        def visit(node):
            nonlocal reduces
            reduces = reduces or (isinstance(node, tirx.Call) and reduction_of(node) is not None)

        post_order_visit(func.body, visit)
        functions[name] = func.with_body(_Counting(respell).visit(func.body)) if reduces else func
    return IRModule(functions, attrs=mod.attrs)

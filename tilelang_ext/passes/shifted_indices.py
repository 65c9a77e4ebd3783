"""Indices that wrap around, (j + 1) % 8, keep their value where a buffer of several axes becomes one of one axis.

    Before  s[tx % 64 // 8, (tx % 8 + 1) % 8]                        128 threads
    Within  s[tx % 64 // 8, keep((tx % 8 + 1) % 8)]
    After   s[tx % 64 // 8 * 8 + (tx % 8 + 1) % 8]                   FlattenBuffer alone makes it s[(tx + 1) % 64]

TVM's iteration maps pad a variable by what is added to it under a division, and then take it for the one without padding that
stands elsewhere in the index. Hidden from them is a division of a shifted sum, one of whose variables occurs in the rest of the
index too. `HideShiftedIndices` runs right before FlattenBuffer, `ReleaseShiftedIndices` right after it. Where the pass list is
upstream's, `HideShiftedTileIndices` runs before it, and they stay hidden until text is generated: each variable of a T.Parallel
will be a part of the thread's index, so there all of them count as one. Such an index is computed in 64 bits.
"""

from __future__ import annotations

from collections import Counter

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.float_arithmetic import KEEP, keep
from tilelang_ext.passes.rewrite import rewritten

_DIVISIONS = (tirx.FloorMod, tirx.FloorDiv)
_ACCESSES = ["tirx.BufferLoad", "tirx.BufferStore"]


def _children(expr: tirx.PrimExpr) -> list[tirx.PrimExpr]:
    children = [getattr(expr, name, None) for name in ("a", "b", "value", "condition", "true_value", "false_value")]
    children += [*(getattr(expr, "args", None) or ()), *(getattr(expr, "indices", None) or ())]
    return [child for child in children if isinstance(child, tirx.PrimExpr)]


def _variables(expr: tirx.PrimExpr) -> Counter:
    """How often each variable is written in an expression."""
    if isinstance(expr, tirx.Var):
        return Counter([expr])
    return sum((_variables(child) for child in _children(expr)), Counter())


def _is_shifted(expr: tirx.PrimExpr, iterators: set) -> bool:
    """Whether a sum has a term that no iterator is in."""
    if isinstance(expr, (tirx.Add, tirx.Sub)):
        return any(not iterators & _variables(term).keys() or _is_shifted(term, iterators) for term in (expr.a, expr.b))
    return isinstance(expr, (tirx.Mul, tirx.Cast)) and any(_is_shifted(child, iterators) for child in _children(expr))


def _hidden(indices, iterators: set, is_risky) -> list[tirx.PrimExpr] | None:
    """The indices of an access with what is risky hidden; None if nothing is."""
    everything = sum((_variables(index) for index in indices), Counter())
    found = False

    def hide(node):
        nonlocal found
        inside = _variables(node)
        if _is_shifted(node.a, iterators) and is_risky(inside, everything):
            found = True
            return keep(node)
        return None

    kinds = [f"tirx.{kind.__name__}" for kind in _DIVISIONS]
    made = [rewritten(tirx.Evaluate(index), hide, kinds).value for index in indices]
    return made if found else None


def _occurs_elsewhere(inside: Counter, everything: Counter) -> bool:
    return any(everything[var] > count for var, count in inside.items())


def _access(node, indices):
    if isinstance(node, tirx.BufferLoad):
        return tirx.BufferLoad(node.buffer, indices, node.predicate)
    return tirx.BufferStore(node.buffer, node.value, indices, node.predicate)


def _hide_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    iterators = set()

    def visit(node):
        if isinstance(node, tirx.For):
            iterators.add(node.loop_var)
        elif isinstance(node, tirx.AttrStmt) and node.attr_key in ("thread_extent", "virtual_thread"):
            iterators.add(node.node.var)

    tirx.stmt_functor.post_order_visit(func.body, visit)

    def hide(node):
        indices = _hidden(node.indices, iterators, _occurs_elsewhere)
        return None if indices is None else _access(node, indices)

    return func.with_body(rewritten(func.body, hide, _ACCESSES))


def _hide_in_tiles(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    iterators, parallel = set(), set()

    def visit(node):
        if isinstance(node, tirx.For):
            iterators.add(node.loop_var)
            if node.kind == tirx.ForKind.PARALLEL:
                parallel.add(node.loop_var)

    tirx.stmt_functor.post_order_visit(func.body, visit)

    def is_risky(inside, everything):
        return bool(parallel & inside.keys()) or _occurs_elsewhere(inside, everything)

    def hide(node):
        if node.buffer.scope() == "local.fragment":  # whose layout needs the index
            return None
        indices = _hidden(node.indices, iterators, is_risky)
        return None if indices is None else _access(node, indices)

    return func.with_body(rewritten(func.body, hide, _ACCESSES))


def _release_all(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    def release(node):
        is_kept = isinstance(node.op, Op) and node.op.name == KEEP and isinstance(node.args[0], _DIVISIONS)
        return node.args[0] if is_kept else None

    return func.with_body(rewritten(func.body, release, ["tirx.Call"]))


HideShiftedIndices = prim_func_pass(_hide_all, opt_level=0, name="tilelang_ext.HideShiftedIndices")
HideShiftedTileIndices = prim_func_pass(_hide_in_tiles, opt_level=0, name="tilelang_ext.HideShiftedTileIndices")
ReleaseShiftedIndices = prim_func_pass(_release_all, opt_level=0, name="tilelang_ext.ReleaseShiftedIndices")

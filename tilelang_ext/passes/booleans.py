"""Operators that upstream takes for those of integers when they are given booleans.

    Before  ~a                            a boolean: C's ~ of 0 and of 1 are both true
    After   not a

    Before  reduce(a, b, "max")           booleans have no smallest number to begin with
    After   reduce(a, b, "bitor")

    Before  reduce(a, b, "min")           nor all bits
    After   n = not a; reduce(n, b, "bitor"); b = not b

Runs first, on tile programs.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.rewrite import rewritten

_NOT, _REDUCE = "tirx.bitwise_not", "tl.tileop.reduce"
_ANY, _ALL = ("max", "absmax", "bitor"), ("min", "bitand")


def _is_bool(dtype) -> bool:
    return str(dtype) == "bool" or str(dtype).startswith("boolx")


def _negate(node: tirx.Call) -> tirx.PrimExpr | None:
    is_not = isinstance(node.op, Op) and node.op.name == _NOT
    return tirx.Not(node.args[0]) if is_not and _is_bool(node.dtype) else None


class _Reductions:
    """Rewrites the reductions of one function; a block that holds some allocates what they need."""

    def __init__(self):
        self.allocated: list[tirx.Buffer] = []

    def reduce(self, node: tirx.Evaluate) -> tirx.Stmt | None:
        call = node.value
        if not isinstance(call, tirx.Call) or not isinstance(call.op, Op) or call.op.name != _REDUCE:
            return None
        source, to = call.args[0], call.args[1]
        kind = call.args[2].value
        if not _is_bool(to.args[0].buffer.dtype) or kind not in (*_ANY, *_ALL) or kind == "bitor":
            return None
        if kind in _ANY:
            return _reduction(call, source, to)
        load, extents = source.args[0], list(source.args[2:])
        negated = tirx.decl_buffer(extents, "bool", f"not_{load.buffer.name}", scope=load.buffer.scope())
        self.allocated.append(negated)
        whole = tirx.Call(source.dtype, source.op, [negated[tuple(0 for _ in extents)], 1, *extents])
        begin = [] if bool(call.args[4]) else [_negated(to, to)]
        return tirx.SeqStmt([_negated(whole, source), *begin, _reduction(call, whole, to), _negated(to, to)])

    def allocate(self, block: tirx.SBlock) -> tirx.SBlock | None:
        if not self.allocated:
            return None
        buffers, self.allocated = [*block.alloc_buffers, *self.allocated], []
        return tirx.SBlock(
            block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init, buffers, block.match_buffers,
            block.annotations,
        )  # fmt: skip


def _reduction(call: tirx.Call, source: tirx.Call, to: tirx.Call) -> tirx.Evaluate:
    return tirx.Evaluate(
        tirx.Call(call.dtype, call.op, [source, to, tirx.StringImm("bitor"), *call.args[3:]], call.annotations)
    )


def _negated(to: tirx.Call, source: tirx.Call) -> tirx.Stmt:
    """Return the loop that stores what is not in one region in another."""
    extents = list(source.args[2:])
    variables = [tirx.Var(f"i{axis}", "int32") for axis in range(len(extents))]
    value = tirx.Not(tirx.BufferLoad(source.args[0].buffer, _within(source, variables)))
    stmt: tirx.Stmt = tirx.BufferStore(to.args[0].buffer, value, _within(to, variables))
    kind = tirx.ForKind.PARALLEL if to.args[0].buffer.scope() == "local.fragment" else tirx.ForKind.SERIAL
    for var, extent in reversed(list(zip(variables, extents, strict=True))):
        stmt = tirx.For(var, 0, extent, kind, stmt)
    return stmt


def _within(region: tirx.Call, variables: list[tirx.Var]) -> list[tirx.PrimExpr]:
    return [start + var for start, var in zip(region.args[0].indices, variables, strict=True)]


def _spell(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    reductions = _Reductions()

    def rewrite(node):
        if isinstance(node, tirx.Call):
            return _negate(node)
        return reductions.reduce(node) if isinstance(node, tirx.Evaluate) else reductions.allocate(node)

    return func.with_body(rewritten(func.body, rewrite, ["tirx.Call", "tirx.Evaluate", "tirx.SBlock"]))


SpellBooleans = prim_func_pass(_spell, opt_level=0, name="tilelang_ext.SpellBooleans")

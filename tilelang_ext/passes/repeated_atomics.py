"""Atomics in loops that several threads run alike, since the loop stores to a fragment that has copies in each.

    Before  for i in T.Parallel(8):                     After   for i in T.Parallel(8): result[i] = atomic_add(C[0], 1)
                p = atomic_add(C[0], 1)                         for i in T.Parallel(8): x[i] = result[i]; atomic_add(D[i], x[i])
                x[i] = p                                ...     the last loop in two, as well
                atomic_add(D[i], x[i])

A loop that stores to a fragment, or updates memory (`updates.py`), is run by every thread with a copy, and each would add;
one that stores to memory alone is run by one of them. So atomics get loops of their own, in the order of the statements, and
what they return goes through shared memory. Rounds of a T.Parallel have no order among each other, so its statements may be
taken one after another.

An atomic in an inner loop that stores to a fragment too, or bound to a name under a condition beside such a store, is refused.

Runs on tile programs whose threads have been materialised, before LayoutInference.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import ir_transform, post_order_visit, pre_order_visit, substitute
from tvm.tirx.transform import prim_func_pass

from tilelang_ext.passes.launched_blocks import launched_blocks
from tilelang_ext.passes.rewrite import with_buffers
from tilelang_ext.passes.updates import block_barrier, fragments_with_copies

_ONCE = ("tl.atomic_load", "tl.atomic_store")  # of every thread alike: the same as once

# Statements that belong together, and whether they must be a loop of their own: they have an atomic, or what bindings read.
_Group = tuple[list[tirx.Stmt], bool]


def _has_atomic(node) -> bool:
    found = False

    def visit(inner):
        nonlocal found
        name = inner.op.name if isinstance(inner, tirx.Call) and isinstance(inner.op, Op) else ""
        found = found or (name.startswith("tl.atomic_") and not name.startswith(_ONCE))

    post_order_visit(node, visit)
    return found


def _fragments(node) -> list[tirx.Buffer]:
    """Return the fragments that a statement stores to."""
    found = []

    def visit(inner):
        if isinstance(inner, tirx.BufferStore) and inner.buffer.scope() == "local.fragment":
            found.append(inner.buffer)

    post_order_visit(node, visit)
    return found


def _stored(node) -> dict[tirx.Var, tirx.Buffer]:
    found = {}

    def visit(inner):
        if isinstance(inner, tirx.BufferStore):
            found[inner.buffer.data] = inner.buffer

    post_order_visit(node, visit)
    return found


def _loaded(node) -> set[tirx.Var]:
    found = set()
    post_order_visit(node, lambda inner: found.add(inner.buffer.data) if isinstance(inner, tirx.BufferLoad) else None)
    return found


def _is_run_alike(loop: tirx.For, copied: set[tirx.Var]) -> bool:
    """Whether threads that hold copies of a fragment all run a loop: it stores to one, or updates memory, whose old value
    `updates.py` holds in one."""
    stored, loaded = _stored(loop), _loaded(loop)
    if copied.isdisjoint(stored.keys() | loaded):
        return False
    return any(
        buffer.scope() == "local.fragment" or (data in loaded and not buffer.scope().startswith("local"))
        for data, buffer in stored.items()
    )


def _updated_and_read(node) -> bool:
    """Whether a buffer that an atomic updates is read otherwise too."""
    pointers: set[tirx.BufferLoad] = set()
    updated: set[tirx.Var] = set()
    read: set[tirx.Var] = set()

    def visit_pointers(inner):
        name = inner.op.name if isinstance(inner, tirx.Call) and isinstance(inner.op, Op) else ""
        if name in ("tl.access_ptr", "tirx.address_of"):
            pointers.update(arg for arg in inner.args if isinstance(arg, tirx.BufferLoad))

    def visit(inner):
        if isinstance(inner, tirx.BufferLoad):
            (updated if inner in pointers else read).add(inner.buffer.data)

    post_order_visit(node, visit_pointers)
    post_order_visit(node, visit)
    return not updated.isdisjoint(read)


def _refuse(what: str):
    return NotImplementedError(
        "T.Parallel: an atomic beside a store to a fragment, which several threads hold, must be a statement of its own; "
        f"got {what}; put the atomic into a T.Parallel of its own"
    )


class _Fission:
    """The loops that one T.Parallel becomes."""

    def __init__(self, loop: tirx.For):
        self.loops: list[tirx.For] = []
        body = loop
        while isinstance(body, tirx.For) and body.kind == tirx.ForKind.PARALLEL:
            self.loops.append(body)
            body = body.body
        self.body = body
        self.stored = set(_stored(body))
        for buffer in _stored(body).values():
            if buffer.scope() in ("local", "local.var"):  # of one round: another loop would find the last one's
                raise _refuse(f"{buffer.name}, a variable that the loop sets")
        self.results: list[tirx.Buffer] = []
        self.bindings: list[tirx.Stmt] = []  # so far; each group repeats those that it uses

    def parts(self) -> list[tirx.Stmt]:
        """Return the loops, and barriers between them where one reads what the atomics of another update."""
        merged: list[_Group] = []
        for statements, is_alone in self._groups(self.body):
            if merged and not is_alone and not merged[-1][1]:
                merged[-1][0].extend(statements)
            else:
                merged.append((list(statements), is_alone))
        loops = [self._loop(statements) for statements, _ in merged]
        if not _updated_and_read(self.body):
            return loops
        return [part for loop in loops for part in (loop, block_barrier())][:-1]

    def _groups(self, stmt: tirx.Stmt) -> list[_Group]:
        if isinstance(stmt, tirx.SeqStmt):
            return [group for child in stmt.seq for group in self._groups(child)]
        if isinstance(stmt, tirx.Bind):
            return self._bind(stmt)
        if not _has_atomic(stmt):
            return [([stmt], False)]
        if not _fragments(stmt):
            return [([stmt], True)]
        if isinstance(stmt, tirx.BufferStore):
            result, store = self._held(stmt.value, "shared.dyn")
            return [([store], True), ([tirx.BufferStore(stmt.buffer, result, stmt.indices)], False)]
        if isinstance(stmt, tirx.IfThenElse):
            return self._under_condition(stmt)
        raise _refuse("a loop that has both")

    def _bind(self, stmt: tirx.Bind) -> list[_Group]:
        groups: list[_Group] = []
        if _has_atomic(stmt.value):
            result, store = self._held(stmt.value, "shared.dyn")
            groups = [([store], True)]
            stmt = tirx.Bind(stmt.var, result)
        elif _loaded(stmt.value) & self.stored:  # later groups would read what the loop has stored
            is_bool = str(stmt.value.dtype) == "bool"
            value = tirx.Cast("uint8", stmt.value) if is_bool else stmt.value
            held, store = self._held(value, "local.fragment")
            groups = [([store], True)]
            stmt = tirx.Bind(stmt.var, held != tirx.const(0, "uint8") if is_bool else held)
        self.bindings.append(stmt)
        return groups

    def _under_condition(self, stmt: tirx.IfThenElse) -> list[_Group]:
        if _has_atomic(stmt.condition) or _loaded(stmt.condition) & self.stored:
            raise _refuse(f"the condition {stmt.condition}")
        groups = []
        for condition, case in ((stmt.condition, stmt.then_case), (tirx.Not(stmt.condition), stmt.else_case)):
            if case is None:
                continue
            before = len(self.bindings)
            inner = self._groups(case)
            if len(self.bindings) > before:
                raise _refuse("a binding under a condition")
            for statements, is_alone in inner:
                groups.append(([tirx.IfThenElse(condition, _sequence(statements), None)], is_alone))
        return groups

    def _held(self, value: tirx.PrimExpr, scope: str) -> tuple[tirx.BufferLoad, tirx.BufferStore]:
        """Return the load of a buffer that holds a value of each round, and the store to it."""
        extents, variables = [loop.extent for loop in self.loops], [loop.loop_var for loop in self.loops]
        held = tirx.decl_buffer(extents, value.dtype, "held", scope=scope)
        self.results.append(held)
        return tirx.BufferLoad(held, variables), tirx.BufferStore(held, value, variables)

    def _loop(self, statements: list[tirx.Stmt]) -> tirx.Stmt:
        """Return a T.Parallel over statements, with variables of its own."""
        own = {loop.loop_var: tirx.Var(loop.loop_var.name, loop.loop_var.dtype) for loop in self.loops}
        used: set[tirx.Var] = set()
        for statement in statements:
            used.update(tirx.analysis.undefined_vars(statement))
        needed = []
        for binding in reversed(self.bindings):
            if binding.var in used:
                needed.append(binding)
                used.update(tirx.analysis.undefined_vars(binding.value))
        renamed = []
        for binding in reversed(needed):
            value = substitute(binding.value, own)
            own[binding.var] = tirx.Var(binding.var.name, binding.var.dtype)
            renamed.append(tirx.Bind(own[binding.var], value))
        body = _sequence([*renamed, *(substitute(statement, own) for statement in statements)])
        for loop in reversed(self.loops):
            body = tirx.For(own[loop.loop_var], loop.min, loop.extent, loop.kind, body, None, loop.annotations, loop.step)
        return body


def _sequence(statements: list[tirx.Stmt]) -> tirx.Stmt:
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)


def _part(func: tirx.PrimFunc, mod, ctx) -> tirx.PrimFunc:
    replaced: dict[tirx.Stmt, tirx.Stmt] = {}
    held: list[tirx.Buffer] = []
    for block in launched_blocks(func.body):
        loops: list[tirx.For] = []

        def visit(node, loops=loops):
            if not isinstance(node, tirx.For) or node.kind != tirx.ForKind.PARALLEL:
                return True
            loops.append(node)
            return False

        pre_order_visit(block.body, visit)
        copied = fragments_with_copies(block)
        for loop in loops:
            if _has_atomic(loop) and _is_run_alike(loop, copied):
                fission = _Fission(loop)
                replaced[loop] = _sequence(fission.parts())
                held.extend(fission.results)
    if not replaced:
        return func
    body = ir_transform(func.body, lambda node: replaced.get(node), None, ["tirx.For"])
    return func.with_body(with_buffers(body, held))


PartAtomics = prim_func_pass(_part, opt_level=0, name="tilelang_ext.PartAtomics")

"""Every thread of a block meets every barrier: conditions that part threads move from around it to what is beside it.

    Before  if t < 64: s[t] = ...; barrier; ... = s[63 - t]      After  if t < 64: s[t] = ...
                                                                        barrier
                                                                        if t < 64: ... = s[63 - t]

A barrier that a part of a block does not reach is undefined in Metal, and on AMD holds those that wait for ever. What each
thread computes stays as it is. Functions that hold a barrier are called by all, and told who takes part. Loops whose number of
rounds differs between threads cannot be parted from their barriers, and are refused.

Runs on flat device functions, after the barriers are placed.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import IRModule, tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import post_order_visit

from tilelang_ext.passes.missing_barriers import barrier, inner_barriers, is_barrier, wave_of
from tilelang_ext.passes.uniformity import Spread, Uniformity

# A call of a function with a barrier inside, and who takes part -> the call for all.
WithParticipants = Callable[[tirx.Call, tirx.PrimExpr], tirx.Call]

_FREE = ("tirx.bitwise_and", "tirx.bitwise_or", "tirx.bitwise_xor", "tirx.shift_left", "tirx.shift_right")


def _meets_barrier(stmt: tirx.Stmt, wave: int) -> bool:
    found = False

    def visit(node):
        nonlocal found
        if isinstance(node, tirx.Evaluate) and is_barrier(node):
            found = True
        elif isinstance(node, tirx.Call) and isinstance(node.op, Op) and node.op.name.endswith("call_extern"):
            found = found or any(inner_barriers(node, wave))

    post_order_visit(stmt, visit)
    return found


def _parts(stmt: tirx.Stmt) -> tuple[list[tirx.Stmt], list[tirx.Stmt | tirx.PrimExpr]]:
    """Return the statements inside a statement, and what else it consists of: itself if it has none."""
    if isinstance(stmt, tirx.SeqStmt):
        return list(stmt.seq), []
    if isinstance(stmt, tirx.AttrStmt):
        return [stmt.body], [stmt.value]
    if isinstance(stmt, tirx.For):
        return [stmt.body], [stmt.min, stmt.extent]
    if isinstance(stmt, tirx.While):
        return [stmt.body], [stmt.condition]
    if isinstance(stmt, tirx.IfThenElse):
        return [case for case in (stmt.then_case, stmt.else_case) if case is not None], [stmt.condition]
    return [], [stmt]


class _Parting:
    def __init__(self, body: tirx.Stmt, wave: int, with_participants: WithParticipants):
        self.wave = wave
        self.uniformity = Uniformity(body)
        self.with_participants = with_participants
        self._meeting: dict[tirx.Stmt, bool] = {}

    def meets_barrier(self, stmt: tirx.Stmt) -> bool:
        """Whether a statement holds a barrier, or calls what does; what stands in it is looked at once."""
        if stmt not in self._meeting:
            bodies, expressions = _parts(stmt)
            self._meeting[stmt] = any(self.meets_barrier(body) for body in bodies) or any(
                _meets_barrier(part, self.wave) for part in expressions
            )
        return self._meeting[stmt]

    def part(self, stmt: tirx.Stmt) -> tirx.Stmt:
        """Return `stmt`, which every thread of the block runs."""
        if not self.meets_barrier(stmt):
            return stmt
        if is_barrier(stmt):
            return barrier()
        if isinstance(stmt, tirx.SeqStmt):
            return tirx.SeqStmt([self.part(child) for child in stmt.seq])
        if isinstance(stmt, tirx.AttrStmt):
            return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, self.part(stmt.body))
        if isinstance(stmt, tirx.For):
            if max(map(self.uniformity.spread, (stmt.min, stmt.extent))) == Spread.DIVERGENT:
                raise _refusal(f"for {stmt.loop_var.name} in range({stmt.extent})")
            return _with_body(stmt, self.part(stmt.body))
        if isinstance(stmt, tirx.While):
            if self.uniformity.spread(stmt.condition) == Spread.DIVERGENT:
                raise _refusal(f"while {stmt.condition}")
            return tirx.While(stmt.condition, self.part(stmt.body))
        if isinstance(stmt, tirx.IfThenElse):
            if self.uniformity.spread(stmt.condition) == Spread.UNIFORM:
                otherwise = None if stmt.else_case is None else self.part(stmt.else_case)
                return tirx.IfThenElse(stmt.condition, self.part(stmt.then_case), otherwise)
            return _sequence(self._branches(stmt, None))
        return stmt

    def _branches(self, stmt: tirx.IfThenElse, taken: tirx.PrimExpr | None) -> list[tirx.Stmt]:
        """Return the statements of both branches for threads that part; `taken` tells who comes here at all."""
        statements, condition = [], stmt.condition
        cases = [(condition, stmt.then_case)]
        if stmt.else_case is not None:
            if not _is_free(condition):  # is read once: the first branch may change what it reads
                value = condition if taken is None else _guarded(condition, taken)
                statements.append(tirx.Bind(tirx.Var("condition", "bool"), value))
                condition = statements[0].var
            cases = [(condition, stmt.then_case), (tirx.Not(condition), stmt.else_case)]
        for case, body in cases:
            if taken is not None:
                case = tirx.And(taken, case)
            if not _is_free(case) and self.meets_barrier(body):
                variable = tirx.Var("taken", "bool")
                statements.append(tirx.Bind(variable, case))
                case = variable
            statements += self._push(case, body)
        return statements

    def _push(self, taken: tirx.PrimExpr, stmt: tirx.Stmt) -> list[tirx.Stmt]:
        """Return statements that all threads run and that do what `if taken: stmt` does."""
        if not self.meets_barrier(stmt):
            return [_if(taken, stmt)]
        if is_barrier(stmt):
            return [barrier()]
        if isinstance(stmt, tirx.SeqStmt):
            return self._push_sequence(taken, stmt)
        if isinstance(stmt, tirx.AttrStmt):
            return [tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, _sequence(self._push(taken, stmt.body)))]
        if isinstance(stmt, tirx.For):
            if max(map(self.uniformity.spread, (stmt.min, stmt.extent))) != Spread.UNIFORM or not _is_free(stmt.extent):
                raise _refusal(f"for {stmt.loop_var.name} in range({stmt.extent})")
            return [_with_body(stmt, _sequence(self._push(taken, stmt.body)))]
        if isinstance(stmt, tirx.IfThenElse):
            if self.uniformity.spread(stmt.condition) == Spread.UNIFORM and _is_free(stmt.condition):
                otherwise = None if stmt.else_case is None else _sequence(self._push(taken, stmt.else_case))
                return [tirx.IfThenElse(stmt.condition, _sequence(self._push(taken, stmt.then_case)), otherwise)]
            return self._branches(stmt, taken)
        if isinstance(stmt, tirx.BufferStore) and isinstance(stmt.value, tirx.Call):
            result = tirx.Var("combined", stmt.value.dtype)
            store = tirx.BufferStore(stmt.buffer, result, stmt.indices)
            return [tirx.Bind(result, self.with_participants(stmt.value, taken)), _if(taken, store)]
        if isinstance(stmt, tirx.Evaluate) and isinstance(stmt.value, tirx.Call):
            return [tirx.Evaluate(self.with_participants(stmt.value, taken))]
        raise _refusal(f"while {stmt.condition}" if isinstance(stmt, tirx.While) else str(stmt).strip())

    def _push_sequence(self, taken: tirx.PrimExpr, stmt: tirx.SeqStmt) -> list[tirx.Stmt]:
        statements, group = [], []

        def close():
            if group:
                statements.append(_if(taken, _sequence(group)))
                group.clear()

        for child in stmt.seq:
            if isinstance(child, tirx.Bind):  # later statements, behind a barrier, may use it
                close()
                value = child.value
                guard = value.dtype != "handle" and not _is_free(value)
                statements.append(tirx.Bind(child.var, _guarded(value, taken) if guard else value))
            elif isinstance(child, (tirx.AllocBuffer, tirx.DeclBuffer)):
                close()
                statements.append(child)
            elif self.meets_barrier(child):
                close()
                statements += self._push(taken, child)
            else:
                group.append(child)
        close()
        return statements


def _guarded(value: tirx.PrimExpr, taken: tirx.PrimExpr) -> tirx.PrimExpr:
    return tirx.if_then_else(taken, value, tirx.const(0, value.dtype))


def _is_free(expr: tirx.PrimExpr) -> bool:
    """Whether any thread may evaluate an expression at any time: it reads no memory, calls nothing and does not divide."""
    free = True

    def visit(node):
        nonlocal free
        if isinstance(node, (tirx.BufferLoad, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod)):
            free = free and not isinstance(node, tirx.BufferLoad) and isinstance(node.b, tirx.IntImm)
        elif isinstance(node, tirx.Call):
            free = free and isinstance(node.op, Op) and node.op.name in _FREE

    post_order_visit(expr, visit)
    return free


def _if(taken: tirx.PrimExpr, stmt: tirx.Stmt) -> tirx.Stmt:
    return tirx.IfThenElse(taken, stmt, None)


def _with_body(loop: tirx.For, body: tirx.Stmt) -> tirx.For:
    return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, loop.annotations, loop.step)


def _sequence(statements: list[tirx.Stmt]) -> tirx.Stmt:
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)


def _refusal(construct: str) -> NotImplementedError:
    return NotImplementedError(
        f"barrier: every thread of a block must reach it; got one inside `{construct}`, which threads leave at "
        "different times; keep shared memory, reductions and T.sync_threads out of it, or give it the same bounds for every "
        "thread"
    )


def PartDivergentBarriers(mod: IRModule, with_participants: WithParticipants) -> IRModule:
    """Rewrite the functions of `mod`; see above."""
    functions = {}
    for name, func in mod.functions_items():
        wave = wave_of(func)
        if _meets_barrier(func.body, wave):
            func = func.with_body(_Parting(func.body, wave, with_participants).part(func.body))
        functions[name] = func
    return IRModule(functions, attrs=mod.attrs)

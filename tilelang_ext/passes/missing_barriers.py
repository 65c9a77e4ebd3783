"""Put a barrier wherever two threads of a block may meet in shared memory and upstream's ThreadSync left none.

    Before  s[t] = ...                                After  s[t] = ...
            for k in n: barrier; ...                         for k in n: barrier; ...
                                                             barrier
            ... = s[63 - t]                                  ... = s[63 - t]

ThreadSync takes a barrier in a loop, or under a condition, for one that every path meets, and knows no back edge of `while`.
Here accesses flow along every path: past a loop that may run no round, past a branch that may not be taken, around back edges.

Runs on flat device functions, after ThreadSync.
"""

from __future__ import annotations

from tvm import IRModule, arith, tirx
from tvm.ir import Op
from tvm.ir.transform import PassContext
from tvm.tirx.stmt_functor import post_order_visit

from tilelang_ext.passes.accesses import Access, Around, Node, Program
from tilelang_ext.passes.overlap import LATER, NEXT, may_meet
from tilelang_ext.passes.uniformity import int_of

_SYNC = "tirx.tvm_storage_sync"
_JUMPS = {
    "tl.loop_break": "break",
    "tirx.break_loop": "break",
    "tirx.continue_loop": "continue",
    "tirx.thread_return": "return",
}

# An access that no barrier has followed yet, with the loops whose back edge was taken since.
_State = dict[tuple[Access, frozenset[tuple[Around, str]]], None]


def is_barrier(stmt: tirx.Stmt) -> bool:
    """Whether a statement is a barrier of the whole block, or of a part of it."""
    call = _call(stmt)
    return call is not None and call.op.name == _SYNC and call.args[0].value in ("shared", "shared.dyn")


def barrier() -> tirx.Stmt:
    """Return a barrier of the whole block."""
    return tirx.Evaluate(tirx.Call("int32", Op.get(_SYNC), [tirx.StringImm("shared")]))


def inner_barriers(stmt: tirx.Stmt | tirx.PrimExpr, wave: int) -> tuple[bool, bool]:
    """Return whether a statement, or an expression, calls a function that begins with a barrier, and whether one that ends with
    one. `wave` is how many lanes a wave has."""
    begins = ends = False

    def visit(node):
        nonlocal begins, ends
        if isinstance(node, tirx.Call) and isinstance(node.op, Op) and node.op.name.endswith("call_extern"):
            name = node.args[0].value
            ends = ends or name.startswith("all_reduce_shared<")  # ours, on Metal
            begins = begins or name.startswith("tilelang_ext::all_reduce<")  # ours, on AMD
            if name.startswith("tl::AllReduce<"):  # upstream's, on AMD: the lanes of a wave need none
                begins = begins or int(name.split(",")[1]) >= 2 * wave

    post_order_visit(stmt, visit)
    return begins, ends


def wave_of(func: tirx.PrimFunc) -> int:
    """Return how many lanes a wave of a device function's target has."""
    return int(func.attrs["target"].attrs.get("thread_warp_size", 32)) if "target" in func.attrs else 32


class _Planner:
    def __init__(self, body: tirx.Stmt, wave: int):
        self.program = Program(body)
        self.wave = wave
        self.found = False
        self._met: dict[tuple, bool] = {}
        self._inner: dict[Node, tuple[bool, bool]] = {}  # of the statements in a loop, which is walked until nothing changes
        self._leaving: list[dict[str, list[_State]]] = []  # of the loops around, the states at their `break` and `continue`
        self._walk(self.program.root, {})

    def _walk(self, node: Node, state: _State) -> _State:
        """Return the state behind `node`. No state, after a jump, is one that nothing can come from."""
        stmt = node.stmt
        if is_barrier(stmt):
            return {}
        if isinstance(stmt, (tirx.SeqStmt, tirx.AttrStmt)):
            for child in node.children:
                state = self._walk(child, state)
            return state
        if isinstance(stmt, tirx.While):
            return self._while(node, state)
        call = _call(stmt)
        if call is not None and call.op.name in _JUMPS:
            if self._leaving and _JUMPS[call.op.name] in self._leaving[-1]:
                self._leaving[-1][_JUMPS[call.op.name]].append(state)
            return {}
        begins, ends = self._inner_barriers(node)
        state = self._come_to(node, {} if begins else state)
        if isinstance(stmt, tirx.For):
            return self._for(node, state)
        if isinstance(stmt, tirx.IfThenElse):
            paths = [self._walk(child, state) for child in node.children]
            return _join(*paths, *([state] if len(paths) == 1 else []))
        return {} if ends else state

    def _inner_barriers(self, node: Node) -> tuple[bool, bool]:
        if node.children or not node.accesses:
            return False, False
        if node not in self._inner:
            self._inner[node] = inner_barriers(node.stmt, self.wave)
        return self._inner[node]

    def _come_to(self, node: Node, state: _State) -> _State:
        """Put a barrier before `node` if its own accesses may meet one of `state`; return the state behind them."""
        if node.barrier_before:
            state = {}
        elif self._may_meet(state, node):
            node.barrier_before = self.found = True
            state = {}
        return _join(state, {(access, frozenset()): None for access in node.accesses})

    def _may_meet(self, state: _State, node: Node) -> bool:
        for later in node.accesses:
            for earlier, carried in state:
                key = (earlier, carried, later)
                if key not in self._met:
                    self._met[key] = may_meet(self.program, earlier, dict(carried), later)
                if self._met[key]:
                    return True
        return False

    def _for(self, node: Node, entry: _State) -> _State:
        extent = int_of(node.stmt.extent)
        if extent == 0:
            return entry
        state = entry
        while True:
            out, left = self._round(node, state)
            again = _join(state, {} if extent == 1 else _carry(out, node.loop))
            if again.keys() == state.keys():
                break
            state = again
        runs = extent is not None or arith.Analyzer().can_prove(node.loop.extent >= 1)
        return _join(_leave(_join(out, left), node.loop), {} if runs else entry)

    def _while(self, node: Node, entry: _State) -> _State:
        """The condition is read before each round: its barrier stands before the loop, and at the end of the body."""
        state = self._come_to(node, entry)
        while True:
            out, left = self._round(node, state)
            out = _carry(out, node.loop)
            if node.barrier_at_end:
                out = {}
            elif self._may_meet(out, node):
                node.barrier_at_end = self.found = True
                out = {}
            again = _join(state, out)
            if again.keys() == state.keys():
                return _leave(_join(state, left), node.loop)
            state = again

    def _round(self, loop: Node, state: _State) -> tuple[_State, _State]:
        """Return the states at the end of a loop's body, and where it is left early."""
        self._leaving.append({"break": [], "continue": []})
        out = self._walk(loop.children[0], state)
        jumps = self._leaving.pop()
        return _join(out, *jumps["continue"]), _join(*jumps["break"])


def _join(*states: _State) -> _State:
    return {entry: None for state in states for entry in state}


def _carry(state: _State, loop: Around) -> _State:
    """Return what the end of a loop's body hands to its beginning."""
    carried: _State = {}
    for access, rounds in state:
        if loop in access.around:
            inside = access.around[access.around.index(loop) + 1 :]  # loops that begin anew
            counts = {outer: count for outer, count in rounds if outer not in inside}
            counts[loop] = LATER if loop in counts else NEXT
            rounds = frozenset(counts.items())
        carried[(access, rounds)] = None
    return carried


def _leave(state: _State, loop: Around) -> _State:
    return {(access, frozenset(pair for pair in rounds if pair[0] is not loop)): None for access, rounds in state}


def _call(stmt: tirx.Stmt) -> tirx.Call | None:
    """Return the call of an operator that a statement is."""
    call = stmt.value if isinstance(stmt, tirx.Evaluate) else None
    return call if isinstance(call, tirx.Call) and isinstance(call.op, Op) else None


def _rebuild(node: Node) -> tirx.Stmt:
    stmt, bodies = node.stmt, [_rebuild(child) for child in node.children]
    if node.barrier_at_end:
        bodies[0] = tirx.SeqStmt([bodies[0], barrier()])
    if isinstance(stmt, tirx.SeqStmt):
        stmt = tirx.SeqStmt(bodies)
    elif isinstance(stmt, tirx.AttrStmt):
        stmt = tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, bodies[0])
    elif isinstance(stmt, tirx.For):
        bounds = stmt.loop_var, stmt.min, stmt.extent, stmt.kind
        stmt = tirx.For(*bounds, bodies[0], stmt.thread_binding, stmt.annotations, stmt.step)
    elif isinstance(stmt, tirx.While):
        stmt = tirx.While(stmt.condition, bodies[0])
    elif isinstance(stmt, tirx.IfThenElse):
        stmt = tirx.IfThenElse(stmt.condition, bodies[0], bodies[1] if len(bodies) > 1 else None)
    return tirx.SeqStmt([barrier(), stmt]) if node.barrier_before else stmt


def _place(func: tirx.PrimFunc) -> tirx.PrimFunc:
    uses_shared = False

    def visit(node):
        nonlocal uses_shared
        uses_shared = uses_shared or (isinstance(node, tirx.AllocBuffer) and node.buffer.scope().startswith("shared"))

    post_order_visit(func.body, visit)
    if not uses_shared:
        return func
    planner = _Planner(func.body, wave_of(func))
    return func.with_body(_rebuild(planner.program.root)) if planner.found else func


def PlaceMissingBarriers(mod: IRModule) -> IRModule:
    """Rewrite the functions of `mod` that use shared memory; see above. Whoever switches ThreadSync off places all barriers."""
    if PassContext.current().config.get("tl.disable_thread_storage_sync", False):
        return mod
    return IRModule({name: _place(func) for name, func in mod.functions_items()}, attrs=mod.attrs)

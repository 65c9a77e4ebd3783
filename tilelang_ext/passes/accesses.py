"""A flat device function as a tree of statements, each with the shared memory that it touches."""

from __future__ import annotations

from dataclasses import dataclass, field

from tvm import DataType, tirx
from tvm.ir import Op, PointerType
from tvm.tirx.stmt_functor import post_order_visit, substitute

from tilelang_ext.passes.uniformity import int_of

_ATOMIC = "tl.atomic_"
_PURE = (
    *("tirx.bitwise_and", "tirx.bitwise_or", "tirx.bitwise_xor"),
    *("tirx.shift_left", "tirx.shift_right", "tirx.if_then_else"),
)


@dataclass(eq=False)
class Around:
    """What stands around a statement: a loop with its variable and bounds, a `while` with its condition, or a condition."""

    condition: tirx.PrimExpr | None = None
    loop_var: tirx.Var | None = None
    begin: tirx.PrimExpr | None = None
    extent: tirx.PrimExpr | None = None
    is_loop: bool = False


@dataclass(eq=False)
class Access:
    """`size` bits of an array from `low` on, by every thread that comes there; all of the array if `low` is None."""

    array: tirx.Var
    low: tirx.PrimExpr | None
    size: int
    writes: bool
    atomic: bool
    around: tuple[Around, ...]  # the outermost first


@dataclass(eq=False)
class Node:
    """A statement, the accesses of its own expressions, and its bodies. Barriers are marked here, and built in at the end."""

    stmt: tirx.Stmt
    accesses: list[Access] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)
    loop: Around | None = None
    barrier_before: bool = False
    barrier_at_end: bool = False  # of a loop's body


class Program:
    """The tree of a function's body, its threads, and which variables hold what was read from memory."""

    def __init__(self, body: tirx.Stmt):
        self.threads: dict[tirx.Var, int] = {}  # of more than one value, with their number
        self.opaque: set[tirx.Var] = set()
        self._values: dict[tirx.Var, tirx.PrimExpr] = {}
        self._aliases: dict[tirx.Var, tuple[tirx.Var, tirx.PrimExpr]] = {}  # pointer -> array, and offset in bits
        self.root = self._node(body, ())

    def _node(self, stmt: tirx.Stmt, around: tuple[Around, ...]) -> Node:
        node = Node(stmt)
        if isinstance(stmt, tirx.SeqStmt):
            node.children = [self._node(child, around) for child in stmt.seq]
        elif isinstance(stmt, tirx.AttrStmt):
            if stmt.attr_key == "thread_extent" and stmt.node.thread_tag.startswith("threadIdx") and int(stmt.value) > 1:
                self.threads[stmt.node.var] = int(stmt.value)
            node.children = [self._node(stmt.body, around)]
        elif isinstance(stmt, tirx.For):
            self._read(node, [stmt.min, stmt.extent], around)
            node.loop = Around(None, stmt.loop_var, self._value(stmt.min), self._value(stmt.extent), True)
            node.children = [self._node(stmt.body, (*around, node.loop))]
        elif isinstance(stmt, tirx.While):
            self._read(node, [stmt.condition], around)
            node.loop = Around(self._value(stmt.condition), is_loop=True)
            node.children = [self._node(stmt.body, (*around, node.loop))]
        elif isinstance(stmt, tirx.IfThenElse):
            self._read(node, [stmt.condition], around)
            condition = self._value(stmt.condition)
            node.children = [self._node(stmt.then_case, (*around, Around(condition)))]
            if stmt.else_case is not None:
                node.children.append(self._node(stmt.else_case, (*around, Around(tirx.Not(condition)))))
        elif isinstance(stmt, tirx.Bind):
            self._read(node, [stmt.value], around)
            self._bind(stmt)
        elif isinstance(stmt, tirx.BufferStore):
            self._read(node, [stmt.value, *stmt.indices], around)
            self._touch(node, stmt.buffer, stmt.indices, around, writes=True)
        elif isinstance(stmt, tirx.Evaluate):
            self._read(node, [stmt.value], around)
        elif isinstance(stmt, tirx.AssertStmt):
            self._read(node, [stmt.condition], around)
        return node

    def _bind(self, stmt: tirx.Bind) -> None:
        value = stmt.value
        if stmt.var.dtype != "handle":
            if reads_memory(value):
                self.opaque.add(stmt.var)
            else:
                self._values[stmt.var] = self._value(value)
        elif isinstance(value, tirx.Var):
            self._aliases[stmt.var] = self._alias(value)
        elif isinstance(value, tirx.Call) and isinstance(value.op, Op) and value.op.name == "tirx.handle_add_byte_offset":
            array, offset = self._alias(value.args[0])
            self._aliases[stmt.var] = array, offset + _wide(self._value(value.args[1])) * 8

    def _alias(self, pointer: tirx.Var) -> tuple[tirx.Var, tirx.PrimExpr]:
        return self._aliases.get(pointer, (pointer, tirx.IntImm("int64", 0)))

    def _value(self, expr: tirx.PrimExpr) -> tirx.PrimExpr:
        return substitute(expr, self._values) if self._values else expr

    def _read(self, node: Node, exprs: list[tirx.PrimExpr], around: tuple[Around, ...]) -> None:
        users: dict[tirx.Call, str] = {}  # a call -> the name of the call that it is an argument of
        addressed = set()

        def find_users(part):
            if isinstance(part, tirx.Call) and isinstance(part.op, Op):
                users.update({argument: part.op.name for argument in part.args if isinstance(argument, tirx.Call)})
                if part.op.name == "tirx.address_of":
                    addressed.add(part.args[0])

        def touch(part):
            if isinstance(part, tirx.BufferLoad) and part not in addressed:
                self._touch(node, part.buffer, part.indices, around, writes=False)
            elif isinstance(part, tirx.Call) and isinstance(part.op, Op):
                atomic = users.get(part, "").startswith(_ATOMIC)
                if part.op.name == "tirx.address_of":
                    load = part.args[0]  # how much a function takes from there is its own affair
                    self._touch(node, load.buffer, load.indices if atomic else [], around, writes=True, atomic=atomic)
                elif part.op.name == "tirx.tvm_access_ptr":
                    self._touch_pointer(node, part, around, atomic)

        for visit in (find_users, touch):
            for expr in exprs:
                post_order_visit(expr, visit)

    def _touch(self, node: Node, buffer: tirx.Buffer, indices, around, *, writes: bool, atomic: bool = False) -> None:
        if not is_shared(buffer.data):
            return
        array, offset = self._alias(buffer.data)
        low, size = None, 0
        if len(indices) == 1:
            element = DataType(buffer.dtype)
            low, size = _span(self._value(indices[0]), element.bits * element.lanes)
        node.accesses.append(Access(array, None if low is None else low + offset, size, writes, atomic, around))

    def _touch_pointer(self, node: Node, pointer: tirx.Call, around: tuple[Around, ...], atomic: bool) -> None:
        kind, data, offset, extent, mask = pointer.args
        if not is_shared(data):
            return
        array, base = self._alias(data)
        element = DataType(kind.dtype)
        bits, count = element.bits * element.lanes, int_of(extent)
        low = None if count is None else base + _wide(self._value(offset)) * bits
        for writes, bit in ((False, 1), (True, 2)):
            if int(mask) & bit:
                node.accesses.append(Access(array, low, (count or 0) * bits, writes, atomic, around))


def is_shared(data: tirx.Var) -> bool:
    """Whether a pointer is to shared memory."""
    kind = data.type_annotation
    return isinstance(kind, PointerType) and kind.storage_scope.startswith("shared")


def reads_memory(expr: tirx.PrimExpr) -> bool:
    """Whether the value of an expression is more than arithmetic on variables."""
    found = False

    def visit(node):
        nonlocal found
        found = found or is_opaque(node)

    post_order_visit(expr, visit)
    return found


def is_opaque(node) -> bool:
    """Whether a node of an expression is a load, or a call that is no arithmetic on integers."""
    if isinstance(node, tirx.Call):
        return not isinstance(node.op, Op) or node.op.name not in _PURE
    return isinstance(node, tirx.BufferLoad)


def _span(index: tirx.PrimExpr, bits: int) -> tuple[tirx.PrimExpr | None, int]:
    """Return the first bit of an index and how many bits it touches from there; (None, 0) for what is not seen through."""
    if isinstance(index, tirx.Ramp):
        stride, lanes = int_of(index.stride), int_of(index.lanes)
        if stride is None or stride < 0 or lanes is None:
            return None, 0
        return _wide(index.base) * bits, (stride * (lanes - 1) + 1) * bits
    if isinstance(index, tirx.Broadcast):
        index = index.value
    return (None, 0) if DataType(index.dtype).lanes != 1 else (_wide(index) * bits, bits)


def _wide(index: tirx.PrimExpr) -> tirx.PrimExpr:
    return index if str(index.dtype) == "int64" else tirx.Cast("int64", index)

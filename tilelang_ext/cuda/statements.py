"""What passes on tile programs ask of statements, and the statements that they build."""

from __future__ import annotations

from collections.abc import Callable

from tilelang import language as T
from tvm import arith, tirx
from tvm.ir import Op, Range
from tvm.tirx.stmt_functor import post_order_visit, substitute

COPY, REGION = "tl.tileop.copy", "tl.region"  # operators of a tile program


# --- questions -------------------------------------------------------------------------------------------------------


def nodes_of(root, wanted: Callable) -> list:
    """Return the nodes below `root` that are `wanted`, inner ones first."""
    found = []
    post_order_visit(root, lambda node: found.append(node) if wanted(node) else None)
    return found


def contains(stmt: tirx.Stmt, node) -> bool:
    return bool(nodes_of(stmt, lambda other: other.same_as(node)))


def flat(stmt: tirx.Stmt) -> list[tirx.Stmt]:
    """Return the statements of a sequence of sequences."""
    return [inner for child in stmt.seq for inner in flat(child)] if isinstance(stmt, tirx.SeqStmt) else [stmt]


def is_call(node, name: str) -> bool:
    return isinstance(node, tirx.Call) and isinstance(node.op, Op) and node.op.name == name


def region_of(operand: tirx.Call) -> tirx.BufferRegion:
    """Return what an operand of a tile operator covers; the call holds an element, the kind of access and extents."""
    load, _, *extents = operand.args
    return tirx.BufferRegion(load.buffer, [Range.from_min_extent(a, b) for a, b in zip(load.indices, extents, strict=True)])


def is_written(operand: tirx.Call) -> bool:
    return bool(int(operand.args[1]) & 2)


def is_whole(region: tirx.BufferRegion) -> bool:
    """Whether a region covers its buffer."""
    pairs = zip(region.region, region.buffer.shape, strict=True)
    return all(is_zero(axis.min) and equal(axis.extent, extent) for axis, extent in pairs)


def is_global(buffer: tirx.Buffer) -> bool:
    return buffer.scope() in ("global", "")


def is_zero(value) -> bool:
    return isinstance(value, tirx.IntImm) and int(value) == 0


def is_one(value) -> bool:
    return isinstance(value, tirx.FloatImm) and float(value) == 1


def equal(first, second) -> bool:
    """Whether two expressions are provably equal."""
    return arith.Analyzer().can_prove_equal(tirx.convert(first), tirx.convert(second))


def strides_of(buffer: tirx.Buffer) -> list:
    if buffer.strides:
        return list(buffer.strides)
    strides = [tirx.IntImm("int32", 1)]
    for extent in reversed(buffer.shape[1:]):
        strides.insert(0, strides[0] * extent)
    return strides


def bound_values(stmt: tirx.Stmt) -> dict:
    """Return variables that a statement binds with their values, free of such variables."""
    values = {}
    for bind in nodes_of(stmt, lambda node: isinstance(node, tirx.Bind)):
        values[bind.var] = substitute(bind.value, values)
    return values


# --- statements ------------------------------------------------------------------------------------------------------


def call(operator: tirx.PrimExpr) -> tirx.Stmt:
    return tirx.Evaluate(operator)


def sequence(*stmts: tirx.Stmt) -> tirx.Stmt:
    inner = [one for stmt in stmts for one in flat(stmt)]
    return inner[0] if len(inner) == 1 else tirx.SeqStmt(inner)


def store(buffer: tirx.Buffer, value, *at) -> tirx.Stmt:
    return tirx.BufferStore(buffer, tirx.convert(value), [tirx.convert(index) for index in at])


def when(condition, then: tirx.Stmt) -> tirx.Stmt:
    return tirx.IfThenElse(condition, then, None)


def loop(var: tirx.Var, extent, body: tirx.Stmt, kind=tirx.ForKind.SERIAL, annotations: dict | None = None) -> tirx.For:
    return tirx.For(var, tirx.IntImm("int32", 0), tirx.convert(extent), kind, body, annotations=annotations)


def parallel(extents: tuple[int, ...], stmt: Callable, layout: T.Fragment | None = None) -> tirx.For:
    """Return T.Parallel(*extents) around `stmt(*variables)`, with the layout of the loop if it is given."""
    variables = [tirx.Var(name, "int32") for name in "ij"[: len(extents)]]
    body = stmt(*variables)
    for var, extent in reversed(list(zip(variables, extents, strict=True))):
        annotations = {"parallel_loop_layout": layout} if layout is not None and var.same_as(variables[0]) else None
        body = loop(var, extent, body, tirx.ForKind.PARALLEL, annotations)
    return body


def fence(fragment: tirx.Buffer, registers: int) -> tirx.Stmt:
    """Keep the compiler from moving what reads or writes these registers of a thread across here."""
    operands = str(fragment.dtype), fragment.data, tirx.IntImm("int32", 0), tirx.IntImm("int32", registers)
    return call(tirx.call_intrin("handle", Op.get("tl.warpgroup_fence_operand"), *operands))


def local(size: int, dtype: str, name: str) -> tirx.Buffer:
    return tirx.decl_buffer((size,), dtype, name, scope="local")


def fragment(shape: tuple[int, ...], name: str) -> tirx.Buffer:
    return tirx.decl_buffer(shape, "float32", name, scope="local.fragment")


def shared(shape: tuple, dtype: str, name: str) -> tirx.Buffer:
    return tirx.decl_buffer(shape, dtype, name, scope="shared.dyn")


def barriers(count: int, name: str) -> tirx.Buffer:
    return tirx.decl_buffer((count,), "uint64", name, scope="shared.barrier")


def with_body(block: tirx.SBlock, body: tirx.Stmt, buffers: list, annotations: dict) -> tirx.SBlock:
    """Return the block with another body, other buffers and annotations."""
    return tirx.SBlock(
        block.iter_vars,
        block.reads,
        block.writes,
        block.name_hint,
        body,
        block.init,
        buffers,
        block.match_buffers,
        annotations,
    )

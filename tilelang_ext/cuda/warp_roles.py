"""Warp specialization of a kernel's block: consumers run it but for some statements, the producer only the way to those.

    Before                                  After
    for tile in ...:                        if thread < threads:           consumer warpgroups
        before                                  for tile in ...: before; consume(tile); behind
        statement(tile)                     else:                          one warpgroup more
        behind                                  for tile in ...: produce(tile)

Invariant: the way to a statement is made of sequences, serial loops, conditions and attributes; what stands beside it neither
synchronizes threads nor touches what the producer reads, and its stages are used nowhere else.
"""

from __future__ import annotations

from tilelang import language as T
from tvm import tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import ir_transform, substitute

from tilelang_ext.cuda.statements import (
    REGION,
    bound_values,
    call,
    contains,
    is_call,
    is_global,
    is_written,
    nodes_of,
    region_of,
    sequence,
    when,
    with_body,
)

WARP, WARPGROUP = 32, 128  # threads
MAX_REGISTERS = 240  # of a thread

_REGISTERS = 65536  # of an SM
_SYNCHRONIZATION = ("barrier", "sync", "tma_load", "cp_async", "wgmma", "tcgen05", "max_nreg")  # in names of operators


class OtherForm(Exception):
    """The kernel has another form; the message says which."""


# --- questions -------------------------------------------------------------------------------------------------------


def launch_of(func: tirx.PrimFunc) -> tuple[tirx.SBlock, tirx.Var, int]:
    """Return the one block of a function, the index of a thread along x and the threads; raises OtherForm."""
    blocks = nodes_of(func.body, lambda node: isinstance(node, tirx.SBlock) and node.name_hint == "tilelang_root")
    placeholders = nodes_of(func.body, lambda node: isinstance(node, tirx.Bind) and is_call(node.value, "tl.launch_thread_idx"))
    thread_loops = nodes_of(func.body, binds_threads)
    if len(blocks) != 1 or (not placeholders and not thread_loops):
        raise OtherForm("it is not the one launch of a function")
    [block] = blocks
    if placeholders:
        thread, launch = placeholders[0].var, block.annotations.get("tl.launch_threads", [WARPGROUP, 1, 1])
    else:
        thread, launch = thread_loops[-1].loop_var, [loop.extent for loop in reversed(thread_loops)]
    launch = [int(extent) for extent in launch]
    if launch[0] % WARPGROUP or launch[1:] not in ([], [1, 1]):
        raise OtherForm(f"its threads are no whole warpgroups: {launch}")
    return block, thread, launch[0]


def binds_threads(node) -> bool:
    """Whether this is a loop over the threads of a block, as tilelang 0.1.14 writes them; the innermost is threadIdx.z."""
    return isinstance(node, tirx.For) and node.thread_binding is not None and "threadIdx" in node.thread_binding.thread_tag


def registers_of_consumer(threads: int, of_producer: int, blocks: int = 1) -> int:
    """Return the registers that each of `threads` consumers can take from a producer warpgroup that keeps `of_producer`.

    A block's registers, of which an SM holds `blocks`, are as many for each thread at first. Consumers would wait for ever for
    one that is not there.
    """
    all_threads = threads + WARPGROUP
    of_thread = _REGISTERS // blocks // all_threads // 8 * 8
    if threads == WARPGROUP:  # registers stay as they are
        return of_thread
    block = of_thread * all_threads
    return min((block - WARPGROUP * of_producer) // threads // 8 * 8, MAX_REGISTERS)


def check_beside(block: tirx.SBlock, statements: list, private: list, read: set) -> None:
    """Check what stands beside the way to `statements`: `private` are data of their stages, `read` what the producer reads."""
    for stmt in _beside(block.body, statements):
        for node in nodes_of(stmt, lambda node: isinstance(node, (tirx.Call, tirx.BufferLoad, tirx.BufferStore))):
            written = []
            if isinstance(node, tirx.Call):
                if isinstance(node.op, Op) and any(word in node.op.name for word in _SYNCHRONIZATION):
                    raise OtherForm(f"it calls {node.op.name} outside of the loop")
                if "barrier" in (node.annotations or {}):
                    raise OtherForm(f"it calls {node.op.name} with a barrier outside of the loop")
                written = [region_of(arg).buffer.data for arg in node.args if is_call(arg, REGION) and is_written(arg)]
            elif any(node.buffer.data.same_as(data) for data in private):
                raise OtherForm(f"{node.buffer.name} is used outside of the loop")
            elif isinstance(node, tirx.BufferStore):
                written = [node.buffer.data]
            if any(data in read for data in written):
                raise OtherForm("it writes what the loop reads")


def read_by_producer(block: tirx.SBlock, statements: list, sources: list, expressions: list) -> set:
    """Return the data of what a producer reads: global regions, `expressions`, and what ways and indices depend on."""
    values = bound_values(block.body)
    expressions = [axis.min for source in sources for axis in source.region] + expressions
    on_a_way = lambda node: isinstance(node, (tirx.For, tirx.IfThenElse)) and contains_any(node, statements)  # noqa: E731
    for node in nodes_of(block.body, on_a_way):
        expressions += [node.min, node.extent] if isinstance(node, tirx.For) else [node.condition]
    read = {source.buffer.data for source in sources}
    for expression in expressions:
        for load in nodes_of(substitute(expression, values), lambda node: isinstance(node, tirx.BufferLoad)):
            if not is_global(load.buffer):
                raise OtherForm(f"what it copies depends on {load.buffer.name}, which is not in global memory")
            read.add(load.buffer.data)
    return read


def contains_any(stmt: tirx.Stmt, statements: list) -> bool:
    return any(contains(stmt, statement) for statement in statements)


def _beside(stmt: tirx.Stmt, statements: list) -> list[tirx.Stmt]:
    """Return the statements beside the ways."""
    if any(stmt.same_as(statement) for statement in statements):
        return []
    if isinstance(stmt, tirx.SeqStmt):
        ways = [child for child in stmt.seq if contains_any(child, statements)]
        beside = [child for child in stmt.seq if not any(child.same_as(way) for way in ways)]
        return beside + [inner for way in ways for inner in _beside(way, statements)]
    if isinstance(stmt, tirx.For) and stmt.kind == tirx.ForKind.SERIAL:
        return _beside(stmt.body, statements)
    if isinstance(stmt, tirx.AttrStmt):
        return _beside(stmt.body, statements)
    if isinstance(stmt, tirx.IfThenElse) and stmt.else_case is None:
        return _beside(stmt.then_case, statements)
    raise OtherForm(f"its loop stands in a {type(stmt).__name__}")


# --- the block -------------------------------------------------------------------------------------------------------


def specialized(func: tirx.PrimFunc, old: tirx.SBlock, new: tirx.SBlock, thread: tirx.Var, threads: int) -> tirx.PrimFunc:
    """Return the function with a new block, and the producer's warpgroup behind its `threads`."""

    def replace(node):
        if isinstance(node, tirx.SBlock):
            return new if node.same_as(old) else None
        if binds_threads(node) and node.loop_var.same_as(thread):
            extent = tirx.IntImm("int32", threads + WARPGROUP)
            return tirx.For(node.loop_var, node.min, extent, node.kind, node.body, node.thread_binding, node.annotations)
        return None

    return func.with_body(ir_transform(func.body, None, replace, ["tirx.SBlock", "tirx.For"]))


def with_roles(block: tirx.SBlock, consumer, producer, thread, threads: int, registers: tuple[int, int]) -> tirx.SBlock:
    """Return the block of consumers, first so that their threads keep their numbers, and of a producer.

    `consumer(body)` and `producer(body)` return what they do, of the block's body without its attributes; `registers` are those
    of a thread of the producer and of a consumer.
    """
    attributes, body = [], block.body
    while isinstance(body, tirx.AttrStmt):
        attributes.append(body)
        body = body.body
    consume, produce = consumer(body), producer(body)
    if threads > WARPGROUP:  # two warpgroups have registers enough each
        produce = sequence(call(T.dec_max_nreg(registers[0])), produce)
        consume = sequence(call(T.inc_max_nreg(registers[1])), consume)
    body = tirx.IfThenElse(thread < threads, consume, produce)
    for attribute in reversed(attributes):
        body = tirx.AttrStmt(attribute.node, attribute.attr_key, attribute.value, body)
    annotations = {**block.annotations, "tl.launch_threads": [threads + WARPGROUP, 1, 1]}
    return with_body(block, body, list(block.alloc_buffers), annotations)


def in_place_of(stmt: tirx.Stmt, replaced: list) -> tirx.Stmt:
    """Return the statement with others in the place of some loops; `replaced` are pairs of an old and a new one."""

    def replace(node):
        return next((new for old, new in replaced if node.same_as(old)), None)

    return ir_transform(stmt, replace, lambda node: None, ["tirx.For"])


def way_to(stmt: tirx.Stmt, replaced: list) -> tirx.Stmt:
    """Return the ways to some loops with others in their place, nothing beside them, and variables of their own."""
    return _with_own_variables(_way_to(stmt, replaced))


def _way_to(stmt: tirx.Stmt, replaced: list) -> tirx.Stmt:
    """Return the ways, and bindings of variables beside them."""
    for old, new in replaced:
        if stmt.same_as(old):
            return new
    if isinstance(stmt, tirx.SeqStmt):
        old = [loop for loop, _ in replaced]
        kept = [child for child in stmt.seq if isinstance(child, tirx.Bind) or contains_any(child, old)]
        return sequence(*(child if isinstance(child, tirx.Bind) else _way_to(child, replaced) for child in kept))
    if isinstance(stmt, tirx.For):
        return tirx.For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, _way_to(stmt.body, replaced), step=stmt.step)
    if isinstance(stmt, tirx.AttrStmt):
        return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, _way_to(stmt.body, replaced))
    return when(stmt.condition, _way_to(stmt.then_case, replaced))


def _with_own_variables(stmt: tirx.Stmt) -> tirx.Stmt:
    """Return the statements with variables of their own: bound ones replaced by their values, those of loops renamed."""
    renamed = {}
    for node in nodes_of(stmt, lambda node: isinstance(node, tirx.For)):
        renamed[node.loop_var] = tirx.Var(node.loop_var.name, node.loop_var.dtype)
    values = renamed | {var: substitute(value, renamed) for var, value in bound_values(stmt).items()}

    def copy(node: tirx.Stmt) -> tirx.Stmt:
        if isinstance(node, tirx.SeqStmt):
            return sequence(*(copy(child) for child in node.seq if not isinstance(child, tirx.Bind)))
        if isinstance(node, tirx.For):
            bounds = (substitute(bound, values) for bound in (node.min, node.extent))
            body, annotations = copy(node.body), node.annotations
            return tirx.For(values[node.loop_var], *bounds, node.kind, body, annotations=annotations, step=node.step)
        if isinstance(node, tirx.AttrStmt):
            return tirx.AttrStmt(node.node, node.attr_key, node.value, copy(node.body))
        if isinstance(node, tirx.IfThenElse):
            otherwise = None if node.else_case is None else copy(node.else_case)
            return tirx.IfThenElse(substitute(node.condition, values), copy(node.then_case), otherwise)
        return substitute(node, values)

    return copy(stmt)

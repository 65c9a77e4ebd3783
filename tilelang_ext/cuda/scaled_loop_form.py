"""Which kernels are loops over K of fp8 products with scales, for `scaled_loop.py`, and how a tile of theirs is divided."""

from __future__ import annotations

from dataclasses import dataclass

from tilelang import language as T
from tvm import arith, tirx
from tvm.ir import Op, Range
from tvm.tirx.stmt_functor import substitute

from tilelang_ext.cuda.statements import (
    COPY,
    REGION,
    bound_values,
    contains,
    equal,
    flat,
    is_call,
    is_global,
    is_one,
    is_whole,
    is_written,
    is_zero,
    nodes_of,
    region_of,
    strides_of,
)
from tilelang_ext.marks import SCALED_PRODUCT

WARPGROUP = 128  # threads
BAND = 64  # rows of a product of a warpgroup
BLOCK_K = 128  # of a step: the bytes of a swizzled row of shared memory

_REGISTERS = 65536  # of an SM
_MAX_REGISTERS = 240  # of a thread
_OTHER_REGISTERS = 32  # of a consumer thread, for what is neither a sum nor a partial product
_PRODUCER_REGISTERS = {False: 24, True: 40}  # of a thread, by "the producer fetches factors"
_MAX_COLUMNS = 256  # of a product
_TMA_BYTES = 16  # what strides of a matrix in global memory are multiples of
_SYNCHRONIZATION = ("barrier", "sync", "tma_load", "cp_async", "wgmma", "tcgen05", "max_nreg")  # in names of operators


class OtherForm(Exception):
    """The kernel has another form; the message says which."""


@dataclass(frozen=True)
class Product:
    """What the mark says: C[i, j] += (A . B)[i, j] * group_a(i) * group_b(j) * whole_a(i) * whole_b(j)."""

    A: tirx.Buffer
    B: tirx.Buffer
    C: tirx.Buffer
    i: tirx.Var
    j: tirx.Var
    group_a: tirx.PrimExpr
    group_b: tirx.PrimExpr
    whole_a: tirx.PrimExpr
    whole_b: tirx.PrimExpr
    fast: bool

    @property
    def grouped(self) -> bool:
        """Whether a factor belongs to a step alone."""
        return not (is_one(self.group_a) and is_one(self.group_b))

    @property
    def in_unit(self) -> bool:
        """Whether the sums stay in the matrix unit."""
        return self.fast and not self.grouped


@dataclass(frozen=True)
class Kernel:
    """A kernel of the form: its block, the loop over K, the copies and the product of a step."""

    block: tirx.SBlock
    loop: tirx.For
    copies: tuple[tirx.Call, tirx.Call]  # of A and B
    product: Product
    total: tirx.Buffer  # what the marked T.gemm writes
    thread: tirx.Var
    threads: int
    num_stages: int

    @property
    def warpgroups(self) -> int:
        return self.threads // WARPGROUP

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread of the producer and of a consumer.

        The consumers take what the producer gives up of the block's registers, which are as many for each thread at first. They
        would wait for ever for one that is not there.
        """
        producer = _PRODUCER_REGISTERS[self.product.grouped]
        threads = self.threads + WARPGROUP
        block = _REGISTERS // threads // 8 * 8 * threads
        return producer, min((block - WARPGROUP * producer) // self.threads // 8 * 8, _MAX_REGISTERS)


@dataclass(frozen=True)
class Tiling:
    """How the consumers divide a tile: pieces of `rows` x `columns`, each one product; `in_flight` of them at a time."""

    policy: T.GemmWarpPolicy
    rows: int
    columns: int
    pieces: tuple[tuple[int, int], ...]  # first row and column
    in_flight: int


def is_marked(body: tirx.Stmt) -> bool:
    return bool(nodes_of(body, _has_mark))


def _has_mark(node) -> bool:
    return isinstance(node, (tirx.For, tirx.Call)) and SCALED_PRODUCT in (node.annotations or {})


def recognise(func: tirx.PrimFunc) -> Kernel:
    """Read a function as a kernel of the form; raises OtherForm."""
    blocks = nodes_of(func.body, lambda node: isinstance(node, tirx.SBlock) and node.name_hint == "tilelang_root")
    placeholders = nodes_of(func.body, lambda node: isinstance(node, tirx.Bind) and is_call(node.value, "tl.launch_thread_idx"))
    thread_loops = nodes_of(func.body, binds_threads)
    if len(blocks) != 1 or (not placeholders and not thread_loops):
        raise OtherForm("it is not the one launch of a function")
    [block] = blocks
    loops = nodes_of(block.body, lambda node: isinstance(node, tirx.For) and "num_stages" in node.annotations)
    if len(loops) != 1 or not is_marked(loops[0]):
        raise OtherForm("the product stands in no pipelined loop, or there are several such loops")
    [loop] = loops
    if placeholders:
        thread, launch = placeholders[0].var, block.annotations.get("tl.launch_threads", [WARPGROUP, 1, 1])
    else:
        thread, launch = thread_loops[-1].loop_var, [loop.extent for loop in reversed(thread_loops)]
    launch = [int(extent) for extent in launch]
    if launch[0] % WARPGROUP or launch[1:] != [1, 1]:
        raise OtherForm(f"its threads are no whole warpgroups: {launch}")
    copies, product, total = _step(loop)
    kernel = Kernel(block, loop, copies, product, total, thread, launch[0], int(loop.annotations["num_stages"]))
    _check_step(kernel)
    _check_others(kernel)
    return kernel


def binds_threads(node) -> bool:
    """Whether this is a loop over the threads of a block, as tilelang 0.1.14 writes them; the innermost is threadIdx.z."""
    return isinstance(node, tirx.For) and node.thread_binding is not None and "threadIdx" in node.thread_binding.thread_tag


def _step(loop: tirx.For) -> tuple[tuple[tirx.Call, tirx.Call], Product, tirx.Buffer]:
    """Read the body of the loop: two copies and one marked product, with the values of variables that it binds."""
    copies, marks, values = [], [], bound_values(loop.body)
    for stmt in flat(loop.body):
        node = stmt.value if isinstance(stmt, tirx.Evaluate) else stmt
        if _has_mark(node):
            if node.annotations[SCALED_PRODUCT]:
                marks.append(node)
        elif is_call(node, COPY):
            copies.append(substitute(node, values))
        elif not isinstance(node, tirx.Bind):
            raise OtherForm(f"there is more in its loop than copies of A and B and one product: {type(stmt).__name__}")
    if len(marks) != 1 or len(copies) != 2:
        raise OtherForm(f"its loop has {len(copies)} copies and {len(marks)} products of K-major tiles")
    A, B, C, i, j, *factors, fast = marks[0].annotations[SCALED_PRODUCT]
    for region in (A, B, C):
        if not is_whole(region):
            raise OtherForm(f"{region} is part of a buffer")
    factors = [substitute(factor, values) for factor in factors]
    product = Product(A.buffer, B.buffer, C.buffer, i, j, *factors, bool(int(fast)))
    by_target = {region_of(copy.args[1]).buffer.data: copy for copy in copies}
    if set(by_target) != {product.A.data, product.B.data}:
        raise OtherForm("its copies are not those of A and B")
    return (by_target[product.A.data], by_target[product.B.data]), product, region_of(marks[0].args[2]).buffer


def _check_step(kernel: Kernel) -> None:
    loop, product = kernel.loop, kernel.product
    if kernel.num_stages < 2 or loop.kind != tirx.ForKind.SERIAL or not is_zero(loop.min) or len(loop.annotations) != 1:
        raise OtherForm("its loop is not one of T.Pipelined with num_stages of 2 or more")
    if int(product.A.shape[1]) != BLOCK_K:
        raise OtherForm(f"a step is {product.A.shape[1]} of K, not {BLOCK_K}")
    for copy in kernel.copies:
        source, target = region_of(copy.args[0]), region_of(copy.args[1])
        if not is_global(source.buffer) or not is_whole(target) or len(target.buffer.shape) != 2:
            raise OtherForm(f"{target.buffer.name} is not copied from global memory as a whole")
        extents = [axis.extent for axis in source.region]
        wanted = [*(1 for _ in extents[2:]), *target.buffer.shape]
        if any(not equal(extent, want) for extent, want in zip(extents, wanted, strict=True)):
            raise OtherForm(f"{target.buffer.name} is a box that TMA does not copy")
        *strides, last = strides_of(source.buffer)
        if not equal(last, 1) or any(not equal(stride % _TMA_BYTES, 0) for stride in strides):
            raise OtherForm(f"rows of {source.buffer.name} are no multiple of {_TMA_BYTES} bytes apart")


def _check_others(kernel: Kernel) -> None:
    """The other statements run in the consumers alone: they may neither synchronize nor touch what the producer reads."""
    product = kernel.product
    read = _buffers_of_producer(kernel)
    private = {product.A.data, product.B.data, kernel.total.data}
    for stmt in _others(kernel.block.body, kernel.loop):
        for node in nodes_of(stmt, lambda node: isinstance(node, (tirx.Call, tirx.BufferLoad, tirx.BufferStore))):
            written = []
            if isinstance(node, tirx.Call):
                if isinstance(node.op, Op) and any(word in node.op.name for word in _SYNCHRONIZATION):
                    raise OtherForm(f"it calls {node.op.name} outside of the loop")
                if "barrier" in (node.annotations or {}):
                    raise OtherForm(f"it calls {node.op.name} with a barrier outside of the loop")
                written = [region_of(arg).buffer.data for arg in node.args if is_call(arg, REGION) and is_written(arg)]
            elif node.buffer.data in private:
                raise OtherForm(f"{node.buffer.name} is used outside of the loop")
            elif isinstance(node, tirx.BufferStore):
                written = [node.buffer.data]
            if any(data in read for data in written):
                raise OtherForm("it writes what the loop reads")
    layouts = kernel.block.annotations.get("layout_map", {})
    if any(data.same_as(other) for data in (*private, product.C.data) for other in layouts):
        raise OtherForm("it has a layout of its own for A, B or C")


def _buffers_of_producer(kernel: Kernel) -> set:
    """Return what the producer reads: the matrices, factors, and what bounds, conditions and indices depend on."""
    product, body = kernel.product, kernel.block.body
    values = bound_values(body)
    sources = [region_of(copy.args[0]) for copy in kernel.copies]
    expressions = [axis.min for source in sources for axis in source.region] + [product.group_a, product.group_b]
    for node in nodes_of(body, lambda node: isinstance(node, (tirx.For, tirx.IfThenElse)) and contains(node, kernel.loop)):
        expressions += [node.min, node.extent] if isinstance(node, tirx.For) else [node.condition]
    read = {source.buffer.data for source in sources}
    for expression in expressions:
        for load in nodes_of(substitute(expression, values), lambda node: isinstance(node, tirx.BufferLoad)):
            if not is_global(load.buffer):
                raise OtherForm(f"what it copies depends on {load.buffer.name}, which is not in global memory")
            read.add(load.buffer.data)
    return read


def _others(stmt: tirx.Stmt, loop: tirx.For) -> list[tirx.Stmt]:
    """Return the statements beside the way to the loop, which is made of sequences, serial loops, conditions and attributes."""
    if stmt.same_as(loop):
        return []
    if isinstance(stmt, tirx.SeqStmt):
        [inner] = [child for child in stmt.seq if contains(child, loop)]
        return [*(child for child in stmt.seq if not child.same_as(inner)), *_others(inner, loop)]
    if isinstance(stmt, tirx.AttrStmt) or (isinstance(stmt, tirx.For) and stmt.kind == tirx.ForKind.SERIAL):
        return _others(stmt.body, loop)
    if isinstance(stmt, tirx.IfThenElse) and stmt.else_case is None:
        return _others(stmt.then_case, loop)
    raise OtherForm(f"its loop stands in a {type(stmt).__name__}")


def tiling_of(kernel: Kernel) -> Tiling:
    """Choose the pieces of a tile: as wide as registers allow, with one group factor of B each; raises OtherForm."""
    product, warpgroups = kernel.product, kernel.warpgroups
    M, N = (int(extent) for extent in product.C.shape)
    by_rows = M % (BAND * warpgroups) == 0
    if not by_rows and (M != BAND or N % (8 * warpgroups)):
        raise OtherForm(f"a tile of {M} x {N} is not divided among {warpgroups} warpgroups")
    policy = T.GemmWarpPolicy.FullRow if by_rows else T.GemmWarpPolicy.FullCol
    rows, widest = (BAND * warpgroups, _MAX_COLUMNS) if by_rows else (BAND, _MAX_COLUMNS * warpgroups)
    sums, room = M * N // kernel.threads, kernel.registers[1] - _OTHER_REGISTERS
    if product.in_unit and sums <= room and widest >= N:
        return Tiling(policy, M, N, ((0, 0),), 1)
    halves = [N, N // 2, N // 4] if by_rows else [N]
    for columns in (size for size in halves if size % 8 == 0 and size <= widest):
        partial = rows * columns // kernel.threads
        pieces = tuple((row, column) for row in range(0, M, rows) for column in range(0, N, columns))
        factors = [group_factor_b(product, column, columns) for _, column in pieces]
        if sums + partial <= room and None not in factors:
            return Tiling(policy, rows, columns, pieces, 2 if sums + 2 * partial <= room else 1)
    raise OtherForm(f"sums and products of a tile of {M} x {N} need too many registers, or B's factors differ along a row")


def group_factor_b(product: Product, column: int, columns: int) -> tirx.PrimExpr | None:
    """Return B's group factor of these columns of the tile, None if they have several."""
    offset = tirx.Var("offset", "int32")
    analyzer = arith.Analyzer()
    analyzer.bind(offset, Range(0, columns))
    factor = analyzer.simplify(substitute(product.group_b, {product.j: column + offset}))
    return None if nodes_of(factor, lambda node: node.same_as(offset)) else factor

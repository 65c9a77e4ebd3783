"""Which kernels are loops over K of fp8 products with scales, for `scaled_loop.py`, and how a tile of theirs is divided."""

from __future__ import annotations

from dataclasses import dataclass

from tilelang import language as T
from tvm import arith, tirx
from tvm.ir import Range
from tvm.tirx.stmt_functor import substitute

from tilelang_ext.cuda.statements import (
    COPY,
    bound_values,
    equal,
    flat,
    is_call,
    is_global,
    is_one,
    is_whole,
    is_zero,
    nodes_of,
    region_of,
    strides_of,
)
from tilelang_ext.cuda.warp_roles import (
    WARPGROUP,
    OtherForm,
    check_beside,
    launch_of,
    read_by_producer,
    registers_of_consumer,
)
from tilelang_ext.marks import SCALED_PRODUCT

BAND = 64  # rows of a product of a warpgroup
BLOCK_K = 128  # of a step: the bytes of a swizzled row of shared memory

_OTHER_REGISTERS = 32  # of a consumer thread, for what is neither a sum nor a partial product
_PRODUCER_REGISTERS = {False: 24, True: 40}  # of a thread, by "the producer fetches factors"
_MAX_COLUMNS = 256  # of a product
_TMA_BYTES = 16  # what strides of a matrix in global memory are multiples of


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
        """Registers of a thread of the producer and of a consumer."""
        producer = _PRODUCER_REGISTERS[self.product.grouped]
        return producer, registers_of_consumer(self.threads, producer)


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
    block, thread, threads = launch_of(func)
    loops = nodes_of(block.body, lambda node: isinstance(node, tirx.For) and "num_stages" in node.annotations)
    if len(loops) != 1 or not is_marked(loops[0]):
        raise OtherForm("the product stands in no pipelined loop, or there are several such loops")
    [loop] = loops
    copies, product, total = _step(loop)
    kernel = Kernel(block, loop, copies, product, total, thread, threads, int(loop.annotations["num_stages"]))
    _check_step(kernel)
    _check_others(kernel)
    return kernel


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
    sources = [region_of(copy.args[0]) for copy in kernel.copies]
    read = read_by_producer(kernel.block, [kernel.loop], sources, [product.group_a, product.group_b])
    private = [product.A.data, product.B.data, kernel.total.data]
    check_beside(kernel.block, [kernel.loop], private, read)
    layouts = kernel.block.annotations.get("layout_map", {})
    if any(data.same_as(other) for data in (*private, product.C.data) for other in layouts):
        raise OtherForm("it has a layout of its own for A, B or C")


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

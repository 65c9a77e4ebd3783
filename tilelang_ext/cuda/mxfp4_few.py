"""Products of up to 16 tokens and MXFP4 weights by the matrix instructions of warps, for mxfp4_product.py.

    Before                              After
    total = A . (scale W)               sums of each warp = mxfp4_mma(A, W, scale);  total = the sum over warps

    T.pdl_trigger(); T.pdl_sync()       Mxfp4Mma product(A, W, scale); mxfp4_prefetch(W, scale, A); T.pdl_sync()
    total = A . (scale W)               sums of each warp = product.run<true>();  total = the sum over warps

A kernel that waits for the one before it (PDL) first asks for its operands in the L2 cache, where the other kernel's writes
are seen, and computes the addresses of its copies. It lets the next one begin only behind the wait, since blocks of three
kernels on an SM would not be spread evenly, and behind the first copies. The functions are in mxfp4_mma.h.
"""

from __future__ import annotations

from typing import NamedTuple

from tilelang import language as T
from tvm import tirx
from tvm.ir import Range
from tvm.tirx.stmt_functor import ir_transform, substitute

from tilelang_ext.cuda.mxfp4_form import Product, begins_at, device_call, first_of, rows_of, stride_of
from tilelang_ext.cuda.statements import bound_values, call, contains, is_call, nodes_of, parallel, sequence, shared, store
from tilelang_ext.cuda.warp_roles import WARP, OtherForm, in_place_of

_MAX_TOKENS = 16
_BAND = 16  # rows of weights of a product of a warp
_TOKEN_BYTES, _CODE_BYTES = 256, 64  # of 128 of K of a row
_BLOCK = 128  # of K
_SCALE_BYTES = 260  # of a row in shared memory
_WORD = 4
_WAIT, _TRIGGER = "tl.pdl_sync", "tl.pdl_trigger"
_THREADS_PER_SM = 1024  # with 64 registers each
_SHARED_BYTES_PER_SM, _RESERVED_BYTES = 228 * 1024, 1024  # the latter of each block


def takes(product: Product) -> bool:
    """Return whether a product is one for the matrix instructions of warps."""
    return product.M <= _MAX_TOKENS and str(product.A.buffer.dtype) == "bfloat16" and product.ids is None


def _with_values(product: Product, values: dict) -> Product:
    """Return the product free of variables that the kernel binds."""

    def of(region: tirx.BufferRegion) -> tirx.BufferRegion:
        axes = [
            Range.from_min_extent(*(substitute(tirx.convert(bound), values) for bound in (axis.min, axis.extent)))
            for axis in region.region
        ]
        return tirx.BufferRegion(region.buffer, axes)

    K = substitute(tirx.convert(product.K), values)
    return product._replace(A=of(product.A), W=of(product.W), scale=of(product.scale), K=K)


class Split(NamedTuple):
    """How the warps of a block divide a product, and the shared memory they take for it. As in mxfp4_mma.h."""

    tokens: int
    bands: int  # of 16 rows of weights, of a warp
    warps_of_rows: int
    warps: int
    stages: int  # of 128 of K, of a warp

    @property
    def rows(self) -> int:
        return self.bands * _BAND

    @property
    def own(self) -> int:
        """Bytes of a warp."""
        return self.stages * (self.tokens * _TOKEN_BYTES + self.rows * _CODE_BYTES)

    @property
    def bytes(self) -> int:
        return self.warps * self.own + self.warps_of_rows * self.rows * _SCALE_BYTES


def split_of(product: Product, threads: int, room: int, waits: bool) -> Split:
    """Return how the warps of a block divide a product, of a kernel that waits for another or does not.

    Up to three stages leave room for another block, of the next kernel if this one waits. One that does not wait, and has rows
    enough for an SM, takes all of it for two stages.
    """
    N, warps = product.N, threads // WARP
    bands = 2 if N % (2 * _BAND) == 0 and warps >= N // (2 * _BAND) else 1
    groups = N // (_BAND * bands)
    if N % _BAND or warps % groups:
        raise OtherForm(f"{N} rows of weights are not divided among {threads} threads")
    one, two, three = (Split(product.M, bands, groups, warps, stages) for stages in (1, 2, 3))

    def shares(split: Split) -> bool:
        return split.bytes <= room and _blocks_that_fit(split) >= 2

    takes_all = bands == 2 and not waits and two.bytes <= room
    split = three if shares(three) else two if shares(two) or takes_all else one
    if split.bytes > room:
        raise OtherForm("the block has too little shared memory")
    return split


def _blocks_that_fit(split: Split) -> int:
    return _SHARED_BYTES_PER_SM // (split.bytes + _RESERVED_BYTES)


def _arguments(product: Product) -> list:
    operands = (product.A, product.W, product.scale)
    return [*map(first_of, operands), *map(stride_of, operands), rows_of(product.A), rows_of(product.scale), product.K]


def _parameters(product: Product, split: Split, threads: int) -> str:
    scales_in_words = str(begins_at(product.scale, _WORD)).lower()
    return f"<{product.M}, {product.N}, {threads}, {scales_in_words}, {split.stages}>"


def _total(product: Product, split: Split, staged: tirx.Buffer) -> tirx.Stmt:
    """Return the statement that sums what warps have computed."""

    def total(i, j):
        first = j // split.rows * (split.own // 4) + i * (split.rows + 4) + j % split.rows
        parts = range(0, split.warps, split.warps_of_rows)
        return sum((staged[first + part * (split.own // 4)] for part in parts[1:]), staged[first])

    return parallel((product.M, product.N), lambda i, j: store(product.total, total(i, j), i, j))


def waits(stmt: tirx.Stmt) -> bool:
    """Whether a kernel waits for the one before it."""
    return bool(nodes_of(stmt, lambda node: _is_effect(node, _WAIT)))


def multiplied(stmt: tirx.Stmt, loops: list, products: list[Product], splits: list[Split], threads: int) -> tuple:
    """Return the statement with products in the place of their loops, and the shared memory that they take.

    Before the wait for the kernel before it, a kernel prefetches what it can, and declares products that it computes once.
    """
    staged = shared((max(split.bytes for split in splits) // 4,), "float32", "staged")
    names, declared = [f"product_{i}" for i in range(len(loops))], []
    triggering = set()  # the products that let the next kernel begin
    around = [*nodes_of(stmt, lambda node: isinstance(node, (tirx.For, tirx.While)))]
    inner = {node.loop_var for node in around if isinstance(node, tirx.For)}
    values = bound_values(stmt)

    def is_once(loop: tirx.For) -> bool:
        return not any(contains(other, loop) for other in around if not other.same_as(loop))

    def is_known(*regions: tirx.BufferRegion) -> bool:
        bounds = [bound for region in regions for axis in region.region for bound in (axis.min, axis.extent)]
        return not any(nodes_of(bound, lambda node: node in inner or isinstance(node, tirx.BufferLoad)) for bound in bounds)

    def prefetch(function: str, region: tirx.BufferRegion, rows: int) -> list[tirx.Stmt]:
        arguments = first_of(region), stride_of(region), rows_of(region), region.region[-1].extent * _bytes_of(region)
        return [device_call(f"{function}<{rows}, {threads}>", *arguments)] if is_known(region) else []

    def before_wait(behind: list) -> list[tirx.Stmt]:
        declarations, asked = [], []
        for loop, name, product, split in zip(loops, names, products, splits, strict=True):
            product = _with_values(product, values)
            for region in (product.W, product.scale):
                asked += prefetch("mxfp4_prefetch", region, product.N)
            asked += prefetch("mxfp4_prefetch_part", product.A, product.M)
            is_ours = name not in declared and any(contains(other, loop) for other in behind)
            if is_ours and is_once(loop) and is_known(product.A, product.W, product.scale):
                kind = f"Mxfp4Mma{_parameters(product, split, threads)}"
                declarations.append(device_call(f"{kind} {name}", *_arguments(product)))
                declared.append(name)
        return [*declarations, *asked]

    def waiting(node):
        stmts = list(node.seq) if isinstance(node, tirx.SeqStmt) else []
        at = [i for i, stmt in enumerate(stmts) if _is_effect(stmt, _WAIT)]
        if not at:
            return None
        before, sync, behind = stmts[: at[0]], stmts[at[0]], stmts[at[0] + 1 :]
        triggers = [stmt for stmt in before if _is_effect(stmt, _TRIGGER)]
        before = [stmt for stmt in before if not _is_effect(stmt, _TRIGGER)]
        before += before_wait(behind)
        if triggers and declared:
            triggering.add(declared[0])
            triggers = []
        return sequence(*before, sync, *triggers, *behind)

    stmt = ir_transform(stmt, None, waiting, ["tirx.SeqStmt"])
    pairs = []
    for loop, name, product, split in zip(loops, names, products, splits, strict=True):
        place = T.access_ptr(staged, "w")
        if name in declared:
            run = call(T.call_extern("handle", f"{name}.run<true>" if name in triggering else f"{name}.run", place))
        else:
            run = device_call(f"mxfp4_mma{_parameters(product, split, threads)}", place, *_arguments(product))
        pairs.append((loop, product.completed(sequence(run, _total(product, split, staged)))))
    return in_place_of(stmt, pairs), staged


def _bytes_of(region: tirx.BufferRegion) -> int:
    return region.buffer.dtype.bits // 8


def _is_effect(stmt, name: str) -> bool:
    return isinstance(stmt, tirx.Evaluate) and is_call(stmt.value, name)


def blocks_per_sm(splits: list[Split], threads: int) -> int:
    """Return how many blocks an SM should hold: those of the next kernel too, which waits in the meantime."""
    return max(1, min(_THREADS_PER_SM // threads, *map(_blocks_that_fit, splits)))

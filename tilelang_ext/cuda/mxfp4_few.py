"""Products of up to 16 tokens and MXFP4 weights by the matrix instructions of warps, for mxfp4_product.py.

    Before                       After
    total = A . (scale W)        sums[part, i, j] = mxfp4_mma(A, W, scale);  total[i, j] = sum of sums[:, i, j]
    T.pdl_sync()                 mxfp4_prefetch(W, scale); T.pdl_sync()

A kernel that waits for the one before it (PDL) first asks for weights and scales in the L2 cache, where the other kernel's
writes would be seen. The functions are in mxfp4_mma.h.
"""

from __future__ import annotations

from tilelang import language as T
from tvm import tirx
from tvm.ir import Range
from tvm.tirx.stmt_functor import ir_transform, substitute

from tilelang_ext.cuda.mxfp4_form import Product, device_call, first_of, rows_of, stride_of
from tilelang_ext.cuda.statements import bound_values, is_call, nodes_of, parallel, sequence, shared, store
from tilelang_ext.cuda.warp_roles import WARP, OtherForm

_MAX_TOKENS = 16
_BAND = 16  # rows of weights of a product of a warp
_MMA_TOKENS = 8  # of a product of a warp
_MANY_THREADS = 512  # two blocks of which have 64 registers a thread


def takes(product: Product) -> bool:
    """Return whether a product is one for the matrix instructions of warps."""
    return product.M <= _MAX_TOKENS and str(product.A.buffer.dtype) == "bfloat16" and product.ids is None


def _with_values(product: Product, values: dict) -> Product:
    """Return the product with regions free of variables that the kernel binds."""

    def of(region: tirx.BufferRegion) -> tirx.BufferRegion:
        axes = [Range.from_min_extent(substitute(tirx.convert(axis.min), values), axis.extent) for axis in region.region]
        return tirx.BufferRegion(region.buffer, axes)

    return product._replace(A=of(product.A), W=of(product.W), scale=of(product.scale))


def multiply(product: Product, threads: int, room: int) -> tuple[tirx.Stmt, tirx.Buffer]:
    """Return the statement that computes a product, and a buffer of shared memory, of which `room` bytes are left."""
    M, N, warps = product.M, product.N, threads // WARP
    bands = 2 if N % (2 * _BAND) == 0 and warps >= N // (2 * _BAND) else 1
    groups = N // (_BAND * bands)
    if N % _BAND or warps % groups:
        raise OtherForm(f"{N} rows of weights are not divided among {threads} threads")
    parts = warps // groups
    if parts * M * N * 4 > room:
        raise OtherForm("the block has too little shared memory")
    sums = shared((parts, M, N), "float32", "sums")
    operands = (product.A, product.W, product.scale)
    arguments = [*map(first_of, operands), *map(stride_of, operands), rows_of(product.A), rows_of(product.scale), product.K]
    function = device_call(f"mxfp4_mma<{M}, {N}, {threads}>", T.access_ptr(sums, "w"), *arguments)

    def total(i, j):
        value = sums[0, i, j]
        for part in range(1, parts):
            value = value + sums[part, i, j]
        return value

    return sequence(function, parallel((M, N), lambda i, j: store(product.total, total(i, j), i, j))), sums


def with_prefetch(stmt: tirx.Stmt, products: list[Product], threads: int) -> tirx.Stmt:
    """Return the statement with the weights of a block prefetched before it waits for the kernel before it."""
    inner = {node.loop_var for node in nodes_of(stmt, lambda node: isinstance(node, tirx.For))}
    products = [_with_values(product, bound_values(stmt)) for product in products]

    def is_known(product: Product) -> bool:
        bounds = [axis.min for region in (product.W, product.scale) for axis in region.region]
        return not any(nodes_of(bound, lambda node: node in inner or isinstance(node, tirx.BufferLoad)) for bound in bounds)

    def prefetch(region: tirx.BufferRegion, rows: int) -> tirx.Stmt:
        arguments = first_of(region), stride_of(region), rows_of(region), region.region[-1].extent
        return device_call(f"mxfp4_prefetch<{rows}, {threads}>", *arguments)

    def waits(node):
        if not isinstance(node, tirx.Evaluate) or not is_call(node.value, "tl.pdl_sync"):
            return None
        known = [product for product in products if is_known(product)]
        read = [(region, product.N) for product in known for region in (product.W, product.scale)]
        return sequence(*(prefetch(*one) for one in read), node)

    return ir_transform(stmt, None, waits, ["tirx.Evaluate"])


def blocks_per_sm(products: list[Product], threads: int) -> int:
    """Return how many blocks an SM should hold: for one product of a warp, the compiler takes a few registers too many."""
    narrow = all(product.M <= _MMA_TOKENS and product.N == _BAND for product in products)
    return 2 if narrow and threads == _MANY_THREADS else 1

"""Products of tokens and MXFP4 weights on Hopper: one device function for all of K, weights decoded in registers.

    Before  for t in serial(K / step), BLOCK_SCALED [total, A, None, W, scale, K]: decode a step to shared memory, multiply
    After   up to 16 rows of A      sums[split, i, j] = mxfp4_mma(A, W, scale);  total[i, j] = sum of sums[:, i, j]
            else                    total = mxfp4_wgmma(A, W, scale), with the layout that the instruction leaves

The mark of `language.block_scaled` says what a loop computes. Weights are the left operand of the matrix unit, so that what a
thread has decoded goes there from registers, and C comes out transposed: `total` gets that layout, and layout inference gives
it to what copies `total`. The functions are in mxfp4_product.h. A loop of another form stays as it is, with the reason in the
log of level INFO. Runs before every other pass, since no pass keeps the buffers and variables of the mark up to date.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import tilelang
from tilelang import language as T
from tilelang.cuda.target import target_is_hopper
from tvm import IRModule, tirx
from tvm.target import Target
from tvm.tirx.stmt_functor import ir_transform

from tilelang_ext.cuda.mxfp4_loop import product_of
from tilelang_ext.cuda.statements import (
    call,
    contains,
    equal,
    fragment,
    is_call,
    is_global,
    nodes_of,
    parallel,
    sequence,
    shared,
    store,
    strides_of,
    with_body,
)
from tilelang_ext.formats import MX_GROUP
from tilelang_ext.marks import BLOCK_SCALED

_NAMESPACE = "tilelang_ext"
_HEADER = Path(__file__).with_name("mxfp4_product.h")
_TYPES = {"bfloat16": "kBFloat16", "float8_e4m3fn": "kFloat8_e4m3", "float8_e5m2": "kFloat8_e5m2"}  # of A, for the matrix unit
_WARP, _WARPGROUP = 32, 128  # threads
_BAND = 64  # rows of weights of a product of a warpgroup
_MMA_BAND = 16  # of a warp
_BLOCK_K = 128  # K is a multiple
_ALIGNMENT = 16  # bytes
_MMA_TOKENS = 16  # at most
_MAX_TOKENS = 256  # of a product of a warpgroup
_SUM_REGISTERS = {1: 128, 2: 128, 3: 64, 4: 32}  # of a thread, by warpgroups
_SHARED_BYTES = 227 * 1024  # of a block
_MIN_STAGES, _MAX_STAGES = 4, 8
_SLACK = 2048  # bytes, to align stages and for barriers

_log = logging.getLogger(__name__)


class _Other(Exception):
    """The product has another form; its message says which."""


class _Product(NamedTuple):
    """What the mark says: total[i, j] += sum over k of A[i, k] * (scale W)[j, k]; regions in global memory."""

    total: tirx.Buffer
    A: tirx.BufferRegion
    W: tirx.BufferRegion
    scale: tirx.BufferRegion
    K: tirx.PrimExpr

    @property
    def M(self) -> int:
        return int(self.total.shape[0])

    @property
    def N(self) -> int:
        return int(self.total.shape[1])


def lower_mxfp4_products(mod: IRModule, target: Target) -> IRModule:
    """Replace the marked loops of a module by calls of the functions above, for Hopper."""
    config = tilelang.transform.get_pass_context().config
    if not target_is_hopper(target) or config.get("tl.disable_wgmma", False):
        return mod
    functions = {var: _lower_function(func) if isinstance(func, tirx.PrimFunc) else func for var, func in mod.functions.items()}
    return IRModule(functions, attrs=mod.attrs)


def _lower_function(func: tirx.PrimFunc) -> tirx.PrimFunc:
    blocks = nodes_of(func.body, lambda node: isinstance(node, tirx.SBlock) and node.name_hint == "tilelang_root")
    if len(blocks) != 1:
        return func
    [block] = blocks
    products = {}
    for loop in nodes_of(block.body, lambda node: isinstance(node, tirx.For)):
        of_loop = product_of(loop, block)
        if of_loop is not None or BLOCK_SCALED in (loop.annotations or {}):
            products[loop] = of_loop
    replaced, allocated, layouts = {}, [], {}
    for loop, of_loop in products.items():
        try:
            product = _recognise(loop) if of_loop is None else _checked(_Product(_total(of_loop.C), *of_loop[1:]))
            threads, shared_bytes = _threads(func.body, block, loop), _shared_bytes(block, list(products))
            statement, buffers, layout = _replacement(product, threads, shared_bytes)
        except _Other as reason:
            name = func.attrs.get("global_symbol", "kernel") if func.attrs else "kernel"
            _log.info("%s: MXFP4 weights are decoded to shared memory: %s", name, reason)
            continue
        if of_loop is not None:
            statement = sequence(statement, _add(of_loop.C, product.total))
            buffers = [*buffers, product.total]
        replaced[loop] = statement
        allocated += buffers
        layouts |= layout
    if not replaced:
        return func
    return func.with_body(_rewrite(func.body, block, replaced, allocated, layouts))


def _recognise(loop: tirx.For) -> _Product:
    total, A, scale_a, W, scale, K, _ = loop.annotations[BLOCK_SCALED]
    if str(A.buffer.dtype) not in _TYPES or str(W.buffer.dtype) != "uint8":
        raise _Other(f"A is {A.buffer.dtype}")
    if scale_a is not None:
        raise _Other("A has scales along K")
    return _checked(_Product(total.buffer, A, W, scale, K))


def _checked(product: _Product) -> _Product:
    """Return a product whose operands the functions can read."""
    _, A, W, scale, K = product
    for region in (A, W, scale):
        if not is_global(region.buffer):
            raise _Other(f"{region.buffer.name} is in scope {region.buffer.scope()}")
    if not _is_multiple(K, _BLOCK_K):
        raise _Other(f"K is {K}, which may be no multiple of {_BLOCK_K}")
    for region, alignment in ((A, _ALIGNMENT), (W, _ALIGNMENT), (scale, _BLOCK_K // MX_GROUP)):
        size = region.buffer.dtype.bits // 8
        strides = strides_of(region.buffer)
        first = region.region[-1].min
        if not equal(strides[-1], 1) or not all(_is_multiple(stride * size, alignment) for stride in (*strides[:-1], first)):
            raise _Other(f"rows of {region.buffer.name} do not begin at multiples of {alignment} bytes")
    return product


def _threads(body: tirx.Stmt, block: tirx.SBlock, loop: tirx.For) -> int:
    """Return the threads of the block, all of which come to the loop together."""
    launches = nodes_of(body, lambda node: isinstance(node, tirx.Bind) and is_call(node.value, "tl.launch_thread_idx"))
    thread_loops = nodes_of(body, _binds_threads)
    if launches:
        threads, launch = [bind.var for bind in launches], block.annotations.get("tl.launch_threads", [_WARPGROUP, 1, 1])
    else:
        threads, launch = [one.loop_var for one in thread_loops], [one.extent for one in reversed(thread_loops)]
    extents = [int(extent) for extent in launch]
    if extents[1:] not in ([], [1, 1]):
        raise _Other(f"the block has threads {extents}")
    for node in nodes_of(block.body, lambda node: isinstance(node, (tirx.For, tirx.IfThenElse))):
        if not node.same_as(loop) and contains(node, loop):
            controls = (node.condition,) if isinstance(node, tirx.IfThenElse) else (node.min, node.extent)
            kind = node.kind if isinstance(node, tirx.For) else tirx.ForKind.SERIAL
            if kind != tirx.ForKind.SERIAL or any(_uses(control, threads) for control in controls):
                raise _Other("not all threads come to it together")
    return extents[0]


def _binds_threads(node) -> bool:
    """Whether this is a loop over the threads of a block, as tilelang 0.1.14 writes them; the innermost comes first."""
    return isinstance(node, tirx.For) and node.thread_binding is not None and "threadIdx" in node.thread_binding.thread_tag


def _shared_bytes(block: tirx.SBlock, loops: list) -> int:
    """Return the shared memory that is left beside buffers which stay."""
    own = {buffer for one in loops for buffer in _buffers(one)}
    others = [buffer for buffer in block.alloc_buffers if buffer.scope().startswith("shared") and buffer.data not in own]
    size = sum(_size(buffer) for buffer in others)
    return _SHARED_BYTES - size - 1024 * len(others)


def _size(buffer: tirx.Buffer) -> int:
    elements = 1
    for extent in buffer.shape:
        elements *= int(extent)
    return -(-elements * buffer.dtype.bits // 8)


def _replacement(product: _Product, threads: int, shared_bytes: int):
    """Return (statement, buffers it needs, layouts of fragments)."""
    dtype = str(product.A.buffer.dtype)
    if dtype == "bfloat16" and product.M <= _MMA_TOKENS:
        return _mma(product, threads, shared_bytes)
    return _wgmma(product, threads, shared_bytes, dtype)


def _mma(product: _Product, threads: int, shared_bytes: int):
    M, N, warps = product.M, product.N, threads // _WARP
    bands = 2 if N % (2 * _MMA_BAND) == 0 and warps >= N // (2 * _MMA_BAND) else 1
    groups = N // (_MMA_BAND * bands)
    if threads % _WARP or N % _MMA_BAND or warps % groups:
        raise _Other(f"{N} rows of weights are not divided among {threads} threads")
    splits = warps // groups
    if splits * M * N * 4 > shared_bytes:
        raise _Other("the block has too little shared memory")
    sums = shared((splits, M, N), "float32", "sums")
    function = _call(f"mxfp4_mma<{M}, {N}, {threads}>", product, T.access_ptr(sums, "w"))

    def total(i, j):
        value = sums[0, i, j]
        for split in range(1, splits):
            value = value + sums[split, i, j]
        return value

    return sequence(function, parallel((M, N), lambda i, j: store(product.total, total(i, j), i, j))), [sums], {}


def _wgmma(product: _Product, threads: int, shared_bytes: int, dtype: str):
    M, N, warpgroups = product.M, product.N, threads // _WARPGROUP
    if threads % _WARPGROUP or warpgroups not in _SUM_REGISTERS or N % (_BAND * warpgroups) or M % 8 or M > _MAX_TOKENS:
        raise _Other(f"a tile of {M} x {N} is not divided among {threads} threads")
    bands = N // (_BAND * warpgroups)
    if bands * M // 2 > _SUM_REGISTERS[warpgroups]:
        raise _Other(f"sums of a tile of {M} x {N} do not fit in the registers of {threads} threads")
    row_bytes = 32 + 2 if dtype == "bfloat16" else 80 + 4  # of weights and scales in a stage, as in the header
    stage_bytes = M * 128 + N * row_bytes
    stages = min(_MAX_STAGES, (shared_bytes - _SLACK) // stage_bytes)
    if dtype == "bfloat16":
        stages -= stages % 2  # two share the words of scales
    if stages < _MIN_STAGES:
        raise _Other(f"stages of a tile of {M} x {N} do not fit in shared memory")
    workspace = shared((stages * stage_bytes + _SLACK,), "uint8", "stages")
    function = f"mxfp4_wgmma<tl::DataType::{_TYPES[dtype]}, {M}, {N}, {threads}, {stages}>"
    statement = _call(function, product, T.address_of(product.total[0, 0]), T.access_ptr(workspace, "rw"))

    def place(i, j):
        """Return the thread and the register that hold an element of the tile."""
        row = j % _BAND
        thread = j // (_BAND * bands) * _WARPGROUP + row // 16 * 32 + row % 16 // 2 * 4 + i % 8 // 2
        return thread, j // _BAND % bands * (M // 2) + i // 8 * 4 + i % 2 * 2 + row % 2

    return statement, [workspace], {product.total.data: T.Fragment((M, N), forward_fn=place)}


def _call(function: str, product: _Product, *results) -> tirx.Stmt:
    operands = (product.A, product.W, product.scale)
    # Not T.address_of: StorageRewrite takes a factor of its index for a number of lanes, of which there are at most 32767.
    first = [T.access_ptr(region.buffer[tuple(axis.min for axis in region.region)], "r") for region in operands]
    strides = [T.cast(strides_of(region.buffer)[-2] * (region.buffer.dtype.bits // 8), "int64") for region in operands]
    rows = [region.buffer.shape[-2] - region.region[-2].min for region in operands[:2]]
    return call(T.call_extern("handle", f"{_NAMESPACE}::{function}", *results, *first, *strides, *rows, product.K))


def _rewrite(body: tirx.Stmt, root: tirx.SBlock, replaced: dict, allocated: list, layouts: dict) -> tirx.Stmt:
    def replace(node):
        return next((statement for loop, statement in replaced.items() if node.same_as(loop)), None)

    def allocate(node):
        if not isinstance(node, tirx.SBlock) or node.name_hint != root.name_hint:
            return None
        used = _buffers(node.body)
        buffers = [buffer for buffer in node.alloc_buffers if buffer.data in used] + allocated
        annotations = dict(node.annotations)
        if layouts:
            annotations["layout_map"] = dict(annotations.get("layout_map", {})) | layouts
        text = tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_c", tirx.StringImm(_HEADER.read_text()), node.body)
        return with_body(node, text, buffers, annotations)

    return ir_transform(body, replace, allocate, ["tirx.For", "tirx.SBlock"])


def _total(C: tirx.Buffer) -> tirx.Buffer:
    return fragment(tuple(C.shape), "total")


def _add(C: tirx.Buffer, total: tirx.Buffer) -> tirx.Stmt:
    return parallel(C.shape, lambda i, j: store(C, C[i, j] + total[i, j], i, j))


def _buffers(stmt: tirx.Stmt) -> set:
    """Return the data of the buffers that a statement names."""
    return set(nodes_of(stmt, lambda node: isinstance(node, tirx.Var))) | {
        node.buffer.data for node in nodes_of(stmt, lambda node: isinstance(node, (tirx.BufferLoad, tirx.BufferStore)))
    }


def _uses(expression, variables: list) -> bool:
    return bool(nodes_of(expression, lambda node: any(node.same_as(variable) for variable in variables)))


def _is_multiple(value, of: int) -> bool:
    return equal(tirx.convert(value) % of, 0)

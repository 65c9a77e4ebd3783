"""Products of tokens and MXFP4 weights on Hopper: one device function for all of K, weights decoded in registers.

    Before                   for t in serial(K / step), BLOCK_SCALED [total, A, None, W, scale, K]: decode a step, multiply
    After, up to 16 tokens   products of warps, see mxfp4_few.py; or as below, if rows fill what warpgroups multiply
    else                     consumers and a producer, see mxfp4_roles.py

The mark of `language.block_scaled` says what a loop computes. Weights are the left operand of the matrix unit, so that what a
thread has decoded goes there from registers, and C comes out transposed: `total` gets that layout, and layout inference gives
it to what copies `total`. A loop of another form stays as it is, with the reason in the log of level INFO. Runs before every
other pass, since no pass keeps the buffers and variables of the mark up to date.
"""

from __future__ import annotations

import logging
from pathlib import Path

import tilelang
from tilelang.cuda.target import target_is_hopper
from tvm import IRModule, tirx
from tvm.target import Target
from tvm.tirx.stmt_functor import ir_transform

from tilelang_ext.cuda import mxfp4_few, mxfp4_loop, mxfp4_roles
from tilelang_ext.cuda.column_pairs import with_pairs_in_registers
from tilelang_ext.cuda.mxfp4_form import Product, checked
from tilelang_ext.cuda.statements import contains, nodes_of, with_body
from tilelang_ext.cuda.warp_roles import (
    WARPGROUP,
    OtherForm,
    check_beside,
    launch_of,
    read_by_producer,
    specialized,
)
from tilelang_ext.marks import BLOCK_SCALED

_HEADERS = ("mxfp4_device.h", "mxfp4_decode.h", "mxfp4_mma.h", "mxfp4_wgmma.h")
_SHARED_BYTES = 227 * 1024  # of a block
_BLOCKS_PER_SM = "tl.min_blocks_per_sm"  # an attribute of upstream's
_ROLES_TURNED_OFF_BY = ("tl.disable_warp_specialized", "tl.disable_tma_lower")

_log = logging.getLogger(__name__)


def lower_mxfp4_products(mod: IRModule, target: Target) -> IRModule:
    """Replace the marked loops of a module by calls of the functions above, for Hopper."""
    config = tilelang.transform.get_pass_context().config
    if not target_is_hopper(target) or config.get("tl.disable_wgmma", False):
        return mod
    functions = {var: _lower_function(func) if isinstance(func, tirx.PrimFunc) else func for var, func in mod.functions.items()}
    return IRModule(functions, attrs=mod.attrs)


def _lower_function(func: tirx.PrimFunc) -> tirx.PrimFunc:
    try:
        block, thread, threads = launch_of(func)
    except OtherForm:
        return func
    products = {
        loop: mxfp4_loop.product_of(loop, block) for loop in nodes_of(block.body, lambda node: isinstance(node, tirx.For))
    }
    whole = [loop for loop, product in products.items() if product is not None]
    marked = [
        loop for loop in products if BLOCK_SCALED in (loop.annotations or {}) and not any(contains(one, loop) for one in whole)
    ]
    if not whole and not marked:
        return func
    reasons = []
    try:
        products = [(loop, products[loop]) for loop in whole] + [(loop, _recognised(loop)) for loop in marked]
        _check_threads(block, [loop for loop, _ in products], thread)
        for few in _forms([product for _, product in products], threads):
            try:
                own = [(loop, checked(product, 1 if few else mxfp4_roles.groups_of(product))) for loop, product in products]
                return _with_mma(func, block, own, threads) if few else _with_roles(func, block, own, thread, threads)
            except OtherForm as reason:
                reasons.append(reason)
    except OtherForm as reason:
        reasons.append(reason)
    name = func.attrs.get("global_symbol", "kernel") if func.attrs else "kernel"
    _log.info("%s: MXFP4 weights are decoded to shared memory: %s", name, "; ".join(map(str, reasons)))
    return func


def _forms(products: list[Product], threads: int) -> list[bool]:
    """Return whether to try products of warps, of few tokens: first or last, where rows fill what warpgroups multiply."""
    if not all(mxfp4_few.takes(product) for product in products):
        return [False]
    fills = all(product.N % (mxfp4_roles.BAND * (threads // WARPGROUP)) == 0 for product in products)
    return [False, True] if fills else [True]


def _recognised(loop: tirx.For) -> Product:
    total, A, scale_a, W, scale, K, _ = loop.annotations[BLOCK_SCALED]
    if str(W.buffer.dtype) != "uint8":
        raise OtherForm(f"W is {W.buffer.dtype}")
    if scale_a is not None:
        raise OtherForm("A has scales along K")
    return Product(total.buffer, A, W, scale, K)


def _check_threads(block: tirx.SBlock, loops: list, thread: tirx.Var) -> None:
    """Check that all threads of the block come to the loops together."""

    def uses_thread(expression) -> bool:
        return bool(nodes_of(expression, lambda node: node.same_as(thread)))

    for node in nodes_of(block.body, lambda node: isinstance(node, (tirx.For, tirx.IfThenElse))):
        if any(not node.same_as(loop) and contains(node, loop) for loop in loops):
            controls = (node.condition,) if isinstance(node, tirx.IfThenElse) else (node.min, node.extent)
            kind = node.kind if isinstance(node, tirx.For) else tirx.ForKind.SERIAL
            if kind != tirx.ForKind.SERIAL or any(uses_thread(control) for control in controls):
                raise OtherForm("not all threads come to it together")


def _with_mma(func: tirx.PrimFunc, block: tirx.SBlock, products: list, threads: int) -> tirx.PrimFunc:
    room, waits = _shared_bytes(block, [loop for loop, _ in products]), mxfp4_few.waits(block.body)
    own = [product for _, product in products]
    splits = [mxfp4_few.split_of(product, threads, room, waits) for product in own]
    body, staged = mxfp4_few.multiplied(block.body, [loop for loop, _ in products], own, splits, threads)
    if not _has_blocks_per_sm(func):
        body = _with_blocks_per_sm(body, mxfp4_few.blocks_per_sm(splits, threads))
    new = _finished(with_body(block, body, [*block.alloc_buffers, staged, *_totals(products)], dict(block.annotations)))
    return func.with_body(ir_transform(func.body, None, lambda node: new if node.same_as(block) else None, ["tirx.SBlock"]))


def _with_roles(func: tirx.PrimFunc, block: tirx.SBlock, products: list, thread, threads: int) -> tirx.PrimFunc:
    config = tilelang.transform.get_pass_context().config
    if any(config.get(key, False) for key in _ROLES_TURNED_OFF_BY):
        raise OtherForm("warp specialization or TMA are turned off")
    loops, own = [loop for loop, _ in products], [product for _, product in products]
    tile = mxfp4_roles.tile_of(own, threads)
    sources = [region for product in own for region in (product.A, product.W, product.scale, product.ids) if region is not None]
    check_beside(block, loops, [], read_by_producer(block, loops, sources, []))
    results = [buffer for product in own for buffer in (product.total, product.added_to) if buffer is not None]
    whole, block = block, with_pairs_in_registers(block, results, tile.place)
    room = _shared_bytes(block, loops)
    blocks = 1 if _has_blocks_per_sm(func) else mxfp4_roles.blocks_per_sm(tile, threads, room)
    new = mxfp4_roles.specialize(block, thread, threads, tile, products, room, blocks)
    body = _with_blocks_per_sm(new.body, blocks)
    new = _finished(with_body(new, body, [*new.alloc_buffers, *_totals(products)], dict(new.annotations)))
    return specialized(func, whole, new, thread, threads)


def _has_blocks_per_sm(func: tirx.PrimFunc) -> bool:
    """Whether the kernel says how many blocks an SM should hold."""
    return bool(nodes_of(func.body, lambda node: isinstance(node, tirx.AttrStmt) and node.attr_key == _BLOCKS_PER_SM))


def _with_blocks_per_sm(body: tirx.Stmt, blocks: int) -> tirx.Stmt:
    return body if blocks == 1 else tirx.AttrStmt(tirx.IntImm("int32", 0), _BLOCKS_PER_SM, tirx.IntImm("int32", blocks), body)


# --- the block -------------------------------------------------------------------------------------------------------


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


def _totals(products: list) -> list[tirx.Buffer]:
    """Return the totals that are no buffers of the kernel's."""
    return [product.total for _, product in products if product.added_to is not None]


def _finished(block: tirx.SBlock) -> tirx.SBlock:
    """Return the block with the functions, and without buffers that nothing uses."""
    used = _buffers(block.body)
    text = "".join(Path(__file__).with_name(name).read_text() for name in _HEADERS)
    body = tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_c", tirx.StringImm(text), block.body)
    return with_body(block, body, [one for one in block.alloc_buffers if one.data in used], dict(block.annotations))


def _buffers(stmt: tirx.Stmt) -> set:
    """Return the data of the buffers that a statement names."""
    return set(nodes_of(stmt, lambda node: isinstance(node, tirx.Var))) | {
        node.buffer.data for node in nodes_of(stmt, lambda node: isinstance(node, (tirx.BufferLoad, tirx.BufferStore)))
    }

"""Pipelined loops that decode MXFP4 weights and multiply them: as one product of all K, which `mxfp4_product.py` lowers.

    Before  for k in Pipelined(steps):                       After  C[i, j] += product of A[:, K] and (scale W)[:, K]
                copy(A[.., k], A_s);  copy(W[.., k], W_s)
                W_d = decode(W_s, scale[.., k]), MXFP4_DEQUANT [W_s, scale, W_d]
                gemm(A_s, W_d, C, transpose_B=True)

or, in the place of the last two, what `T.mxfp4_scaled_matmul` on A_s, W_s and scale is made of: clear(total), a loop that is
BLOCK_SCALED, and one that ADDS_TOTAL to C. In the place of the first copy T.moe_gather may stand, MOE_GATHER [A, ids, A_s];
then the loop may be serial too.

Invariant: tiles of consecutive steps lie side by side along K, nothing else is in the loop, and no tile is used outside it.
"""

from __future__ import annotations

from tvm import arith, tirx
from tvm.ir import Range
from tvm.tirx.stmt_functor import substitute

from tilelang_ext.cuda.mxfp4_form import Product
from tilelang_ext.cuda.statements import COPY, flat, fragment, is_call, is_whole, is_zero, nodes_of, region_of
from tilelang_ext.formats import CODES_PER_BYTE, MX_GROUP
from tilelang_ext.marks import ADDS_TOTAL, BLOCK_SCALED, MOE_GATHER, MXFP4_DEQUANT

_FILL, _GEMM = "tl.tileop.fill", "tl.tileop.gemm"


def product_of(loop: tirx.For, block: tirx.SBlock) -> Product | None:
    """Return what a loop of a block computes; None if it has another form."""
    if not isinstance(loop.extent, tirx.IntImm) or not is_zero(loop.min) or loop.kind != tirx.ForKind.SERIAL:
        return None
    copies, statements, values, gathered = {}, [], {}, {}
    for stmt in flat(loop.body):
        node = stmt.value if isinstance(stmt, tirx.Evaluate) else stmt
        if isinstance(node, tirx.Bind):
            values[node.var] = substitute(node.value, values)
        elif is_call(node, COPY):
            source, target = (region_of(argument) for argument in node.args[:2])
            if statements or not is_whole(target):  # a copy behind the product is for the next step
                return None
            copies[target.buffer.data] = source
        elif _is_marked(node, MOE_GATHER):
            source, ids, target = node.annotations[MOE_GATHER]
            if statements or not is_whole(target):
                return None
            copies[target.buffer.data], gathered[target.buffer.data] = source, ids
        else:
            statements.append(node)
    parts = _decoded_product(statements) or _scaled_product(statements)
    if parts is None or not (gathered or "num_stages" in (loop.annotations or {})):
        return None
    left, packed, scales, result, private = parts
    if str(left.buffer.dtype) != "bfloat16" or str(result.buffer.dtype) != "float32":
        return None
    if not is_whole(result) or result.buffer.scope() != "local.fragment":
        return None
    if any(_uses(block.body, data) != _uses(loop, data) for data in (*copies, private)):
        return None
    step, ids = int(left.region[-1].extent), gathered.pop(left.buffer.data, None)
    if gathered or (ids is not None and not _is_same_in_each_step(ids, loop, values)):
        return None
    operands = []
    for region, codes in ((left, 1), (packed, CODES_PER_BYTE), (scales, MX_GROUP)):
        staged = region.buffer.data in copies
        if staged and not is_whole(region):
            return None
        of_step = copies.pop(region.buffer.data) if staged else region
        of_all = _side_by_side(_substituted(of_step, values), loop, step // codes)
        if of_all is None:
            return None
        operands.append(of_all)
    if copies:
        return None
    total = fragment(tuple(result.buffer.shape), "total")
    return Product(total, *operands, int(loop.extent) * step, added_to=result.buffer, ids=ids)


def _is_same_in_each_step(region: tirx.BufferRegion, loop: tirx.For, values: dict) -> bool:
    own = {loop.loop_var, *values}
    return not any(nodes_of(axis.min, lambda node: isinstance(node, tirx.Var) and node in own) for axis in region.region)


def _decoded_product(statements: list) -> tuple | None:
    """Read decoding and T.gemm: A, packed weights, scales, C, and the data of what is decoded."""
    if len(statements) != 2 or not _is_marked(statements[0], MXFP4_DEQUANT) or not is_call(statements[1], _GEMM):
        return None
    packed, scales, decoded = statements[0].annotations[MXFP4_DEQUANT]
    left, right, result = (region_of(argument) for argument in statements[1].args[:3])
    *transposed, clears = (bool(int(statements[1].args[at])) for at in (3, 4, 9))
    same = right.buffer.data.same_as(decoded.buffer.data) and str(right.buffer.dtype) == "bfloat16"
    if scales is None or transposed != [False, True] or clears or not same or not is_whole(right) or not is_whole(decoded):
        return None
    return left, packed, scales, result, decoded.buffer.data


def _scaled_product(statements: list) -> tuple | None:
    """Read T.mxfp4_scaled_matmul: A, packed weights, scales, C, and the data of the total."""
    if len(statements) != 3 or not is_call(statements[0], _FILL) or not _is_marked(statements[1], BLOCK_SCALED):
        return None
    total, left, scale_a, packed, scales, _, _ = statements[1].annotations[BLOCK_SCALED]
    cleared = region_of(statements[0].args[0])
    if not _is_marked(statements[2], ADDS_TOTAL) or scale_a is not None or not _is(statements[0].args[1], 0):
        return None
    if not is_whole(cleared) or not cleared.buffer.data.same_as(total.buffer.data) or str(packed.buffer.dtype) != "uint8":
        return None
    return left, packed, scales, statements[2].annotations[ADDS_TOTAL][0], total.buffer.data


def _side_by_side(region: tirx.BufferRegion, loop: tirx.For, columns: int) -> tirx.BufferRegion | None:
    """Return the region of all steps of one that moves by `columns` each step and stays in its buffer; else None."""
    analyzer, k = arith.Analyzer(), loop.loop_var
    first = _substituted(region, {k: tirx.IntImm(k.dtype, 0)})
    moved = [0] * (len(region.region) - 1) + [columns]
    for axis, begin, by in zip(region.region, first.region, moved, strict=True):
        if not analyzer.can_prove_equal(axis.min - begin.min, k * by):
            return None
    *rows, last = first.region
    end = last.min + int(loop.extent) * columns
    if not _is(last.extent, columns) or not analyzer.can_prove(end <= region.buffer.shape[-1]):
        return None
    return tirx.BufferRegion(region.buffer, [*rows, Range.from_min_extent(last.min, int(loop.extent) * columns)])


def _substituted(region: tirx.BufferRegion, values: dict) -> tirx.BufferRegion:
    axes = [Range.from_min_extent(substitute(tirx.convert(axis.min), values), axis.extent) for axis in region.region]
    return tirx.BufferRegion(region.buffer, axes)


def _uses(stmt: tirx.Stmt, data: tirx.Var) -> int:
    """Return how often a statement names a buffer's data or its elements."""

    def names(node) -> bool:
        of = node.buffer.data if isinstance(node, (tirx.BufferLoad, tirx.BufferStore)) else node
        return isinstance(of, tirx.Var) and of.same_as(data)

    return len(nodes_of(stmt, names))


def _is(value, number: int) -> bool:
    return isinstance(value, (tirx.IntImm, tirx.FloatImm)) and value.value == number


def _is_marked(node, mark: str) -> bool:
    return isinstance(node, tirx.For) and mark in (node.annotations or {})

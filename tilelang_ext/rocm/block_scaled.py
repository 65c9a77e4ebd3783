"""MMAs of codes with one E8M0 scale per 32 of K, where the matrix unit takes scales (gfx950).

    Before  for t in serial(K / 64), BLOCK_SCALED [total, A, scale_a, B, scale_b, K]: decode a step of both, multiply halves
    After   for t in serial(K / 128):
                scale_a_f[i, g] = scale_a[i, 4 * t + g];  scale_b_f[j, g] = scale_b[j, 4 * t + g]
                gemm(A[:, 128 * t], B[:, 128 * t], total, scale_a_f[0, 0], scale_b_f[0, 0])         for `ScaledMfmaGemm`

The mark of `language.block_scaled` says what a loop computes; on other targets and for other types the loop stays. Operands
in global memory, and those that end inside a step, are copied to shared memory with zeros past the end of K. The pass runs
before every other one, since no pass keeps the buffers and variables of the mark up to date. `T.gemm_blockscaled` becomes the
same statements.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tilelang import language as T
from tilelang.language.utils import buffer_region_to_tile_region
from tilelang.rocm.target import target_get_mcpu
from tilelang.utils.language import is_shared
from tvm import IRModule, tirx
from tvm.ir import Range
from tvm.target import Target
from tvm.tirx.stmt_functor import ir_transform

from tilelang_ext.formats import E8M0, E8M0_ONE, MX_GROUP
from tilelang_ext.marks import BLOCK_SCALED
from tilelang_ext.passes.block_scaled_gemm import BlockScaledGemm, Scales
from tilelang_ext.rocm.instructions import SCALED_K, codes_per_byte, takes_scales

TAKES_SCALES = "takes_scales"  # annotation of the T.gemm that has them

_GROUPS = SCALED_K // MX_GROUP  # scale groups per instruction


def lower_block_scaled(mod: IRModule, target: Target) -> IRModule:
    """Replace the marked statements of a module that `target` can compute by MMAs with scales."""
    arch = target_get_mcpu(target) or ""
    functions = {
        var: _lower_function(func, arch) if isinstance(func, tirx.PrimFunc) else func for var, func in mod.functions.items()
    }
    return IRModule(functions, attrs=mod.attrs)


def _lower_function(func: tirx.PrimFunc, arch: str) -> tirx.PrimFunc:
    allocated = []
    replaced = False

    def replace(node):
        nonlocal replaced
        marked = node.value if isinstance(node, tirx.Evaluate) else node
        if not isinstance(marked, (tirx.For, tirx.Call)) or BLOCK_SCALED not in (marked.annotations or {}):
            return None
        *product, part = marked.annotations[BLOCK_SCALED]
        total, A, scale_a, B, scale_b, K = product
        if not takes_scales(arch, str(A.buffer.dtype), str(B.buffer.dtype)):
            return None
        replaced = True
        if int(part):
            return tirx.Evaluate(0)
        block = _product(total, A, partial(_scale, scale_a, K), B, partial(_scale, scale_b, K)).body.block
        allocated.extend(block.alloc_buffers)
        return block.body

    def allocate(node):
        if not isinstance(node, tirx.SBlock) or not allocated:
            return None
        buffers = [*node.alloc_buffers, *allocated]
        allocated.clear()
        return tirx.SBlock(
            node.iter_vars,
            node.reads,
            node.writes,
            node.name_hint,
            node.body,
            node.init,
            buffers,
            node.match_buffers,
            node.annotations,
        )

    body = ir_transform(func.body, replace, allocate, ["tirx.For", "tirx.Evaluate", "tirx.SBlock"])
    return func.with_body(body) if replaced else func


def lower_block_scaled_gemm(gemm: BlockScaledGemm, target: Target) -> tirx.PrimFunc | None:
    """Return the statements of a `T.gemm_blockscaled` that `target` computes by MMAs with scales, None of any other."""
    A, B, C, scales = gemm.A, gemm.B, gemm.C, (gemm.scale_a, gemm.scale_b)
    if (
        not takes_scales(target_get_mcpu(target) or "", A.dtype, B.dtype)
        or A.k_is_first
        or B.k_is_first
        or not gemm.is_in_place
    ):
        return None
    if gemm.group % MX_GROUP or any(scale.format is not E8M0 for scale in scales):
        return None

    def scale_of(scale: Scales, i, g) -> tirx.PrimExpr:
        return T.if_then_else(g * MX_GROUP < gemm.K, T.cast(scale.stored(i, g * MX_GROUP), "uint8"), T.uint8(0))

    scale_a, scale_b = (partial(scale_of, scale) for scale in scales)
    return _product(C, A.region, scale_a, B.region, scale_b, gemm.clear_accum)


def _product(total, A, scale_a: Callable, B, scale_b: Callable, clear=False) -> tirx.PrimFunc:
    """Build the loop over steps of 128 that replaces marked statements; scales are functions of row and group."""
    M, N = int(A.region[-2].extent), int(B.region[-2].extent)
    a_packed, b_packed = codes_per_byte(A.buffer.dtype), codes_per_byte(B.buffer.dtype)
    steps = T.ceildiv(A.region[-1].extent * a_packed, SCALED_K)
    a_staged, b_staged = not _in_steps(A, a_packed), not _in_steps(B, b_packed)

    @T.prim_func
    def product() -> None:
        scale_a_f = T.alloc_fragment((M, _GROUPS), "uint8")
        scale_b_f = T.alloc_fragment((N, _GROUPS), "uint8")
        if a_staged:
            A_s = T.alloc_shared((M, SCALED_K // a_packed), A.buffer.dtype)
        if b_staged:
            B_s = T.alloc_shared((N, SCALED_K // b_packed), B.buffer.dtype)
        if clear:
            T.clear(total.buffer)
        for t in T.serial(steps):
            for i, g in T.Parallel(M, _GROUPS):
                scale_a_f[i, g] = scale_a(i, t * _GROUPS + g)
            for j, g in T.Parallel(N, _GROUPS):
                scale_b_f[j, g] = scale_b(j, t * _GROUPS + g)
            if a_staged:
                for i, k in T.Parallel(M, SCALED_K // a_packed):
                    A_s[i, k] = _code(A, i, t * (SCALED_K // a_packed) + k)
            if b_staged:
                for j, k in T.Parallel(N, SCALED_K // b_packed):
                    B_s[j, k] = _code(B, j, t * (SCALED_K // b_packed) + k)
            T.evaluate(
                _gemm(
                    _whole(A_s) if a_staged else _step(A, t, SCALED_K // a_packed),
                    _whole(B_s) if b_staged else _step(B, t, SCALED_K // b_packed),
                    total,
                    scale_a_f[0, 0],
                    scale_b_f[0, 0],
                )
            )

    return product


def _in_steps(operand: tirx.BufferRegion, packed: int) -> bool:
    """Whether the operand lies in shared memory in whole steps, so that the matrix unit reads it there."""
    columns = operand.region[-1].extent
    return is_shared(operand.buffer) and isinstance(columns, tirx.IntImm) and int(columns) * packed % SCALED_K == 0


def _element(region: tirx.BufferRegion, i, k) -> tirx.PrimExpr:
    *lead, row, col = [axis.min for axis in region.region]
    return region.buffer[(*lead, row + i, col + k)]


def _code(operand: tirx.BufferRegion, i, k) -> tirx.PrimExpr:
    code = _element(operand, i, k)
    return T.if_then_else(k < operand.region[-1].extent, code, tirx.const(0, code.dtype))


def _scale(scale: tirx.BufferRegion | None, K, i, g) -> tirx.PrimExpr:
    """Return the byte of a scale; past the end of K it is 0, since codes there are zeros, which a NaN scale would not keep."""
    if scale is None:
        return T.uint8(E8M0_ONE)
    byte = _element(scale, i, g)
    byte = byte if str(byte.dtype) == "uint8" else T.reinterpret(byte, "uint8")
    return T.if_then_else(g * MX_GROUP < K, byte, T.uint8(0))


def _whole(buffer: tirx.Buffer) -> tirx.BufferRegion:
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]


def _step(operand: tirx.BufferRegion, t, columns: int) -> tirx.BufferRegion:
    *lead, rows, cols = operand.region
    first = cols.min + t * columns
    axes = *(slice(axis.min, axis.min + axis.extent) for axis in (*lead, rows)), slice(first, first + columns)
    return operand.buffer[axes]


def _gemm(A, B, total, scale_a, scale_b) -> tirx.Call:
    """Build the call of T.gemm with K in codes, and scales in the place of C's coordinates, which no AMD GEMM reads."""
    plain = T.gemm(_columns(A, SCALED_K), _columns(B, SCALED_K), total, transpose_B=True, annotations={TAKES_SCALES: 1})
    operands = [buffer_region_to_tile_region(region, "r", [axis.extent for axis in region.region]) for region in (A, B)]
    return tirx.Call(plain.dtype, plain.op, [*operands, *plain.args[2:-2], scale_a, scale_b], plain.annotations)


def _columns(region: tirx.BufferRegion, count: int) -> tirx.BufferRegion:
    """Return the region as if it had one element per code, as T.gemm expects."""
    *lead, columns = region.region
    return tirx.BufferRegion(region.buffer, [*lead, Range.from_min_extent(columns.min, count)])

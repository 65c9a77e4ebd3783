"""`T.gemm_blockscaled` in plain statements, for the targets and operands for which upstream has no instruction.

    Before  gemm_blockscaled(A, B, C, SFA, SFB, k_start, 32, 32), fp8, a tile of K = 64
    After   gemm(A[:, 0:32], B[:, 0:32], partial, clear_accum=True)
            C[i, j] += partial[i, j] * scale(SFA[i, k_start / 32]) * scale(SFB[j, k_start / 32])
            the same for 32:64 with the scales of k_start + 32

    Before  the same with E2M1 operands, or with groups that no fp8 instruction divides
    After   A_s[i, k] = A[i, k] * scale(SFA[i, (k_start + k) / 32]), bfloat16; B_s likewise
            gemm(A_s, B_s, C)

bfloat16 holds every product of an E2M1 or fp8 value and an E4M3 or E8M0 scale exactly, to the ends of its range. Float scales
multiply sums, and no sum in the matrix unit covers more than 128 of K. Runs before every other pass: the statements are tile
operators, and no pass keeps the regions of the call up to date.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from tilelang import language as T
from tvm import IRModule, tirx
from tvm.tirx.stmt_functor import post_order_visit

from tilelang_ext.marks import READ_ONCE
from tilelang_ext.passes.block_scaled_gemm import FP8, NAME, BlockScaledGemm, Operand, Scales, product_of, read, scope_of
from tilelang_ext.passes.rewrite import rewritten

_DECODED = "bfloat16"
_DECODED_BYTES = 16 * 1024  # for decoded tiles: half of what the smallest target has
_STEPS = (128, 64, 32, 16)  # K elements that are decoded at a time
_PROMOTE_K = 128  # K elements summed in the matrix unit
_FP8_K, _DECODED_K = 32, 16  # of the instructions that take them


def expand_block_scaled_gemms(
    mod: IRModule,
    *,
    native: Callable[[BlockScaledGemm], tirx.PrimFunc | None] = lambda gemm: None,
    is_upstreams: Callable[[tirx.Call], bool] = lambda call: False,
    without: tuple[str, ...] = (),
) -> IRModule:
    """Replace the calls of a module but those that are upstream's, for a target that lacks the dtypes `without`.

    `native` returns the statements of a product for which the target has an instruction, and None of any other.
    """

    def expand(func):
        return func.with_body(_expand(func.body, native, is_upstreams, without)) if isinstance(func, tirx.PrimFunc) else func

    return IRModule({var: expand(func) for var, func in mod.functions.items()}, attrs=mod.attrs)


def _expand(body: tirx.Stmt, native: Callable, is_upstreams: Callable, without: tuple[str, ...]) -> tirx.Stmt:
    scratch = _Scratch(body)

    def replace_call(node: tirx.Evaluate):
        call = product_of(node.value)
        if call is None or is_upstreams(call):
            return None
        gemm, copies = _in_shared_memory(read(call, without), scratch.of(node))
        product = (native(gemm) or _product(gemm, scratch.of(node))).body
        if isinstance(product, tirx.SBlockRealize):
            scratch.allocated.extend(product.block.alloc_buffers)
            product = product.block.body
        return tirx.SeqStmt([*copies, product]) if copies else product

    def rewrite(node):
        if isinstance(node, tirx.Evaluate):
            return replace_call(node)
        if isinstance(node, tirx.SeqStmt):
            stmts = _flat(node)
            return tirx.SeqStmt(stmts) if len(stmts) > len(node.seq) else None
        if not scratch.allocated:
            return None
        buffers = [*node.alloc_buffers, *scratch.allocated]
        scratch.allocated.clear()
        return tirx.SBlock(
            node.iter_vars, node.reads, node.writes, node.name_hint, node.body, node.init, buffers, node.match_buffers,
            node.annotations,
        )  # fmt: skip

    return rewritten(body, rewrite, ["tirx.Evaluate", "tirx.SeqStmt", "tirx.SBlock"])


class _Scratch:
    """Shared memory of the statements that replace calls; calls of one sequence, which the same threads make, use the same."""

    def __init__(self, body: tirx.Stmt):
        self.allocated: list[tirx.Buffer] = []
        self._buffers: dict[tuple, tirx.Buffer] = {}
        self._sequences: dict[tirx.Stmt, tirx.Stmt] = {}

        def visit(node):
            if isinstance(node, tirx.SeqStmt):
                self._sequences.update((stmt, node) for stmt in node.seq if _has_product(stmt))

        post_order_visit(body, visit)

    def of(self, call: tirx.Evaluate) -> Callable:
        """Return (name, shape, dtype) -> buffer, for the statements that replace `call`."""

        def buffer(name: str, shape, dtype) -> tirx.Buffer:
            key = self._sequences.get(call, call), name, tuple(map(int, shape)), str(dtype)
            if key not in self._buffers:
                self._buffers[key] = tirx.decl_buffer(shape, dtype, name, scope="shared.dyn")
                self.allocated.append(self._buffers[key])
            return self._buffers[key]

        return buffer


def _has_product(stmt: tirx.Stmt) -> bool:
    return isinstance(stmt, tirx.Evaluate) and product_of(stmt.value) is not None


def _flat(stmt: tirx.Stmt) -> list[tirx.Stmt]:
    return [inner for child in stmt.seq for inner in _flat(child)] if isinstance(stmt, tirx.SeqStmt) else [stmt]


def _in_shared_memory(gemm: BlockScaledGemm, scratch: Callable) -> tuple[BlockScaledGemm, list[tirx.Stmt]]:
    """Copy fragments, whose elements only their own thread can read, to shared memory."""
    moved: dict[str, Operand | Scales] = {}
    copies = []
    for name in ("A", "B", "scale_a", "scale_b"):
        operand = getattr(gemm, name)
        source = operand.region.buffer
        if scope_of(source) != "fragment":
            continue
        buffer = scratch(f"{name}_s", [axis.extent for axis in operand.region.region], source.dtype)
        copies.append(tirx.Evaluate(T.copy(operand.region, buffer)))
        moved[name] = replace(operand, region=_all(buffer))
    return replace(gemm, **moved), copies


def _product(gemm: BlockScaledGemm, scratch: Callable) -> tirx.PrimFunc:
    """Build the statements that replace a call."""
    A, B, C, scale_a, scale_b, clear = gemm.A, gemm.B, gemm.C, gemm.scale_a, gemm.scale_b, gemm.clear_accum
    M, N, K = gemm.M, gemm.N, gemm.K
    group = gemm.group
    decoded = not {A.dtype, B.dtype} <= set(FP8) or group % _FP8_K != 0
    folded = decoded and scale_a.format is not None and scale_b.format is not None  # operands are decoded with their scales
    if not folded and group % _DECODED_K:
        raise ValueError(
            f"{NAME}: with float scales a multiple of {_DECODED_K} of K must share its scales, from k_start on; got {group} "
            f"of a tile of {K} from {scale_a.k_start} on, with granularities {scale_a.granularity} and {scale_b.granularity}; "
            "use multiples, or bytes of E8M0"
        )
    step = _step(gemm) if decoded else K
    width = math.gcd(group, step, _PROMOTE_K)
    in_place = gemm.is_in_place
    if decoded:
        A_s = scratch("A_decoded", (step, M) if A.k_is_first else (M, step), _DECODED)
        B_s = scratch("B_decoded", (step, N) if B.k_is_first else (N, step), _DECODED)
    *lead, row, col = (axis.min for axis in C.region)

    @T.macro
    def decode(operand, scales, tile, k0):
        rows, k_is_first = operand.shape[0], operand.k_is_first
        for x, y in T.Parallel(step if k_is_first else rows, rows if k_is_first else step):
            i, k = (y, k0 + x) if k_is_first else (x, k0 + y)
            value = operand.value(i, k) * scales.at(i, k) if folded else operand.value(i, k)
            tile[x, y] = T.cast(value, _DECODED)

    @T.macro
    def add_scaled(total, A_k, B_k, k):
        partial = T.alloc_fragment((M, N), "float32")
        T.gemm(A_k, B_k, partial, A.k_is_first, not B.k_is_first, gemm.policy, True)
        for i, j in T.Parallel(M, N, annotations={READ_ONCE: 1}):
            total[i, j] += partial[i, j] * (scale_a.at(i, k) * scale_b.at(j, k))

    def add_products(total, A_t: Operand, B_t: Operand, k0) -> None:
        """Add the products of tiles of one step, which begins at element k0, group after group."""
        for k in range(0, step, width):
            add_scaled(total, A_t.along_k(k, width), B_t.along_k(k, width), k0 + k)

    @T.prim_func
    def product() -> None:
        if in_place:
            total = C.buffer
        else:
            total = T.alloc_fragment((M, N), "float32")
        if in_place:
            if clear:
                T.clear(total)
        else:
            T.clear(total)
        if decoded:
            for t in T.serial(K // step):
                decode(A, scale_a, A_s, t * step)
                decode(B, scale_b, B_s, t * step)
                if folded:
                    T.gemm(A_s, B_s, total, A.k_is_first, not B.k_is_first, gemm.policy)
                else:
                    add_products(total, Operand(_all(A_s), A.k_is_first), Operand(_all(B_s), B.k_is_first), t * step)
        else:
            add_products(total, A, B, 0)
        if not in_place:
            for i, j in T.Parallel(M, N):
                at = (*lead, row + i, col + j)
                C.buffer[at] = T.cast(
                    total[i, j] + T.if_then_else(clear, T.float32(0), T.cast(C.buffer[at], "float32")), C.buffer.dtype
                )

    return product


def _step(gemm: BlockScaledGemm) -> int:
    """Return how many elements of K are decoded at a time: a divisor of K, since there is no partial step."""
    steps = [step for step in _STEPS if gemm.K % step == 0]
    if not steps:
        raise ValueError(
            f"{NAME}: K of tiles that are decoded must be a multiple of {_STEPS[-1]}; got {gemm.K}; round it up and mask the "
            "tail when copying"
        )
    return next((step for step in steps if (gemm.M + gemm.N) * step * 2 <= _DECODED_BYTES), steps[-1])


def _all(buffer: tirx.Buffer) -> tirx.BufferRegion:
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]

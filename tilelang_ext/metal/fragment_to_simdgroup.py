"""`T.gemm` on Metal as simdgroup MMAs on fragment registers.

    Before                                      After, for each thread (2x2 simdgroups on a 64x64 tile)
    C: fragment (64, 64)                        C: registers [16 matrices * 2]
    T.gemm(A_shared, B_shared, C)               for k in 4: a[0:8] = rows of A_shared; b[0:8] = columns of B_shared
                                                    for i, j in 4x4: simdgroup_mma(&C[(i*4+j)*2], &a[i*2], &b[j*2])

Invariant: before and after every MMA a fragment holds what its `Fragment` layout says, so that `T.Parallel`, `T.copy`,
`T.reduce_*` and further GEMMs on it need no conversion. Upstream gives the accumulator an opaque type instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tilelang import language as T
from tilelang.tileop.base import GemmWarpPolicy
from tilelang.transform.simplify import _Simplify
from tilelang.utils.language import is_fragment, is_full_region, is_shared
from tvm import tirx
from tvm.ir import Op

from tilelang_ext.marks import REQUIRE_NATIVE_FP8
from tilelang_ext.metal.layout import (
    COOPERATIVE_TENSOR,
    LANES,
    SIMDGROUP_MATRIX,
    LaneLayout,
    Partition,
    accumulator_layout,
    operand_layout,
    padded_layout,
)
from tilelang_ext.metal.partition import partition_tile

_DECODED_TO_HALF = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn")
_PRODUCT_DTYPES = ("float16", "bfloat16", "float32")
_TFLOAT, _FLOAT = "custom[tfloat32]", "float32"  # Metal has no shorter float of 32 bits: products keep all of them


@dataclass(frozen=True)
class MatrixInstruction:
    """One MMA of M x N x K on registers. `transposed_b`: B may be given as (N, K), so that a lane's runs lie along K."""

    M: int
    N: int
    K: int
    matrix: LaneLayout
    transposed_b: bool
    call: Callable  # (pointers to the lane's elements of c, a, b; is b (N, K)) -> tirx.Call


def _simdgroup_mma(c, a, b, transposed_b) -> tirx.Call:
    return tirx.call_intrin("handle", Op.get("tilelang_ext.metal_simdgroup_mma"), c, a, b)


def _matmul2d(c, a, b, transposed_b) -> tirx.Call:
    return tirx.call_intrin("handle", Op.get("tilelang_ext.metal_matmul2d"), c, a, b, 16, 32, 16, False, transposed_b)


SIMDGROUP_MMA = MatrixInstruction(8, 8, 8, SIMDGROUP_MATRIX, transposed_b=False, call=_simdgroup_mma)
MATMUL2D = MatrixInstruction(16, 32, 16, COOPERATIVE_TENSOR, transposed_b=True, call=_matmul2d)  # Metal 4


def product_dtype(a_dtype: str, b_dtype: str) -> str:
    """Return the element type both operands are converted to in registers; every operand value is exact in it.

    Equal 16- or 32-bit types stay; fp8 and fp4 become half, or bfloat if the other operand is bfloat; any other mix is float32.
    """
    a_dtype, b_dtype = (_FLOAT if dtype == _TFLOAT else dtype for dtype in (a_dtype, b_dtype))
    for name, dtype in (("A", a_dtype), ("B", b_dtype)):
        if dtype not in _PRODUCT_DTYPES and dtype not in _DECODED_TO_HALF:
            raise TypeError(
                f"T.gemm: on Metal {name} must be float16, bfloat16, float32 or an fp8 type; got {dtype}; "
                f"cast it, or use a target whose matrix unit takes {dtype}"
            )
    dtypes = {dtype for dtype in (a_dtype, b_dtype) if dtype not in _DECODED_TO_HALF}
    if len(dtypes) == 2:
        return "float32"
    return dtypes.pop() if dtypes else "float16"


def select_instruction(target, a_dtype: str, b_dtype: str, M: int, N: int, K: int, threads: int, policy) -> MatrixInstruction:
    """Return Metal 4's `matmul2d` where the target has it and the tile fits, and the simdgroup MMA otherwise.

    `matmul2d` takes float32 operands at reduced precision, so those stay on simdgroup matrices.
    """
    if "metal4" in target.keys and product_dtype(a_dtype, b_dtype) != "float32" and K % MATMUL2D.K == 0:
        try:
            partition_tile(M, N, threads, policy, MATMUL2D.M, MATMUL2D.N)
        except ValueError:
            return SIMDGROUP_MMA
        return MATMUL2D
    return SIMDGROUP_MMA


def check_tile(M: int, N: int, K: int, threads: int) -> None:
    """Raise if the tile or the thread count cannot be made of 8x8 simdgroup matrices."""
    for name, extent in (("M", M), ("N", N), ("K", K)):
        if extent % SIMDGROUP_MMA.M:
            raise ValueError(
                f"T.gemm: on Metal the tile's {name} must be a multiple of 8; got {name} = {extent}; "
                "round the tile up and mask the tail when copying"
            )
    if threads % LANES:
        raise ValueError(
            f"T.gemm: threads must be a multiple of {LANES}, the lanes of a simdgroup; got {threads}; "
            f"use threads={max(LANES, threads // LANES * LANES)}"
        )


@dataclass
class FragmentGemm:
    """`T.gemm` on Metal: A, B and C global, shared or fragment.

    MMAs accumulate in float32. A float16 or bfloat16 C is read, accumulated in float32 and rounded once per call.
    """

    gemm_node: object

    def __post_init__(self) -> None:
        gemm = self.gemm_node
        self.A, self.B, self.C = gemm.A, gemm.B, gemm.C
        self.M, self.N, self.K = int(gemm.M), int(gemm.N), int(gemm.K)
        self.trans_A, self.trans_B = bool(gemm.trans_A), bool(gemm.trans_B)
        self.policy = GemmWarpPolicy(int(gemm.policy.policy_type))
        self.dtype = product_dtype(str(self.A.dtype), str(self.B.dtype))
        if REQUIRE_NATIVE_FP8 in gemm.annotations:
            raise NotImplementedError(
                "T.gemm: require_native_fp8 needs a matrix unit that takes fp8; got Metal, which decodes to half; drop the "
                "requirement, or compile for sm_89, sm_90, sm_120, gfx942 or gfx950"
            )
        if str(self.C.dtype) not in _PRODUCT_DTYPES:
            raise TypeError(
                f"T.gemm: on Metal C must be float32, float16 or bfloat16; got {self.C.dtype} ({self.C.name}); "
                "accumulate in float32 and cast afterwards"
            )
        for name, buffer, region in (
            ("A", self.A, gemm.aRegion),
            ("B", self.B, gemm.bRegion),
            ("C", self.C, gemm.cRegion),
        ):
            if not (is_shared(buffer) or is_fragment(buffer) or buffer.scope() == "global"):
                raise TypeError(
                    f"T.gemm: on Metal {name} must be a global, shared or fragment buffer; got {buffer.name} in scope "
                    f"{buffer.scope()!r}; copy the tile with T.copy first"
                )
            if is_fragment(buffer) and not is_full_region(region):
                raise ValueError(
                    f"T.gemm: a fragment operand must be used whole; got a slice of {name} ({buffer.name}); "
                    "use a shared buffer, or a fragment of the slice's shape"
                )

    def _plan(self, target, threads: int) -> tuple[MatrixInstruction, Partition]:
        check_tile(self.M, self.N, self.K, threads)
        a_dtype, b_dtype = str(self.A.dtype), str(self.B.dtype)
        instruction = select_instruction(target, a_dtype, b_dtype, self.M, self.N, self.K, threads, self.policy)
        return instruction, partition_tile(self.M, self.N, threads, self.policy, instruction.M, instruction.N)

    def infer_layout(self, target, thread_nums) -> dict:
        instruction, partition = self._plan(target, int(thread_nums))
        layouts = {}
        for operand, buffer, transposed in (("A", self.A, self.trans_A), ("B", self.B, self.trans_B)):
            if is_fragment(buffer):
                layouts[buffer] = operand_layout(buffer.shape, partition, instruction.matrix, operand, transposed)
            elif is_shared(buffer):
                layouts[buffer] = padded_layout(buffer)
        if is_fragment(self.C):
            layouts[self.C] = accumulator_layout(self.C.shape, partition, instruction.matrix)
        elif is_shared(self.C):
            layouts[self.C] = padded_layout(self.C)
        return layouts

    def lower(self, layout_map, target, thread_bounds, thread_index, mbar_phase_expr=None):
        instruction, partition = self._plan(target, int(thread_bounds.extent))
        matrix, dtype = instruction.matrix, self.dtype
        size, elements, run = matrix.size, matrix.elements, matrix.run
        runs = elements // run
        thread = thread_index - thread_bounds.min
        simdgroup, lane = thread // LANES, thread % LANES
        rows, cols = self.M // partition.rows // size, self.N // partition.cols // size  # matrices of this simdgroup
        row0, col0 = partition.row(simdgroup) * rows * size, partition.col(simdgroup) * cols * size
        group = instruction.N // size  # matrices of B and C per MMA
        steps = self.K // instruction.K

        A, B, C = self.A, self.B, self.C
        a_in_place = is_fragment(A) and str(A.dtype) == dtype
        b_in_place = is_fragment(B) and str(B.dtype) == dtype
        c_in_place = is_fragment(C) and str(C.dtype) == "float32"
        b_as_stored = instruction.transposed_b and self.trans_B and is_shared(B)
        # Registers are indexed by constants only, so a loop over them is unrolled; runs of a transposed operand are gathered.
        over_k = T.unroll if is_fragment(A) or is_fragment(B) else T.serial
        run_of_a = T.unroll if self.trans_A else T.vectorized
        run_of_b = T.unroll if self.trans_B and not b_as_stored else T.vectorized
        clear_accum = self.gemm_node.clear_accum
        read_a = _reader(A, self.gemm_node.aRegion, self.trans_A, dtype)
        read_b = _reader(B, self.gemm_node.bRegion, self.trans_B, dtype)
        *c_lead, c_row, c_col = [r.min for r in self.gemm_node.cRegion.region]

        # A fragment is addressed by coordinates of the first simdgroup: they name the same register in every one.
        def a_element(i, k, e):
            if is_fragment(A):
                return read_a(i * size + e // run * 8, k * size + e % run)
            return read_a(row0 + i * size + matrix.row(lane, e), k * size + matrix.col(lane, e))

        def b_element(k, j, e):
            if is_fragment(B):
                return read_b(k * size + e // run * 8, j * size + e % run)
            if b_as_stored:
                return read_b(k * size + matrix.col(lane, e), col0 + j * size + matrix.row(lane, e))
            return read_b(k * size + matrix.row(lane, e), col0 + j * size + matrix.col(lane, e))

        def c_index(i, j, e):
            if is_fragment(C):
                return (i * size + e // run * 8, j * size + e % run)
            return (
                *c_lead,
                c_row + row0 + i * size + matrix.row(lane, e),
                c_col + col0 + j * size + matrix.col(lane, e),
            )

        def stored(i, j, transposed):
            return (j * size, i * size) if transposed else (i * size, j * size)

        @T.macro
        def accumulate(c, c_register):
            a = T.alloc_local((rows * elements,), dtype)
            b = T.alloc_local((cols * elements,), dtype)
            for k in over_k(steps):
                if not a_in_place:
                    for i in T.unroll(rows):
                        for r in T.unroll(runs):
                            for v in run_of_a(run):
                                a[(i * runs + r) * run + v] = a_element(i, k, r * run + v)
                if not b_in_place:
                    for j in T.unroll(cols):
                        for r in T.unroll(runs):
                            for v in run_of_b(run):
                                b[(j * runs + r) * run + v] = b_element(k, j, r * run + v)
                for i in T.unroll(rows):
                    for j in T.unroll(cols // group):
                        instruction.call(
                            T.address_of(c[c_register(i, j * group)]),
                            T.address_of(A[stored(i, k, self.trans_A)]) if a_in_place else T.address_of(a[i * elements]),
                            T.address_of(B[stored(k, j * group, self.trans_B)])
                            if b_in_place
                            else T.address_of(b[j * group * elements]),
                            b_as_stored,
                        )

        if c_in_place:

            @T.prim_func
            def gemm_in_registers() -> None:
                if clear_accum:
                    T.clear(C)
                accumulate(C, lambda i, j: (i * size, j * size))

            return _Simplify(gemm_in_registers, inline_let=True)

        @T.prim_func
        def gemm_through_registers() -> None:
            c = T.alloc_local((rows * cols * elements,), "float32")
            for i in T.unroll(rows):
                for j in T.unroll(cols):
                    for r in T.unroll(runs):
                        for v in T.vectorized(run):
                            c[((i * cols + j) * runs + r) * run + v] = T.if_then_else(
                                clear_accum, T.float32(0), T.cast(C[c_index(i, j, r * run + v)], "float32")
                            )
            accumulate(c, lambda i, j: (i * cols + j) * elements)
            for i in T.unroll(rows):
                for j in T.unroll(cols):
                    for r in T.unroll(runs):
                        for v in T.vectorized(run):
                            C[c_index(i, j, r * run + v)] = T.cast(c[((i * cols + j) * runs + r) * run + v], C.dtype)

        return _Simplify(gemm_through_registers, inline_let=True)


def _reader(buffer, region, transposed, dtype):
    """Return a function that gives one element of an operand by its row and column in the GEMM, converted to `dtype`."""
    *lead, first0, second0 = [r.min for r in region.region]

    def read(row, col):
        first, second = (col, row) if transposed else (row, col)
        value = buffer[(*lead, first0 + first, second0 + second)]
        return value if str(buffer.dtype) == dtype else T.cast(value, dtype)

    return read

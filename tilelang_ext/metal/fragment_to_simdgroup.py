"""Fragments to simdgroups: `T.gemm` on Metal as matrix products on fragment registers.

    Before                                      After, for each thread (2x2 simdgroups on a 64x64 tile)
    C: fragment (64, 64)                        C: registers [16 matrices * 2]
    T.gemm(A_shared, B_shared, C)               for k in 4: a[0:8] = rows of A_shared; b[0:8] = columns of B_shared
                                                    for i, j in 4x4: simdgroup_mma(&C[(i*4+j)*2], &a[i*2], &b[j*2])

Invariant: a fragment holds what its `Fragment` layout says before and after every product, so that `T.Parallel`, `T.copy`,
`T.reduce_*` and further products on it need no conversion. Upstream gives the accumulator an opaque type instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from tilelang import language as T
from tilelang.tileop.base import GemmWarpPolicy
from tilelang.transform.simplify import _Simplify
from tilelang.utils.language import is_fragment, is_full_region, is_shared
from tvm import tirx
from tvm.ir import Op

from tilelang_ext.metal.layout import (
    ELEMENTS,
    LANES,
    TILE,
    Partition,
    accumulator_layout,
    col_of,
    operand_layout,
    padded_layout,
    row_of,
)
from tilelang_ext.metal.partition import partition_tile

_STORAGE_TO_PRODUCT = {
    "float8_e4m3fn": "float16",
    "float8_e5m2": "float16",
    "float8_e4m3fnuz": "float16",
    "float8_e5m2fnuz": "float16",
    "float4_e2m1fn": "float16",
}
_PRODUCT_DTYPES = ("float16", "bfloat16", "float32")
_ACCUMULATOR_DTYPES = ("float32", "float16", "bfloat16")


def product_dtype(a_dtype: str, b_dtype: str) -> str:
    """Return the element type both operands are converted to in registers; every operand value is exact in it.

    Equal 16- or 32-bit types stay; fp8 and fp4 become half, or bfloat beside a bfloat operand; any other mix is float32.
    """
    for name, dtype in (("A", a_dtype), ("B", b_dtype)):
        if dtype not in _PRODUCT_DTYPES and dtype not in _STORAGE_TO_PRODUCT:
            raise TypeError(
                f"T.gemm: on Metal {name} must be float16, bfloat16, float32 or an fp8 type; got {dtype}; "
                f"cast it, or use a target whose matrix unit takes {dtype}"
            )
    a = _STORAGE_TO_PRODUCT.get(a_dtype, a_dtype)
    b = _STORAGE_TO_PRODUCT.get(b_dtype, b_dtype)
    if a == b:
        return a
    if (a_dtype in _STORAGE_TO_PRODUCT and b == "bfloat16") or (b_dtype in _STORAGE_TO_PRODUCT and a == "bfloat16"):
        return "bfloat16"
    return "float32"


def warp_policy(gemm) -> GemmWarpPolicy:
    return GemmWarpPolicy(int(gemm.policy.policy_type))


def check_tile(gemm, threads: int) -> None:
    """Raise if the tile or the thread count cannot be made of 8x8 simdgroup matrices."""
    for name, extent in (("M", gemm.M), ("N", gemm.N), ("K", gemm.K)):
        if int(extent) % TILE:
            raise ValueError(
                f"T.gemm: on Metal the tile's {name} must be a multiple of {TILE}; got {name} = {int(extent)}; "
                f"round the tile up and mask the tail when copying"
            )
    if threads % LANES:
        raise ValueError(
            f"T.gemm: threads must be a multiple of {LANES}, the lanes of a simdgroup; got {threads}; "
            f"use threads={max(LANES, threads // LANES * LANES)}"
        )


@dataclass
class GemmSimdgroup:
    """`T.gemm` through `simdgroup_multiply_accumulate`: A and B shared or fragment, C fragment or shared.

    Products accumulate in float32. A float16 or bfloat16 C is read, accumulated in float32 and rounded once a call.
    """

    gemm_node: object

    def __post_init__(self) -> None:
        gemm = self.gemm_node
        self.A, self.B, self.C = gemm.A, gemm.B, gemm.C
        self.M, self.N, self.K = int(gemm.M), int(gemm.N), int(gemm.K)
        self.dtype = product_dtype(str(self.A.dtype), str(self.B.dtype))
        if str(self.C.dtype) not in _ACCUMULATOR_DTYPES:
            raise TypeError(
                f"T.gemm: on Metal C must be float32, float16 or bfloat16; got {self.C.dtype} ({self.C.name}); "
                "accumulate in float32 and cast afterwards"
            )
        for name, buffer in (("A", self.A), ("B", self.B), ("C", self.C)):
            if not (is_shared(buffer) or is_fragment(buffer)):
                raise TypeError(
                    f"T.gemm: on Metal {name} must be a shared or fragment buffer; got {buffer.name} in scope "
                    f"{buffer.scope()!r}; copy the tile with T.copy first"
                )
        for name, buffer, region in (("A", self.A, gemm.aRegion), ("B", self.B, gemm.bRegion), ("C", self.C, gemm.cRegion)):
            if is_fragment(buffer) and not is_full_region(region):
                raise NotImplementedError(
                    f"T.gemm: a fragment operand must be used whole; got a slice of {name} ({buffer.name}); "
                    "use a shared buffer, or a fragment of the slice's shape"
                )

    def partition(self, threads: int) -> Partition:
        check_tile(self.gemm_node, threads)
        return partition_tile(self.M, self.N, threads // LANES, warp_policy(self.gemm_node))

    def infer_layout(self, target, thread_nums) -> dict:
        partition = self.partition(int(thread_nums))
        layouts = {}
        for operand, buffer, transposed in (("A", self.A, self.gemm_node.trans_A), ("B", self.B, self.gemm_node.trans_B)):
            if is_fragment(buffer):
                layouts[buffer] = operand_layout(buffer.shape, partition, operand, bool(transposed))
            else:
                layouts[buffer] = padded_layout(buffer)
        layouts[self.C] = accumulator_layout(self.C.shape, partition) if is_fragment(self.C) else padded_layout(self.C)
        return layouts

    def lower(self, layout_map, target, thread_bounds, thread_index, mbar_phase_expr=None):
        gemm, dtype = self.gemm_node, self.dtype
        partition = self.partition(int(thread_bounds.extent))
        thread = thread_index - thread_bounds.min
        simdgroup, lane = thread // LANES, thread % LANES
        rows, cols = self.M // partition.rows // TILE, self.N // partition.cols // TILE
        row0, col0 = partition.row_of(simdgroup) * rows * TILE, partition.col_of(simdgroup) * cols * TILE
        lane_row, lane_col = row_of(lane), col_of(lane)
        load_a = _operand_reader(self.A, gemm.aRegion, gemm.trans_A, dtype)
        load_b = _operand_reader(self.B, gemm.bRegion, gemm.trans_B, dtype)
        a_in_place = is_fragment(self.A) and str(self.A.dtype) == dtype and not gemm.trans_A
        b_in_place = is_fragment(self.B) and str(self.B.dtype) == dtype and not gemm.trans_B
        A, B, C, clear_accum = self.A, self.B, self.C, gemm.clear_accum
        c_in_place = is_fragment(C) and str(C.dtype) == "float32"
        c_is_fragment = is_fragment(C)
        c_offsets = [r.min for r in gemm.cRegion.region]
        *c_lead, c_row, c_col = c_offsets
        steps = self.K // TILE

        @T.macro
        def accumulate(c, c_index):
            a = T.alloc_local((rows * ELEMENTS,), dtype)
            b = T.alloc_local((cols * ELEMENTS,), dtype)
            for k in T.serial(steps):
                if not a_in_place:
                    for i in T.unroll(rows):
                        for e in T.vectorized(ELEMENTS):
                            a[i * ELEMENTS + e] = load_a(i * TILE, k * TILE, row0, 0, lane_row, lane_col + e)
                if not b_in_place:
                    for j in T.unroll(cols):
                        for e in T.vectorized(ELEMENTS):
                            b[j * ELEMENTS + e] = load_b(k * TILE, j * TILE, 0, col0, lane_row, lane_col + e)
                for i, j in T.grid(rows, cols):
                    simdgroup_mma(
                        T.address_of(c[c_index(i, j)]),
                        T.address_of(A[i * TILE, k * TILE]) if a_in_place else T.address_of(a[i * ELEMENTS]),
                        T.address_of(B[k * TILE, j * TILE]) if b_in_place else T.address_of(b[j * ELEMENTS]),
                    )

        # A logical coordinate of a fragment names the same register in every simdgroup and lane, so the first
        # simdgroup's is used; a shared C is addressed by where this lane's elements really are.
        def c_element(i, j, e):
            if c_is_fragment:
                return (i * TILE, j * TILE + e)
            return (*c_lead, c_row + row0 + i * TILE + lane_row, c_col + col0 + j * TILE + lane_col + e)

        if c_in_place:

            @T.prim_func
            def gemm_in_registers() -> None:
                if clear_accum:
                    T.clear(C)
                accumulate(C, lambda i, j: (i * TILE, j * TILE))

            return _Simplify(gemm_in_registers, inline_let=True)

        @T.prim_func
        def gemm_through_registers() -> None:
            c = T.alloc_local((rows * cols * ELEMENTS,), "float32")
            for i, j in T.grid(rows, cols):
                for e in T.vectorized(ELEMENTS):
                    c[(i * cols + j) * ELEMENTS + e] = T.if_then_else(
                        clear_accum, T.float32(0), T.cast(C[c_element(i, j, e)], "float32")
                    )
            accumulate(c, lambda i, j: (i * cols + j) * ELEMENTS)
            for i, j in T.grid(rows, cols):
                for e in T.vectorized(ELEMENTS):
                    C[c_element(i, j, e)] = T.cast(c[(i * cols + j) * ELEMENTS + e], C.dtype)

        return _Simplify(gemm_through_registers, inline_let=True)


def simdgroup_mma(c, a, b) -> tirx.Call:
    """Return the call `c += a @ b` on one 8x8x8 product; each pointer is to this lane's two elements."""
    return tirx.call_intrin("handle", Op.get("tilelang_ext.metal_simdgroup_mma"), c, a, b)


def _operand_reader(buffer, region, transposed, dtype):
    """Return a function giving one element of an operand as it enters the product, converted to `dtype`."""
    *lead, first0, second0 = [r.min for r in region.region]
    in_registers = is_fragment(buffer)

    def read(tile_row, tile_col, row0, col0, lane_row, lane_col):
        if in_registers:  # any simdgroup's coordinate names the register; the element is the low bit of the column
            row, col = tile_row, tile_col + lane_col % ELEMENTS
        else:
            row, col = row0 + tile_row + lane_row, col0 + tile_col + lane_col
        first, second = (col, row) if transposed else (row, col)
        value = buffer[(*lead, first0 + first, second0 + second)]
        return value if str(buffer.dtype) == dtype else T.cast(value, dtype)

    return read



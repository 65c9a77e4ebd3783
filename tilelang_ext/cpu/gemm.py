"""`T.gemm` on one thread: three loops that accumulate in float32 and round once."""

from __future__ import annotations

from tilelang import language as T
from tilelang.tileop.gemm.gemm_base import GemmBase
from tilelang.transform.simplify import _Simplify
from tvm import tirx

from tilelang_ext.marks import REQUIRE_NATIVE_FP8

_PRODUCT_DTYPES = {"float64": "float64"}  # accumulator by C's dtype; else float32 for floats, and C's dtype for integers


class OneThreadGemm(GemmBase):
    """C (M, N) += A (M, K) B (K, N), each transposed or not, any mix of dtypes; regions with fixed leading indices."""

    def __post_init__(self) -> None:
        """Accept any two dtypes, since each element is converted separately."""
        if REQUIRE_NATIVE_FP8 in self.gemm_node.annotations:
            raise NotImplementedError(
                "T.gemm: require_native_fp8 needs a matrix unit that takes fp8; got target c, which decodes to float32; drop "
                "the requirement, or compile for sm_89, sm_90, sm_120, gfx950 or gfx1201"
            )

    def infer_layout(self, target, thread_nums):
        return {}

    def lower(self, layout_map, target, thread_bounds, thread_index, mbar_phase_expr=None):
        A, B, C = self.A, self.B, self.C
        M, N, K = int(self.M), int(self.N), int(self.K)
        trans_A, trans_B, clear_accum = bool(self.trans_A), bool(self.trans_B), self.clear_accum
        dtype = str(C.dtype)
        sum_dtype = _PRODUCT_DTYPES.get(dtype, "float32") if "float" in dtype else dtype

        # The inner loop runs along N, not K, so it carries no accumulator and can be vectorised.
        @T.prim_func
        def gemm_on_one_thread() -> None:
            total = T.alloc_local((N,), sum_dtype)
            for i in T.serial(M):
                for j in T.serial(N):
                    total[j] = T.if_then_else(clear_accum, T.cast(0, sum_dtype), T.cast(C[_at(self.CRegion, i, j)], sum_dtype))
                for k in T.serial(K):
                    for j in T.serial(N):
                        total[j] += T.cast(A[_at(self.ARegion, *((k, i) if trans_A else (i, k)))], sum_dtype) * T.cast(
                            B[_at(self.BRegion, *((j, k) if trans_B else (k, j)))], sum_dtype
                        )
                for j in T.serial(N):
                    C[_at(self.CRegion, i, j)] = T.cast(total[j], dtype)

        return _Simplify(gemm_on_one_thread, inline_let=True)


def _at(region: tirx.BufferRegion, row, col) -> tuple:
    *lead, first, second = (axis.min for axis in region.region)
    return (*lead, first + row, second + col)

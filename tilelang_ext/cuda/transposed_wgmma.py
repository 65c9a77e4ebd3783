"""fp8 GEMMs on Hopper with MN-major operands: they are transposed through shared memory, so that WGMMA runs.

    Before                                     After (B alone is not K-major)
    T.gemm(A_s, B_s, C)                        B_k: shared (N, K), swizzled for WGMMA
                                               every thread: B_k[n, k] = B_s[k, n], 4 x 4 codes at a time
                                               wgmma(A_s, B_k, C)

WGMMA takes K-major fp8 operands only. Upstream would run mma.sync, which the assembler compiles to conversions and half MMAs
for Hopper. Upstream's passes place the synchronisation, from the accesses.
"""

# Without `from __future__ import annotations`: this file holds macros.

import tilelang
import tilelang.language as T
from tilelang.cuda.intrinsics.macro.wgmma_macro_generator import TensorCoreIntrinEmitter
from tilelang.cuda.op.gemm.gemm_wgmma import GEMM_INST_WGMMA, GemmWGMMA
from tilelang.cuda.target import target_is_hopper
from tilelang.transform.simplify import _Simplify
from tilelang.utils.language import is_fragment, is_shared
from tvm import tirx

_BLOCK = 4  # a thread transposes 4 x 4 codes: it reads and writes whole words
_LANES_ALONG_K = 8  # 8 neighbouring lanes write 32 contiguous bytes


def needs_transposition(gemm, target, threads: int) -> bool:
    """Whether a GEMM would run on WGMMA if its operands were K-major, by upstream's rules for everything else."""
    a_fits = is_shared(gemm.A) or (is_fragment(gemm.A) and not gemm.trans_A)
    return (
        target_is_hopper(target)
        and not tilelang.transform.get_pass_context().config.get("tl.disable_wgmma", False)
        and bool(gemm.trans_A or not gemm.trans_B)
        and int(gemm.M) % 64 == 0
        and int(gemm.N) % 8 == 0
        and int(gemm.K) % 32 == 0
        and threads % 128 == 0
        and a_fits
        and is_shared(gemm.B)
        and is_fragment(gemm.C)
        and str(gemm.C.dtype) in ("float32", "float16")
    )


class TransposedWGMMA(GemmWGMMA):
    """WGMMA on K-major copies of the MN-major operands."""

    allow_f8f6f4_mixed_dtypes = True

    def _emitter(self, target, threads, thread=None) -> TensorCoreIntrinEmitter:
        m_warp, n_warp = self.policy.compute_warp_partition(self.M, self.N, threads, target, GEMM_INST_WGMMA)
        return TensorCoreIntrinEmitter(
            a_dtype=self.a_dtype,
            b_dtype=self.b_dtype,
            accum_dtype=self.accum_dtype,
            a_transposed=False,
            b_transposed=True,
            block_row_warps=m_warp,
            block_col_warps=n_warp,
            warp_row_tiles=int(self.M // m_warp),
            warp_col_tiles=int(self.N // n_warp),
            chunk=self.chunk,
            thread_var=thread,
        )

    def infer_layout(self, target, thread_nums):
        """Return layouts for the operands that WGMMA reads directly; an operand that is transposed first keeps its layout."""
        emitter = self._emitter(target, thread_nums)
        layouts = {self.C: emitter.make_mma_store_layout(self.C)}
        if is_fragment(self.A):
            layouts[self.A] = emitter.make_mma_load_layout(self.A, matrix="A")
        elif not self.trans_A:
            layouts[self.A] = self.infer_shared_layout(self.K)(self.A)
        if self.trans_B:
            layouts[self.B] = self.infer_shared_layout(self.K)(self.B)
        return layouts

    def lower(self, layout_map, target, thread_bounds, thread_index, mbar_phase_expr=None):
        threads = int(thread_bounds.extent)
        thread = thread_index - thread_bounds.min
        emitter = self._emitter(target, threads, thread)
        M, N, K = int(self.M), int(self.N), int(self.K)
        transposes_a, transposes_b = bool(self.trans_A), not self.trans_B
        clear_accum = self.clear_accum

        def multiply(A_k, B_k):
            """Issue the WGMMAs, on the copies of the transposed operands."""
            A, B = self.ARegion, self.BRegion
            if transposes_a:
                A, layout = self._k_major(A_k, M, K)
                emitter._assign_a_shared_layout(layout)
            elif self.A in layout_map:
                emitter._assign_a_shared_layout(layout_map[self.A])
            if transposes_b:
                B, layout = self._k_major(B_k, N, K)
                emitter._assign_b_shared_layout(layout)
            else:
                emitter._assign_b_shared_layout(layout_map[self.B])
            emitter.wgmma(A, B, self.CRegion, clear_accum, self.wg_wait)

        @T.prim_func
        def transpose_and_multiply() -> None:
            A_k = T.alloc_shared((M * K if transposes_a else 1,), self.a_dtype)
            B_k = T.alloc_shared((N * K if transposes_b else 1,), self.b_dtype)
            if transposes_a:
                self._transpose(self.ARegion, A_k, M, K, thread, threads)
            if transposes_b:
                self._transpose(self.BRegion, B_k, N, K, thread, threads)
            T.fence_proxy_async()  # makes the threads' writes visible to WGMMA, which reads through the async proxy
            multiply(A_k, B_k)

        return _Simplify(transpose_and_multiply, inline_let=True)

    def _k_major(self, copy, extent: int, K: int):
        """Return the (extent, K) operand that a copy holds, and its layout."""
        view = tirx.decl_buffer((extent, K), copy.dtype, data=copy.data, scope=copy.scope())
        return view[0:extent, 0:K], self.infer_shared_layout(K)(view)

    def _transpose(self, region, copy, extent: int, K: int, thread, threads: int) -> None:
        """Fill `copy` with the transpose (extent, K) of a region (K, extent), swizzled."""
        *lead, first_k, first = [axis.min for axis in region.region]
        source, dtype = region.buffer, region.buffer.dtype
        layout = self._k_major(copy, extent, K)[1]
        along_k, along_extent = K // _BLOCK, extent // _BLOCK
        blocks = along_k * along_extent

        def place(i, k):
            offset = 0
            for index, size in zip(layout.map_forward_index([i, k]), layout.get_output_shape(), strict=True):
                offset = offset * size + index
            return offset

        def merge(first, second, selector: int):
            return T.call_pure_extern("uint32", "__byte_perm", first, second, T.uint32(selector))

        @T.macro
        def transpose():
            codes = T.alloc_local((_BLOCK * _BLOCK,), dtype)
            pairs = T.alloc_local((_BLOCK,), "uint32")
            for step in T.unroll(-(-blocks // threads)):
                block = step * threads + thread
                if block < blocks:
                    k = (block // (_LANES_ALONG_K * along_extent) * _LANES_ALONG_K + block % _LANES_ALONG_K) * _BLOCK
                    i = block // _LANES_ALONG_K % along_extent * _BLOCK
                    for row in T.unroll(_BLOCK):
                        for v in T.vectorized(_BLOCK):
                            codes[row * _BLOCK + v] = source[(*lead, first_k + k + row, first + i + v)]
                    # Rows 2p and 2p + 1 of the block, columns 0 and 1, then 2 and 3: c0 c0' c1 c1', c2 c2' c3 c3'.
                    for pair in T.unroll(2):
                        first_row = T.reinterpret(codes[T.Ramp(pair * 8, 1, _BLOCK)], "uint32")
                        second_row = T.reinterpret(codes[T.Ramp(pair * 8 + 4, 1, _BLOCK)], "uint32")
                        pairs[pair] = merge(first_row, second_row, 0x5140)
                        pairs[2 + pair] = merge(first_row, second_row, 0x7362)
                    for half in T.unroll(2):
                        upper, lower = pairs[half * 2], pairs[half * 2 + 1]
                        copy[T.Ramp(place(i + half * 2, k), 1, _BLOCK)] = T.reinterpret(
                            merge(upper, lower, 0x5410), f"{dtype}x{_BLOCK}"
                        )
                        copy[T.Ramp(place(i + half * 2 + 1, k), 1, _BLOCK)] = T.reinterpret(
                            merge(upper, lower, 0x7632), f"{dtype}x{_BLOCK}"
                        )

        transpose()

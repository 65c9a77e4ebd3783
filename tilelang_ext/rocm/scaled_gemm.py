"""The MMA of codes with E8M0 scales on gfx950: `v_mfma_scale_f32_16x16x128_f8f6f4`, for fp8 and packed E2M1 in any pair.

Each lane passes the scale of row `lane % 16` of its operand and of the group of 32 of K at `lane // 16`, from a fragment that
`block_scaled.py` has filled. Scales belong to fixed elements of K, so a lane holds its elements in the instruction's order:
runs of 16 bytes, the runs of the four lane groups one after the other (see `instructions.py`).
"""

from __future__ import annotations

from tilelang import language as T
from tilelang.layout import make_swizzled_layout
from tilelang.transform.simplify import _Simplify

from tilelang_ext.rocm.device_text import scaled_product_name, scaled_product_text
from tilelang_ext.rocm.gemm import MfmaGemm, reader
from tilelang_ext.rocm.instructions import TILE, codes_per_byte, scaled_product
from tilelang_ext.rocm.layout import accumulator_layout, operand_layout

_RUN = 16  # bytes that are contiguous along K in a lane


class ScaledMfmaGemm(MfmaGemm):
    """A (M, 128) and B (N, 128) in shared memory, C a whole float32 fragment; scales as `block_scaled.py` passes them."""

    def infer_layout(self, target, thread_nums) -> dict:
        instruction, partition = self._scaled_plan(target, int(thread_nums))
        layouts = {self.C: accumulator_layout(self.C.shape, partition, instruction)}
        for name, operand, scale in (("A", self.A, self._scales[0]), ("B", self.B, self._scales[1])):
            layouts[operand] = make_swizzled_layout(operand)
            layouts[scale] = operand_layout(scale.shape, partition, instruction, 1, name, k_is_first=False)
        return layouts

    def lower(self, layout_map, target, thread_bounds, thread_index, mbar_phase_expr=None):
        instruction, partition = self._scaled_plan(target, int(thread_bounds.extent))
        groups, wave_size = instruction.groups, instruction.accumulator.wave
        thread = thread_index - thread_bounds.min
        wave, lane = thread // wave_size, thread % wave_size
        rows, cols = self.M // partition.rows // TILE, self.N // partition.cols // TILE  # tiles of this wave
        row0, col0 = wave % partition.rows * rows * TILE, wave // partition.rows * cols * TILE

        A, B, C = self.A, self.B, self.C
        scale_a, scale_b = self._scales
        a_dtype, b_dtype = str(A.dtype), str(B.dtype)
        a_bytes, b_bytes = (instruction.elements // codes_per_byte(dtype) for dtype in (a_dtype, b_dtype))
        read_a, read_b = reader(A, self.gemm_node.aRegion, False), reader(B, self.gemm_node.bRegion, False)
        text, multiply = scaled_product_text(a_dtype, b_dtype), scaled_product_name(a_dtype, b_dtype)

        def k_of(r, v):
            return r * groups * _RUN + lane // TILE * _RUN + v

        @T.prim_func
        def gemm_scaled() -> None:
            T.attr(0, "pragma_import_c", text)
            a = T.alloc_local((rows * a_bytes,), a_dtype)
            b = T.alloc_local((cols * b_bytes,), b_dtype)
            for i in T.unroll(rows):
                for r in T.unroll(a_bytes // _RUN):
                    for v in T.vectorized(_RUN):
                        a[i * a_bytes + r * _RUN + v] = read_a(row0 + i * TILE + lane % TILE, k_of(r, v))
            for j in T.unroll(cols):
                for r in T.unroll(b_bytes // _RUN):
                    for v in T.vectorized(_RUN):
                        b[j * b_bytes + r * _RUN + v] = read_b(col0 + j * TILE + lane % TILE, k_of(r, v))
            for i in T.unroll(rows):
                for j in T.unroll(cols):
                    T.call_extern(
                        "handle",
                        multiply,
                        T.address_of(C[i * TILE, j * TILE]),
                        T.address_of(a[i * a_bytes]),
                        T.address_of(b[j * b_bytes]),
                        scale_a[i * TILE, 0],
                        scale_b[j * TILE, 0],
                    )

        return _Simplify(gemm_scaled, inline_let=True)

    @property
    def _scales(self) -> tuple:
        return tuple(load.buffer for load in self.gemm_node.cCoords)

    def _scaled_plan(self, target, threads: int):
        instruction = scaled_product(str(self.A.dtype), str(self.B.dtype))
        return instruction, self._partition(target, threads, instruction.accumulator.wave)

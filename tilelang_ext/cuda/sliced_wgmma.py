"""WGMMA on the first columns of an MN-major B: its shared memory keeps the order of the whole buffer.

    B_s = T.alloc_shared((64, 192), "bfloat16")                panels of 64 columns, swizzled by 128 bytes, one TMA box each
    T.wgmma_gemm(A_s, B_s[:, 0:144], C)                        m64n144k16

Upstream lays B out by the columns of the MMA, here in nine panels of 16 columns, each a TMA box of rows of 32 bytes.
"""

from __future__ import annotations

from tilelang.cuda.op.gemm.gemm_wgmma import GemmWGMMA
from tvm import tirx
from tvm.ir import Range

_ROW_BYTES = 128  # of a swizzled panel


class SlicedWGMMA(GemmWGMMA):
    """WGMMA whose MN-major B may be the first columns of a buffer of whole panels."""

    @property
    def _panel(self) -> int:
        return _ROW_BYTES * 8 // int(self.B.dtype.bits)

    @property
    def _is_sliced(self) -> bool:
        columns = int(self.B.shape[-1])
        return self.is_gemm_ss() and not self.trans_B and int(self.N) < columns and columns % self._panel == 0

    def infer_layout(self, target, thread_nums):
        layouts = super().infer_layout(target, thread_nums)
        if self._is_sliced:
            layouts[self.B] = self.infer_shared_layout(self._panel)(self.B)
        return layouts

    @property
    def BRegion(self):
        """Return the operand, where it is sliced with all columns of its last panel: its descriptor names no end."""
        region = super().BRegion
        if not self._is_sliced:
            return region
        *others, columns = region.region
        whole = -(-int(columns.extent) // self._panel) * self._panel
        return tirx.BufferRegion(region.buffer, [*others, Range.from_min_extent(columns.min, whole)])

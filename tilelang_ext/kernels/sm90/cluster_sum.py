"""Tiles whose K is divided among the blocks of a cluster: each writes its accumulators to its shared memory, and sums a part.

sums.write(...)     every consumer, when all consumers of its block have multiplied: the memory of the stages is free then
T.cluster_sync()    all threads of the cluster
sums.add(...)       the accumulators of all blocks, in order, of eight neighbouring columns
T.cluster_sync()    no block may end while others read its memory
"""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.sm90.epilogue import accumulator_layout

GROUP = 8  # neighbouring columns
_PADDING = 8  # elements behind a row, so that rows of a thread's neighbours lie in other banks
_SOURCE = """
#ifndef TILELANG_EXT_CLUSTER_SUM
#define TILELANG_EXT_CLUSTER_SUM
__device__ __forceinline__ void tilelang_ext_write(void *memory, int index, float value) {
  reinterpret_cast<float *>(memory)[index] = value;
}
__device__ __forceinline__ void tilelang_ext_add_group(void *memory, int index, int block, float *sum) {
  unsigned own = static_cast<unsigned>(__cvta_generic_to_shared(memory)) + 4 * index, there;
  float x[8];
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(block));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "r"(there) : "memory");
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[4]), "=f"(x[5]), "=f"(x[6]), "=f"(x[7]) : "r"(there + 16) : "memory");
  for (int i = 0; i < 8; ++i) sum[i] += x[i];
}
__device__ __forceinline__ float tilelang_ext_float_of(void *memory, int index, int block) {
  unsigned own = static_cast<unsigned>(__cvta_generic_to_shared(memory)) + 4 * index, there;
  float x;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
  return x;
}
#endif
"""


def declare() -> None:
    """Declare the functions that `ClusterSum` calls; first thing in a kernel."""
    T.import_source(_SOURCE)


def float_of(memory, index, block):
    """Return an element of the same float32 buffer of a block of the cluster."""
    return T.call_extern("float32", "tilelang_ext_float_of", memory.access_ptr("r"), index, block)


def bytes_of(rows: int, columns: int) -> int:
    """Return the bytes of a tile of accumulators."""
    return rows * (columns + _PADDING) * 4


@dataclass(frozen=True, eq=False)
class ClusterSum:
    """Shared memory of every block of a cluster for the accumulators of a tile (rows, columns)."""

    memory: Any  # a buffer of any type, whose stages are free
    columns: int
    blocks: int

    def write(self, accumulator, first_row: int, is_transposed: bool) -> None:
        """Write an MMA tile whose rows, or with `is_transposed` columns of the tile, begin at `first_row`."""
        rows, columns = map(int, accumulator.shape)

        @T.macro
        def emit():
            for i, j in T.Parallel(rows, columns, loop_layout=accumulator_layout(rows, columns)):
                at = self._place(j, first_row + i) if is_transposed else self._place(first_row + i, j)
                T.evaluate(T.call_extern("handle", "tilelang_ext_write", self._pointer(), at, accumulator[i, j]))

        emit()

    def add(self, row, column, sums) -> None:
        """Add to `sums` (GROUP,) those of all blocks from (row, column) on."""

        @T.macro
        def emit():
            for block in T.unroll(self.blocks):
                at = self._place(row, column)
                T.evaluate(T.call_extern("handle", "tilelang_ext_add_group", self._pointer(), at, block, T.address_of(sums[0])))

        emit()

    def _pointer(self):
        return self.memory.access_ptr("rw")

    def _place(self, row, column):
        return row * (self.columns + _PADDING) + column

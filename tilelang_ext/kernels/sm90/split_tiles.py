"""Tiles whose K blocks were divided among thread blocks: accumulators go from one block to another through global memory.

| memory | shape | what |
| --- | --- | --- |
| partial | (blocks, elements of a tile), float32 | accumulators that a block gives to the one that finishes the tile |
| given | (blocks, consumers), int64 | `_GIVEN` from when a consumer has written its rows until they have been read |

The memory comes from a workspace in which anything may have been left. A word that says "given" is therefore no 1 but a
constant of 64 bits that nothing else writes (as two floats, two signalling NaNs, which no instruction makes), and whoever has
waited for it clears it: it is never left over from a kernel before.
"""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.sm90.epilogue import accumulator_layout
from tilelang_ext.kernels.sm90.roles import WARPGROUP, warpgroup_sync

_GIVEN = "0x7fb5c1d97fa3e2f1"
SOURCE = f"""
#ifndef TILELANG_EXT_SPLIT_TILES
#define TILELANG_EXT_SPLIT_TILES
__device__ __forceinline__ void tilelang_ext_give(void *word) {{
  asm volatile("fence.acq_rel.gpu;\\n\\tst.release.gpu.global.b64 [%0], %1;" ::"l"(word), "l"({_GIVEN}LL) : "memory");
}}
__device__ __forceinline__ void tilelang_ext_await(void *word) {{
  long long value;
  do {{
    asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  }} while (value != {_GIVEN}LL);
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(word), "l"(0LL) : "memory");
}}
#endif
"""


def declare() -> None:
    """Declare the functions that `give` and `wait_for` call; first thing in a kernel."""
    T.import_source(SOURCE)


def give(word) -> None:
    """Say by an element of `given` that what this thread and those that it has met have written may be read."""
    T.evaluate(T.call_extern("handle", "tilelang_ext_give", T.address_of(word)))


def wait_for(word) -> None:
    """Wait for what an element of `given` says, and clear it."""
    T.evaluate(T.call_extern("handle", "tilelang_ext_await", T.address_of(word)))


@dataclass(frozen=True, eq=False)
class SplitTiles:
    """The two tensors of the module's table; a block's place in them may be several indices."""

    partial: Any
    given: Any

    def give(self, block, consumer: int, row: int, accumulators: list, thread) -> None:
        """Write the accumulators of a consumer, MMA tiles below each other from `row` of the tile on, and say so."""
        given, at = self.given, (*_indices(block), consumer)

        @T.macro
        def emit():
            warpgroup_sync(consumer)
            if thread % WARPGROUP == 0:
                give(given[at])

        for m, accumulator in enumerate(accumulators):
            self._each(accumulator, m, row, block, False)
        emit()

    def add(self, block, consumer: int, row: int, accumulators: list, thread) -> None:
        """Wait for what consumer `consumer` of another block gives, and add it to these accumulators."""
        given, at = self.given, (*_indices(block), consumer)

        @T.macro
        def emit():
            if thread % WARPGROUP == 0:
                wait_for(given[at])
            warpgroup_sync(consumer)

        emit()
        for m, accumulator in enumerate(accumulators):
            self._each(accumulator, m, row, block, True)

    def _each(self, accumulator, m: int, row: int, block, is_added: bool) -> None:
        rows, columns = map(int, accumulator.shape)
        partial, first, of_block = self.partial, (row // rows + m) * rows * columns, _indices(block)

        @T.macro
        def emit():
            for i, j in T.Parallel(rows, columns, loop_layout=accumulator_layout(rows, columns)):
                if is_added:
                    accumulator[i, j] += partial[(*of_block, first + _place(i, j))]
                else:
                    partial[(*of_block, first + _place(i, j))] = accumulator[i, j]

        emit()


def _indices(block) -> tuple:
    return block if isinstance(block, tuple) else (block,)


def _place(i, j):
    """Return where an element of an accumulator lies: four registers of a thread beside each other, then those of the next."""
    thread = i // 16 * 32 + i % 8 * 4 + j % 8 // 2
    return (j // 8 * WARPGROUP + thread) * 4 + i % 16 // 8 * 2 + j % 2

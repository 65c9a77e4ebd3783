"""The epilogue of a consumer warpgroup: subtiles of the result go through shared memory to TMA stores.

Each warpgroup has a few shared buffers, so that a store reads one while the next subtile is written to another. Deferred
subtiles stay in registers and are stored between the MMAs of the next tile: all blocks end their tiles at about the same time
and would otherwise wait for each other's stores.
"""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.sm90.roles import WARPGROUP, warpgroup_sync

_BUFFERS = 2  # of a consumer
_STORES = 4  # of a thread, in flight together


def accumulator_layout(rows: int, columns: int):
    """Return the layout of a WGMMA accumulator: which thread of the warpgroup, and which of its registers, holds (i, j)."""

    def thread_and_register(i, j):
        return i // 16 * 32 + i % 8 * 4 + j % 8 // 2, j // 8 * 4 + i % 16 // 8 * 2 + j % 2

    return T.Fragment((rows, columns), forward_fn=thread_and_register)


def round_subtile(accumulator, n: int, values_f) -> None:
    """Round subtile n of an accumulator to the dtype of `values_f`; every thread keeps the elements that it has."""
    (rows, columns), dtype = map(int, values_f.shape), str(values_f.dtype)

    @T.macro
    def emit():
        for i, j in T.Parallel(rows, columns, loop_layout=accumulator_layout(rows, columns)):
            values_f[i, j] = T.cast(accumulator[i, n * columns + j], dtype)

    emit()


@dataclass(frozen=True, eq=False)
class SubtileStores:
    """The TMA stores of one consumer warpgroup: at most one in flight per shared buffer.

    The subtiles of a tile are numbered by the order in which they are stored; a subtile takes the buffer
    `number % len(buffers)`. The buffers are allocated one by one: upstream writes a fragment by matrix instructions only where
    it fills a whole buffer.
    """

    warpgroup: int
    out: Any  # (M, N) in global memory
    buffers: list  # of shared memory, (rows, columns) each
    by_tma: bool = True  # else threads store rows: of any number of bytes

    def store(self, number: int, values_f, row, column, condition=None) -> None:
        """Copy a subtile from registers to its shared buffer and issue its TMA store to (row, column) of out.

        With `condition`, which is the same in all threads, the store is issued only where it holds.
        """
        out_s = self.buffers[number % len(self.buffers)]

        @T.macro
        def issue(row, column):
            self._issue(out_s, row, column)

        @T.macro
        def emit():
            self._acquire(number)
            T.copy(values_f, out_s)
            self._publish()
            if condition is None or condition:
                issue(row, column)

        emit()

    def _acquire(self, number: int) -> None:
        """Wait until a subtile's buffer has been read."""
        # The last store of the tile before may have read any buffer; its main loop lies between, so that no thread waits long.
        in_flight = len(self.buffers) - 1 if number else 0
        if self.by_tma:  # one thread waits for the store that last read this buffer, and the others for that thread
            T.evaluate(T.tma_store_wait(in_flight))
        warpgroup_sync(self.warpgroup)

    def _publish(self) -> None:
        """Let the store see what all threads have written to a buffer."""
        if self.by_tma:
            T.evaluate(T.fence_proxy_async())
        warpgroup_sync(self.warpgroup)

    def _issue(self, out_s, row, column) -> None:
        """Store a buffer to (row, column) of out."""
        out, (rows, columns) = self.out, map(int, out_s.shape)

        @T.macro
        def by_threads():
            # Neighbouring threads have neighbouring columns. Not unrolled: addresses would take registers of accumulators.
            for n in T.unroll(rows * columns // WARPGROUP, unroll_factor=_STORES):
                i = (n * WARPGROUP + T.get_thread_binding() % WARPGROUP) // columns
                j = (n * WARPGROUP + T.get_thread_binding() % WARPGROUP) % columns
                if row + i < out.shape[0] and column + j < out.shape[1]:
                    out[row + i, column + j] = out_s[i, j]

        if self.by_tma:
            T.evaluate(T.tma_copy(out_s, out[row : row + rows, column : column + columns]))
        else:
            by_threads()

    def round_and_store(self, number: int, accumulator, n: int, row, column) -> None:
        """Round subtile n of an accumulator that begins at (row, column), and store it."""
        (rows, columns), dtype = map(int, self.buffers[0].shape), self.buffers[0].dtype

        @T.macro
        def emit():
            out_f = T.alloc_fragment((rows, columns), dtype)
            round_subtile(accumulator, n, out_f)
            self.store(number, out_f, row, column + n * columns)

        emit()

    def round_and_store_transposed(self, number: int, accumulator, n: int, row, column) -> None:
        """Round subtile n of an accumulator whose columns are rows of out, and store it; it begins at (row, column).

        The subtile has as many columns of the accumulator as a shared buffer has rows.
        """
        out_s = self.buffers[number % len(self.buffers)]
        (rows, columns), dtype = map(int, out_s.shape), out_s.dtype

        @T.macro
        def emit():
            self._acquire(number)
            for i, j in T.Parallel(columns, rows, loop_layout=accumulator_layout(columns, rows)):
                out_s[j, i] = T.cast(accumulator[i, n * rows + j], dtype)
            self._publish()
            self._issue(out_s, row + n * rows, column)

        emit()

    def drain(self) -> None:
        """Wait until every store has read its buffer; a block must not end before."""
        if self.by_tma:
            T.evaluate(T.tma_store_wait(0))


@dataclass(frozen=True, eq=False)
class DeferredSubtiles:
    """The last subtiles of a tile, kept in registers until the next tile's main loop.

    Subtile i of `values` has number first + i, is `columns` wide, and is stored in K block 1 + i * interval of the next tile.
    """

    stores: SubtileStores
    values: list  # fragments (rows, columns) of the result's dtype
    coord: Any  # int32 (2,): first row and column of the tile in out
    first: int
    interval: int  # K blocks from one store to the next

    def defer(self, row, column) -> None:
        """Remember where the tile lies whose subtiles `values` now holds."""
        coord = self.coord

        @T.macro
        def emit():
            coord[0], coord[1] = row, column

        if self.values:
            emit()

    def store_due(self, k, any_deferred) -> None:
        """In K block k of a tile, store the deferred subtile whose turn it is, if there are `any_deferred`."""
        for i, _ in enumerate(self.values):
            self._store_if(i, any_deferred & (k == 1 + i * self.interval))

    def store_all(self, any_deferred) -> None:
        """After the last tile, store what is still deferred, if there are `any_deferred`."""
        for i, _ in enumerate(self.values):
            self._store(i, any_deferred)

    def _store_if(self, i: int, due) -> None:
        @T.macro
        def emit():
            if due:
                self._store(i)

        emit()

    def _store(self, i: int, condition=None) -> None:
        number = self.first + i
        columns = int(self.values[i].shape[1])
        self.stores.store(number, self.values[i], self.coord[0], self.coord[1] + number * columns, condition)


def alloc_stores(out, num_consumers: int, rows: int, columns: int, by_tma: bool = True) -> list[SubtileStores]:
    """Allocate the shared buffers of every consumer, for subtiles (rows, columns) of out."""
    return [
        SubtileStores(warpgroup, out, [T.alloc_shared((rows, columns), out.dtype) for _ in range(_BUFFERS)], by_tma)
        for warpgroup in range(num_consumers)
    ]


def alloc_deferred(stores: SubtileStores, subtiles: int, count: int, interval: int) -> DeferredSubtiles:
    """Allocate the registers of the last `count` of a tile's `subtiles`, each of the shape and the dtype of a shared buffer."""
    (rows, columns), dtype = map(int, stores.buffers[0].shape), stores.buffers[0].dtype

    @T.macro
    def alloc_coord():
        coord = T.alloc_local((2,), "int32")
        coord[0], coord[1] = 0, 0
        return coord

    @T.macro
    def alloc_values():
        values_f = T.alloc_fragment((rows, columns), dtype)
        T.clear(values_f)
        return values_f

    coord = alloc_coord()
    return DeferredSubtiles(stores, [alloc_values() for _ in range(count)], coord, subtiles - count, interval)

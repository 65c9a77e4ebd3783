"""Which tile, and how many splits of K, `sm90_persistent` takes for a matmul: the fastest by a small model of an H200.

    K block = both(greater of MMAs and shared memory, loads)
    busy    = waves * (K blocks of a unit * K block + end of a unit), or longer at the power limit
    memory  = bytes of a, b and out / rate
    time    = launch + both(busy, memory) + what the sum over splits takes

where both(x, y) is the greater and a part of the lesser, which does not overlap.

The constants were fitted to measured times of 344 sizes and layouts (benchmark/fit_matmul.py, docs/log/matmul.md). Only their
order matters: the model chooses, it does not promise.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.problem import TMA_ALIGNMENT, Epilogue, Problem
from tilelang_ext.kernels.sm90.cluster_sum import bytes_of
from tilelang_ext.kernels.sm90.multicast import BLOCKS
from tilelang_ext.kernels.sm90.scheduler import FEWEST_ITERATIONS

CLUSTERS = "cluster_dims" in inspect.signature(T.Kernel).parameters  # not in tilelang 0.1.14
BLOCK_K = 64  # elements of a swizzled row of 128 bytes of shared memory
_SUBTILE_BYTES = 128  # of a row of a subtile
_MAX_DEFERRED = 3  # subtiles of float32
_MAX_SPLITS = 16
_MOST_ADDED = 6  # splits whose accumulators one block adds
_ROWS = 64  # of an MMA, and elements of a panel of an operand that is not K-major
# Numbers of rows between multiples of these have the same choice, up to so many rows.
_GRANULES = ((512, 16), (2**31, _ROWS))
_NEIGHBOURS = 16  # multiples that are tried on each side
_MIN_K_BLOCKS = 4  # of a split
_SLOW_ROW = 2048  # elements of whose multiples rows are slow to read at different k
_ROTATED = 8  # K blocks of a unit at least
MOST_ROWS = 4  # of `sm90_vecmat`
_MOST_JOINED = {2: 66, 3: 39}  # clusters of so many blocks that run at once on an H200, or fewer
_MOST_CLUSTERS = {4: 30}  # of so many blocks that share loads and run at once, or fewer
_MOST_STREAMED = 4  # waves of tiles whose K blocks are divided in equal parts
_CACHED = 3e7  # bytes of an operand that the L2 cache keeps while others read it


class _Cluster:
    """Where the blocks of a cluster lie: `cluster` of them, beside each other where they share A alone."""

    cluster: int
    shares_a: bool

    @property
    def tiles_below(self) -> int:
        """Blocks of a cluster below each other, which share the loads of B."""
        return 1 if self.shares_a else min(self.cluster, BLOCKS)

    @property
    def tiles_beside(self) -> int:
        """Blocks of a cluster beside each other, which share the loads of A."""
        return self.cluster // self.tiles_below


@dataclass(frozen=True)
class Config(_Cluster):
    """Tile of a block, its consumer warpgroups, stages of the pipeline, columns and deferred ones of its subtiles, whether K is
    split, blocks of the grid, and rows of tiles that are walked together.
    """

    block_M: int
    block_N: int
    num_consumers: int
    num_stages: int
    subtile_N: int
    deferred: int
    is_split: bool
    num_blocks: int
    a_rows: int  # rows of A of a stage: those of the tile, or fewer
    cluster: int = 1  # blocks that share loads: two below or beside each other, or four as a square
    is_swapped: bool = False  # whether rows of the tile are columns of out, so that A is the operand b and B is a
    adds: bool = False  # whether the block with the last range of K adds the accumulators of the others, and finishes the tile
    shares_a: bool = False
    streams: bool = False  # whether every block has an equal part of the K blocks of all tiles
    joined: int = 1  # blocks of a cluster that have a range of K of one tile each, the last of which adds
    rotates: bool = False  # whether blocks begin with different K blocks, since all load the same rows
    group_rows: int = 8

    @property
    def cluster_blocks(self) -> int:
        """Blocks of a cluster, which share loads or have a range of K each."""
        return self.cluster * self.joined


@dataclass(frozen=True)
class Tile(_Cluster):
    """A tile that a kernel can have."""

    block_M: int
    block_N: int
    num_consumers: int
    deferred: int
    cluster: int = 1
    thin: int = 0  # rows of A of a stage, where those are fewer than an MMA's
    is_swapped: bool = False
    adds: bool = False
    shares_a: bool = False
    streams: bool = False
    joins: bool = False  # whether the ranges of K are those of the blocks of a cluster

    @property
    def a_rows(self) -> int:
        return self.thin or self.block_M

    def units(self, M: int, N: int) -> int:
        """Return the tiles of a result, in whole clusters."""
        below, beside = self.tiles_below, self.tiles_beside
        return _ceildiv(M, self.block_M * below) * _ceildiv(N, self.block_N * beside) * self.cluster


_SHARED_BYTES = 226 * 1024
_MOST_STAGES = 20
_MOST_REGISTERS = 176  # of a thread, for accumulators
_MOST_FINISHED = 80  # of those, where a swapped tile, or one of subtiles of 16 columns, has an epilogue
_MOST_SWAPPED = 1024  # rows of swapped operands: more fill multiples of 64 well, and transposed stores are slower


def _rows_of_swapped_subtile(block_N: int) -> int:
    return max(rows for rows in range(8, 65, 8) if block_N % rows == 0)


def columns_loaded(columns: int, is_k_major: bool) -> int:
    """Return the columns of B that a stage has for those of a tile: of an N-major operand whole panels."""
    return columns if is_k_major or columns <= BLOCK_K // 2 else _ceildiv(columns, BLOCK_K) * BLOCK_K


_DEFERRED = {96: 2, 128: 1, 160: 3, 192: 2, 224: 4, 256: 3}  # by columns, where registers hold so many beside the accumulators


def _tile(block_M: int, block_N: int, num_consumers: int, is_swapped: bool, cluster: int, shares_a: bool) -> Tile:
    has_room = not is_swapped and (block_M // num_consumers == _ROWS or block_N == 128)
    deferred = _DEFERRED.get(block_N, 0) if has_room else 0
    return Tile(block_M, block_N, num_consumers, deferred, cluster, 0, is_swapped, shares_a=shares_a)


TILES = (
    # For few rows: TMA takes long to fill rows past the end with zeros, and more stages fit
    *(
        Tile(64, block_N, 1, _DEFERRED.get(block_N, 0), thin=thin)
        for block_N in (32, 64, 80, 96, 128, 160, 192, 256)
        for thin in (16, 32)
    ),
    # Rows that fill no multiple of 64 are better swapped: each is a column of the MMAs, which have any multiple of 16. The
    # blocks of a cluster each load half of an operand, where loads take longer than MMAs.
    *(
        _tile(block_M, block_N, consumers, is_swapped, blocks, shares_a)
        for block_M, consumers in ((64, 1), (128, 2), (256, 2))
        for block_N in range(16, 257, 16)
        for is_swapped in (False, True)
        for blocks, shares_a in ((1, False), (2, False), (2, True), (4, False))
        if block_M // (_ROWS * consumers) * block_N // 2 <= _MOST_REGISTERS
        if block_N >= 32 or is_swapped
        if blocks == 1 or block_N >= 64
    ),
)
_LAUNCH_US, _CLUSTER_US, _SQUARE_US = 1.718, 0.7021, 0.7995  # the last two beside the first, of clusters of two and of four
_DOUBT = 1.01  # of a cluster, which must be the faster by more than the model errs between much the same tiles
_MEMORY = 4.553e06  # bytes per microsecond
_AGAIN = 0.09549  # of an operand that several tiles read, beside its bytes
# Operations per microsecond at the power limit, and operations that take as much as a row of 128 bytes of shared memory
_POWER, _ROW_OPERATIONS = 9.489e08, 1023
_OVERLAP, _OVERLAP_LOADS = 0.4235, 0.1098
_SUM_US, _SUM = 0.8851, 4.903e06  # of the second kernel, beside its bytes; bytes per microsecond of accumulators, out and in
_GIVE_US, _ADDED = 1.399, 7.566e04  # where one block adds: until accumulators are there, and bytes of them per microsecond
_STREAM_US, _STREAMED, _REREAD = 1.904, 1.067e05, 0.02169  # the same for parts of several tiles
_JOIN_US, _JOINED = 0.08518, 1.078e05  # in a cluster: for each block but one, and bytes of accumulators per microsecond
_TURN_US = 1.115  # of the copy of `a` to another order
_MMA_US, _MMA_ELEMENT_US = 0.02604, 1.17e-05  # MMAs of a K block: of each, and of an element of the tile
_ALONE_US = 0.01897  # of a K block of one consumer
_SHARED_MEMORY_US = 0.0004891  # of a row of 128 bytes
# The end of a unit, and the stores of an element of the tile, of swapped operands by single elements
_STORE_ROW_US = 0.001108  # of a row of a subtile
_UNIT_US, _UNIT_ELEMENT_US, _SWAPPED_ELEMENT_US = 0.0228, 2.693e-05, 8.67e-05
# Of TMA, for a row of 128 bytes: one that begins at a multiple of 32 bytes, another, past the end, and with its last part there
_ROW_US, _SPLIT_ROW_US, _EMPTY_ROW_US, _CUT_ROW_US = 0.001059, 0.002315, 0.002153, 0.002068
_NARROW_ROW_US, _SHARED_NARROW_US = 0.001475, 0.008742  # of a row of at most 64 bytes
_SHARED_ROW_US = 0.01004  # of those that all SMs load at the same time, since they are all that the operand has
_CROWD = 1.5
_CACHE_ROW_US, _SPLIT_BYTES = 0.000305, 0.8911  # of the L2 cache, where all SMs load; bytes of it beside those of a row
_SECTOR = 16  # elements of 32 bytes, the L2 cache's unit


def pick_config(problem: Problem) -> tuple[Config, int]:
    """Return the configuration and the number of splits with the least predicted time."""
    tile, splits = _pick(_rounded(problem))
    return config_of(tile, problem, splits), splits


def least_us(problem: Problem) -> float:
    """Return the least predicted time."""
    of = _rounded(problem)
    return predicted_us(*_pick(of), of)


def rows_alike(M: int) -> tuple[int, int]:
    """Return the rows that `sm90_vecmat` does not tell apart: one, two, three and four, or all others."""
    return next((rows for rows in ((1, 1), (2, 2), (3, MOST_ROWS)) if rows[1] >= M), (MOST_ROWS + 1, 2**31))


def is_turned(problem: Problem) -> bool:
    """Return whether an M-major `a` is first copied to K-major order."""
    if problem.a_is_k_major or problem.M >= _ROWS or problem.K % TMA_ALIGNMENT or problem.M % TMA_ALIGNMENT:
        return False
    as_is, turned = (_rounded(replace(problem, a_is_k_major=is_k_major)) for is_k_major in (False, True))
    return _TURN_US + predicted_us(*_pick(turned), turned) < predicted_us(*_pick(as_is), as_is)


def rows_of_choice(problem: Problem) -> tuple[int, int]:
    """Return the fewest and the most rows, about those of the problem, that have its tile and its splits."""
    first = last = _most_rows(problem.M)
    choice = _choice(problem, first)
    for _ in range(_NEIGHBOURS):
        before = _rows_before(first)
        first = before if before and _choice(problem, before) == choice else first
        after = _most_rows(last + 1)
        last = after if _choice(problem, after) == choice else last
    return _rows_before(first) + 1, last


def _choice(problem: Problem, rows: int) -> tuple:
    """Return all that a number of rows, one of `_most_rows`, decides."""
    of = _rounded(problem, rows)
    return is_turned(of), _pick(of), config_of(_pick(of)[0], of).rotates


def _rows_before(rows: int) -> int:
    """Return the next smaller number of rows of `_most_rows`, or 0."""
    granule = _granule(rows)
    return (rows - 1) // granule * granule


def _most_rows(rows: int) -> int:
    """Return the most rows that are not told apart from these."""
    granule = _granule(rows)
    return _ceildiv(rows, granule) * granule


def _granule(rows: int) -> int:
    return next(granule for most, granule in _GRANULES if rows <= most)


def _rounded(problem: Problem, rows: int | None = None) -> Problem:
    """Return the problem with the most rows that are not told apart from its own, or `rows`.

    Those of an M-major `a` are as many multiples of 16 bytes, and no more of 32, as the variants tell apart (`launch`).
    """
    most = _most_rows(problem.M) if rows is None else rows
    has_split_rows = not problem.a_is_k_major and problem.M % _SECTOR == TMA_ALIGNMENT
    return replace(problem, M=most - TMA_ALIGNMENT if has_split_rows else most)


def config_of(tile: Tile, problem: Problem, splits: int = 1) -> Config:
    """Return the configuration of a tile: no subtile is deferred where the next unit has too few K blocks to store it in."""
    k_blocks = _ceildiv(problem.K, BLOCK_K)
    subtile_N = math.gcd(tile.block_N, _SUBTILE_BYTES // _bytes_of(problem.out_dtype))
    # Registers hold as many bytes of deferred subtiles for each dtype; the next unit must have the K blocks to store them in.
    count = tile.deferred if problem.out_dtype != "float32" else min(tile.deferred, _MAX_DEFERRED)
    deferred = count if k_blocks > 2 * count and problem.N % TMA_ALIGNMENT == 0 else 0
    if tile.is_swapped:
        subtile_N, deferred = _rows_of_swapped_subtile(tile.block_N), 0
    if tile.streams:
        deferred = 0
    if splits > 1:
        deferred = 0
        subtile_N = subtile_N if tile.adds else 0
    b_is_k_major = problem.a_is_k_major if tile.is_swapped else problem.b_is_k_major
    return Config(
        tile.block_M,
        tile.block_N,
        tile.num_consumers,
        _stages(tile, columns_loaded(tile.block_N, b_is_k_major), subtile_N * _bytes_of(problem.out_dtype)),
        subtile_N,
        deferred,
        splits > 1,
        _blocks(problem, tile, splits),
        tile.a_rows,
        tile.cluster,
        tile.is_swapped,
        tile.adds,
        tile.shares_a,
        tile.streams,
        splits if tile.joins else 1,
        _rotates(problem, tile, splits),
    )


def _rotates(problem: Problem, tile: Tile, splits: int) -> bool:
    """Return whether all blocks load the same rows of `a`, and from places that many reads at once make slow."""
    has_all_rows = min(_ROWS, tile.block_N if tile.is_swapped else tile.block_M) >= problem.M
    is_long = _ceildiv(problem.K, BLOCK_K) >= _ROTATED * splits
    if not problem.b_is_k_major and problem.N % _SLOW_ROW == 0:  # K blocks would lie in the same channels of memory
        return False
    return has_all_rows and is_long and not tile.streams and not (problem.a_is_k_major and problem.b_is_k_major)


def _blocks(problem: Problem, tile: Tile, splits: int) -> int:
    """Return the blocks of the grid: whole clusters."""
    of_cluster = splits if tile.joins else tile.cluster
    return min(problem.num_sms // of_cluster, _MOST_CLUSTERS.get(of_cluster, problem.num_sms)) * of_cluster


def _stages(tile: Tile, b_rows: int, subtile_bytes: int) -> int:
    """Return the stages that fit beside the buffers of subtiles, rows of which have so many bytes."""
    subtiles = 2 * tile.num_consumers * _ROWS * subtile_bytes
    padding = max(_ROWS - tile.a_rows, 0) * BLOCK_K * 2
    return min(_MOST_STAGES, (_SHARED_BYTES - subtiles - padding) // ((tile.a_rows + b_rows) * BLOCK_K * 2))


def choices(problem: Problem) -> Iterator[tuple[Tile, int]]:
    """Yield tiles and numbers of splits to try: splits that fill at most two waves of SMs, none of which has no K block."""
    k_blocks = _ceildiv(problem.K, BLOCK_K)
    for tile in TILES:
        of = problem.swapped() if tile.is_swapped else problem
        if tile.thin and (tile.thin < problem.M or not problem.a_is_k_major):
            continue
        if tile.is_swapped and (problem.M > _MOST_SWAPPED or tile.block_N > _ceildiv(problem.M, 16) * 16):
            continue
        if (tile.tiles_beside > 1 and tile.block_N >= of.N) or (tile.tiles_below > 1 and tile.block_M >= of.M):
            continue
        if tile.cluster > 1 and not CLUSTERS:
            continue
        # Would spill: accumulators are finished one by one, and of swapped operands need more beside them.
        registers = tile.block_M // (_ROWS * tile.num_consumers) * tile.block_N // 2
        most = _MOST_FINISHED if tile.is_swapped or tile.block_N % 32 else _MOST_REGISTERS
        if problem.epilogue != Epilogue() and (tile.block_M > 128 or registers > most):
            continue
        # A transposed subtile of float32 would have rows of 256 bytes.
        needs_sum = tile.is_swapped and problem.out_dtype == "float32"
        units = tile.units(of.M, of.N)
        blocks = _blocks(problem, tile, 1)
        fills_no_wave = units % blocks > 0 and units <= _MOST_STREAMED * blocks
        if fills_no_wave and units * k_blocks > blocks * FEWEST_ITERATIONS and not needs_sum and not tile.thin:
            yield replace(tile, streams=True), 1
        for splits in range(1, max(1, min(_MAX_SPLITS, k_blocks // _MIN_K_BLOCKS)) + 1):
            is_whole = (splits - 1) * _ceildiv(k_blocks, splits) < k_blocks
            if splits == 1 or (is_whole and units * splits <= 2 * problem.num_sms):
                if splits > 1 or not needs_sum:
                    yield tile, splits
                # A block waits for blocks of lower index alone, which the GPU starts first: of one wave.
                is_one_wave = units * splits <= blocks
                if units <= _MOST_JOINED.get(splits, 0) and tile.cluster == 1 and not tile.thin and CLUSTERS:
                    joined = replace(tile, joins=True)
                    if _has_memory(joined, problem, splits):
                        yield joined, splits
                if 1 < splits <= _MOST_ADDED and is_one_wave and not needs_sum:
                    yield replace(tile, adds=True), splits


def _has_memory(tile: Tile, problem: Problem, splits: int) -> bool:
    """Return whether the larger operand's stages hold the accumulators of a tile."""
    config = config_of(tile, problem, splits)
    shape = (tile.block_N, tile.block_M) if tile.is_swapped else (tile.block_M, tile.block_N)
    return config.num_stages * max(tile.a_rows, tile.block_N) * BLOCK_K * 2 >= bytes_of(*shape)


def predicted_us(tile: Tile, splits: int, problem: Problem) -> float:
    """Return the time that the model predicts."""
    problem = problem.swapped() if tile.is_swapped else problem
    M, N, K, area = problem.M, problem.N, problem.K, tile.block_M * tile.block_N
    tile_columns = _ceildiv(N, tile.block_N)
    units = tile.units(M, N) * splits
    blocks = problem.num_sms if tile.cluster <= BLOCKS else _blocks(problem, tile, 1)
    waves, busy_sms = _ceildiv(units, blocks), min(1.0, units / problem.num_sms)
    k_blocks = _ceildiv(_ceildiv(K, BLOCK_K), splits)
    steps = waves * k_blocks  # K blocks of a block
    if tile.streams:
        steps, busy_sms = _ceildiv(units * k_blocks, _blocks(problem, tile, 1)), 1.0
    sms = busy_sms, busy_sms / splits
    of_a = _load_us(tile.a_rows, M, problem.a_row, problem.a_is_k_major, _ceildiv(M, tile.block_M), waves, sms)
    of_b = _load_us(tile.block_N, N, problem.b_row, problem.b_is_k_major, tile_columns, waves, sms)
    # What overlaps no better for being shared is as in one block.
    loads, alone = (
        max(one / beside + other / below for one, other in zip(of_a, of_b, strict=True))
        for beside, below in ((tile.tiles_beside, tile.tiles_below), (1, 1))
    )
    # Rows of 128 bytes that go through shared memory: what each MMA reads of both operands, and what is loaded.
    columns = columns_loaded(tile.block_N, problem.b_is_k_major)
    rows = tile.block_M // _ROWS * (_ROWS + tile.block_N) + tile.a_rows + columns
    mma = max(_MMA_US + _MMA_ELEMENT_US * area, rows * _SHARED_MEMORY_US)
    mma += _ALONE_US if tile.num_consumers == 1 else 0.0
    store = _SWAPPED_ELEMENT_US if tile.is_swapped else _UNIT_ELEMENT_US
    stores = store * area
    if not tile.is_swapped:
        stores += _STORE_ROW_US * area / math.gcd(tile.block_N, _SUBTILE_BYTES // 2)
    end = _UNIT_US + (stores if splits == 1 or tile.adds or tile.joins else 0.0)
    busy = steps * (max(mma, loads) + _OVERLAP_LOADS * min(mma, alone)) + waves * end
    busy = max(busy, units * k_blocks * (2 * area * BLOCK_K + _ROW_OPERATIONS * rows) / _POWER)
    # An operand that several tiles read at the same time comes from memory more slowly.
    a_bytes, b_bytes = (
        2 * extent * K * (1 + (_AGAIN if tiles > beside else 0.0))
        for extent, tiles, beside in ((M, tile_columns, tile.tiles_beside), (N, _ceildiv(M, tile.block_M), tile.tiles_below))
    )
    memory = (a_bytes + b_bytes + _bytes_of(problem.out_dtype) * M * N) / _MEMORY
    if tile.streams:
        # Of an operand that the L2 cache does not hold, blocks beside or below each other read other K blocks.
        for operand, others in (
            (M * K, tile_columns / tile.tiles_beside),
            (N * K, _ceildiv(M, tile.block_M) / tile.tiles_below),
        ):
            if 2 * operand > _CACHED:
                memory += _REREAD * 2 * operand * (others - 1) / _MEMORY
        givers = max(1, k_blocks / steps)
        add = _STREAM_US + (1 + givers) * 4 * area / _STREAMED
    elif tile.joins:
        add = (splits - 1) * _JOIN_US + 4 * area / _JOINED
    elif tile.adds:
        add = _GIVE_US + (splits - 1) * 4 * area / _ADDED
    else:
        add = _SUM_US + 8 * splits * M * N / _SUM if splits > 1 else 0.0
    us = _LAUNCH_US + _both(busy, memory, _OVERLAP) + add
    if tile.cluster == 1 and not tile.joins:
        return us
    return (us + (_SQUARE_US if tile.cluster > BLOCKS else _CLUSTER_US)) * _DOUBT


def _ceildiv(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _both(one: float, other: float, part: float) -> float:
    return max(one, other) + part * min(one, other)


def _load_us(
    rows: int, extent: int, row: int, is_k_major: bool, tiles: int, waves: int, sms: tuple[float, float]
) -> tuple[float, float]:
    """Return the time of TMA and of the L2 cache for `rows` of an extent that is divided among `tiles`.

    Of the tile that takes longest where there is one wave, else of the mean. `sms` are the part of SMs that are busy, and the
    part that has the same range of K.
    """
    busy_sms, sharing_sms = sms
    crowd = sharing_sms**_CROWD  # of SMs that load the same rows
    is_split = row % _SECTOR == TMA_ALIGNMENT  # of other rows there is a copy whose rows are whole sectors
    inside = _SPLIT_ROW_US if is_split else _ROW_US
    cache = busy_sms * _CACHE_ROW_US * (_SPLIT_BYTES if is_split else 1.0)
    if is_k_major:
        missing = -extent % rows / waves if extent > rows else rows - extent
        return (rows - missing) * inside + missing * _EMPTY_ROW_US, (rows - missing) * cache
    if rows <= BLOCK_K // 2:  # a narrow panel
        shared = crowd * _SHARED_NARROW_US if extent < BLOCK_K else 0.0
        return BLOCK_K * (_NARROW_ROW_US + shared), rows * cache
    # Panels of 64 rows, each of which is loaded by one row of 128 bytes for each k; the last one may be cut.
    cut = (1.0 if waves == 1 else 1 / tiles) if extent % BLOCK_K else 0.0
    whole = (_ceildiv(rows, BLOCK_K) - cut) * BLOCK_K
    us = whole * inside + cut * BLOCK_K * _CUT_ROW_US
    return us + (BLOCK_K * crowd * _SHARED_ROW_US if extent < BLOCK_K else 0.0), whole * cache


@functools.lru_cache(maxsize=4096)
def _pick(problem: Problem) -> tuple[Tile, int]:
    return min(choices(problem), key=lambda choice: predicted_us(*choice, problem))


def _bytes_of(dtype: str) -> int:
    return 4 if dtype == "float32" else 2

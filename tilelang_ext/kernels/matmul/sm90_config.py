"""Which tile, and how many splits of K, `sm90_persistent` takes for a matmul: the fastest by a small model of an H200.

    busy   = waves * (K blocks of a unit * both(MMAs, loads) + end of a unit)
    memory = bytes of a, b and out / rate
    time   = launch + both(busy, memory) + what the sum over splits takes

where both(x, y) is the greater and a part of the lesser, which does not overlap.

The constants were fitted to measured times of 173 sizes and layouts (docs/log/matmul.md). Only their order matters: the model
chooses, it does not promise.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tilelang_ext import language as T
from tilelang_ext.kernels.matmul.problem import TMA_ALIGNMENT, Epilogue, Problem

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


@dataclass(frozen=True)
class Config:
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
    cluster: int = 1  # blocks below each other, which share the loads of B
    is_swapped: bool = False  # whether rows of the tile are columns of out, so that A is the operand b and B is a
    adds: bool = False  # whether the block with the last range of K adds the accumulators of the others, and finishes the tile
    group_rows: int = 8


@dataclass(frozen=True)
class Tile:
    """A tile that a kernel can have."""

    block_M: int
    block_N: int
    num_consumers: int
    num_stages: int  # that fit in 226 KB beside the buffers of subtiles
    deferred: int
    cluster: int = 1
    thin: int = 0  # rows of A of a stage, where those are fewer than an MMA's
    is_swapped: bool = False
    adds: bool = False

    @property
    def a_rows(self) -> int:
        return self.thin or self.block_M


_SHARED_BYTES = 226 * 1024
_MOST_STAGES = 16
_MOST_REGISTERS = 176  # of a thread, for accumulators
_MOST_FINISHED = 80  # of those, where a swapped tile has an epilogue
_MOST_SWAPPED = 1024  # rows of swapped operands: more fill multiples of 64 well, and transposed stores are slower


def _rows_of_swapped_subtile(block_N: int) -> int:
    return max(rows for rows in range(8, 65, 8) if block_N % rows == 0)


def _swapped(block_M: int, block_N: int, num_consumers: int) -> Tile:
    """Return a tile of swapped operands, with as many stages as fit beside the buffers of its subtiles of 16 bits."""
    subtiles = 2 * num_consumers * _ROWS * _rows_of_swapped_subtile(block_N) * 2
    stages = (_SHARED_BYTES - subtiles) // ((block_M + block_N) * BLOCK_K * 2)
    return Tile(block_M, block_N, num_consumers, min(stages, _MOST_STAGES), 0, is_swapped=True)


TILES = (
    Tile(128, 256, 2, 4, 3),
    Tile(256, 128, 2, 4, 1),
    Tile(128, 192, 2, 4, 2),
    Tile(128, 128, 2, 6, 1),
    Tile(256, 64, 2, 4, 0),
    Tile(128, 64, 2, 8, 0),
    Tile(64, 256, 1, 4, 3),
    Tile(64, 128, 1, 8, 1),
    Tile(64, 192, 1, 6, 2),
    Tile(64, 64, 1, 12, 0),
    # For numbers of tiles that fill waves of SMs; b lies K-major
    Tile(128, 224, 2, 4, 4),
    Tile(128, 160, 2, 5, 3),
    Tile(128, 96, 2, 6, 2),
    Tile(64, 224, 1, 5, 4),
    Tile(64, 160, 1, 6, 3),
    Tile(64, 96, 1, 8, 2),
    Tile(64, 80, 1, 9, 0),
    Tile(64, 32, 1, 12, 0),
    # For loads that take longer than MMAs, as of rows that begin between multiples of 32 bytes: each block loads half of B
    Tile(128, 256, 2, 4, 3, cluster=2),
    Tile(256, 128, 2, 4, 1, cluster=2),
    Tile(128, 192, 2, 4, 2, cluster=2),
    Tile(128, 128, 2, 6, 1, cluster=2),
    Tile(128, 224, 2, 4, 4, cluster=2),
    Tile(128, 160, 2, 5, 3, cluster=2),
    Tile(128, 96, 2, 6, 2, cluster=2),
    Tile(64, 256, 1, 4, 3, cluster=2),
    Tile(64, 192, 1, 6, 2, cluster=2),
    Tile(64, 128, 1, 8, 1, cluster=2),
    Tile(64, 96, 1, 8, 2, cluster=2),
    # For few rows: TMA takes long to fill rows past the end with zeros, and more stages fit
    *(Tile(64, 256, 1, stages, 3, thin=thin) for thin, stages in ((16, 6), (32, 5))),
    *(Tile(64, 192, 1, stages, 2, thin=thin) for thin, stages in ((16, 7), (32, 6))),
    *(Tile(64, 160, 1, 8, 3, thin=thin) for thin in (16, 32)),
    *(Tile(64, 128, 1, stages, 1, thin=thin) for thin, stages in ((16, 10), (32, 9))),
    *(Tile(64, 96, 1, 12, 2, thin=thin) for thin in (16, 32)),
    *(Tile(64, 80, 1, 14, 0, thin=thin) for thin in (16, 32)),
    *(Tile(64, 64, 1, 16, 0, thin=thin) for thin in (16, 32)),
    *(Tile(64, 32, 1, 20, 0, thin=thin) for thin in (16, 32)),
    # The most columns for 256 rows: fewest rows are loaded for each MMA
    *(
        Tile(256, columns, 2, stages, 0, cluster=blocks)
        for columns, stages in ((144, 4), (160, 4), (176, 4))
        for blocks in (1, 2)
    ),
    # For rows that fill no multiple of 64: each is a column of the MMAs, which have any multiple of 16
    *(
        _swapped(block_M, block_N, consumers)
        for block_M, consumers in ((64, 1), (128, 2), (256, 2))
        for block_N in range(16, 257, 16)
        if block_M // (_ROWS * consumers) * block_N // 2 <= _MOST_REGISTERS
    ),
)
_LAUNCH_US, _CLUSTER_US = 1.9, 1.09
_DOUBT = 1.01  # of a cluster, which must be the faster by more than the model errs between much the same tiles
_MEMORY = 4.47e6  # bytes per microsecond
_OVERLAP, _OVERLAP_LOADS = 0.38, 0.171
_SUM_US, _SUM = 1.76, 4.67e6  # of the second kernel, beside its bytes; bytes per microsecond of accumulators, out and in
_GIVE_US, _ADDED = 1.83, 5.92e4  # where one block adds: until accumulators are there, and bytes of them per microsecond
_TURN_US = 2.2  # of the copy of `a` to another order
# MMAs of a K block: of each, and of an element of the tile; in a cluster a part longer
_MMA_US, _MMA_ELEMENT_US, _MMA_IN_CLUSTER = 0.0191, 1.795e-5, 1.022
# The end of a unit, and the stores of an element of the tile, of swapped operands by single elements
_UNIT_US, _UNIT_ELEMENT_US, _SWAPPED_ELEMENT_US = 0.087, 1.59e-5, 3.42e-5
# Of TMA, for a row of 128 bytes: one that begins at a multiple of 32 bytes, another, past the end, and with its last part there
_ROW_US, _SPLIT_ROW_US, _EMPTY_ROW_US, _CUT_ROW_US = 0.001065, 0.00213, 0.00213, 0.00176
_SHARED_ROW_US = 0.00952  # of those that all SMs load at the same time, since they are all that the operand has
_CACHE_ROW_US, _SPLIT_BYTES = 0.000448, 0.99  # of the L2 cache, where all SMs load; bytes of it beside those of a row
_SECTOR = 16  # elements of 32 bytes, the L2 cache's unit


def pick_config(problem: Problem) -> tuple[Config, int]:
    """Return the configuration and the number of splits with the least predicted time."""
    tile, splits = _pick(_rounded(problem))
    return config_of(tile, problem, splits), splits


def is_turned(problem: Problem) -> bool:
    """Return whether an M-major `a` is first copied to K-major order."""
    if problem.a_is_k_major or problem.M >= _ROWS or problem.K % TMA_ALIGNMENT:
        return False
    as_is, turned = (_rounded(replace(problem, a_is_k_major=is_k_major)) for is_k_major in (False, True))
    return _TURN_US + predicted_us(*_pick(turned), turned) < predicted_us(*_pick(as_is), as_is)


def rows_of_choice(problem: Problem) -> tuple[int, int]:
    """Return the fewest and the most rows, about those of the problem, that have its tile and its splits."""
    first = last = _rounded(problem).M
    choice = _choice(problem, first)
    for _ in range(_NEIGHBOURS):
        before = _rows_before(problem, first)
        first = before if before and _choice(problem, before) == choice else first
        after = _rounded(replace(problem, M=last + 1)).M
        last = after if _choice(problem, after) == choice else last
    return _rows_before(problem, first) + 1, last


def _choice(problem: Problem, rows: int) -> tuple:
    """Return all that a number of rows, one of `_rounded`, decides."""
    of = replace(problem, M=rows)
    return is_turned(of), _pick(of)


def _rows_before(problem: Problem, rows: int) -> int:
    """Return the next smaller number of rows of `_rounded`, or 0."""
    granule = _granule(problem, rows)
    return (rows - 1) // granule * granule


def _granule(problem: Problem, rows: int) -> int:
    """Return the multiples of rows that are told apart: of an M-major `a` that fills no panel, those that TMA takes."""
    if not problem.a_is_k_major and rows <= _ROWS:
        return TMA_ALIGNMENT
    return next(granule for most, granule in _GRANULES if rows <= most)


def _rounded(problem: Problem) -> Problem:
    """Return the problem with the most rows that have its choice."""
    granule = _granule(problem, problem.M)
    return replace(problem, M=_ceildiv(problem.M, granule) * granule)


def config_of(tile: Tile, problem: Problem, splits: int = 1) -> Config:
    """Return the configuration of a tile: no subtile is deferred where the next unit has too few K blocks to store it in."""
    k_blocks = _ceildiv(problem.K, BLOCK_K)
    subtile_N = math.gcd(tile.block_N, _SUBTILE_BYTES // _bytes_of(problem.out_dtype))
    # Registers hold as many bytes of deferred subtiles for each dtype; the next unit must have the K blocks to store them in.
    count = tile.deferred if problem.out_dtype != "float32" else min(tile.deferred, _MAX_DEFERRED)
    deferred = count if k_blocks > 2 * count else 0
    if tile.is_swapped:
        subtile_N, deferred = _rows_of_swapped_subtile(tile.block_N), 0
    if splits > 1:
        deferred = 0
        subtile_N = subtile_N if tile.adds else 0
    return Config(
        tile.block_M,
        tile.block_N,
        tile.num_consumers,
        tile.num_stages,
        subtile_N,
        deferred,
        splits > 1,
        problem.num_sms // tile.cluster * tile.cluster,
        tile.a_rows,
        tile.cluster,
        tile.is_swapped,
        tile.adds,
    )


def choices(problem: Problem) -> Iterator[tuple[Tile, int]]:
    """Yield tiles and numbers of splits to try: splits that fill at most two waves of SMs, none of which has no K block."""
    k_blocks = _ceildiv(problem.K, BLOCK_K)
    for tile in TILES:
        of = problem.swapped() if tile.is_swapped else problem
        if tile.thin and (tile.thin < problem.M or not problem.a_is_k_major):
            continue
        if tile.is_swapped and (problem.M > _MOST_SWAPPED or tile.block_N > _ceildiv(problem.M, 16) * 16):
            continue
        if tile.cluster > 1 and (tile.block_M >= of.M or not CLUSTERS):
            continue
        if tile.block_N % BLOCK_K and not of.b_is_k_major:
            continue
        # Would spill: accumulators are finished one by one, and of swapped operands need more beside them.
        registers = tile.block_M // (_ROWS * tile.num_consumers) * tile.block_N // 2
        if problem.epilogue != Epilogue() and (tile.block_M > 128 or (tile.is_swapped and registers > _MOST_FINISHED)):
            continue
        # A transposed subtile of float32 would have rows of 256 bytes.
        needs_sum = tile.is_swapped and problem.out_dtype == "float32"
        units = _ceildiv(of.M, tile.block_M * tile.cluster) * tile.cluster * _ceildiv(of.N, tile.block_N)
        for splits in range(1, max(1, min(_MAX_SPLITS, k_blocks // _MIN_K_BLOCKS)) + 1):
            is_whole = (splits - 1) * _ceildiv(k_blocks, splits) < k_blocks
            if splits == 1 or (is_whole and units * splits <= 2 * problem.num_sms):
                if splits > 1 or not needs_sum:
                    yield tile, splits
                # A block waits for blocks of lower index alone, which the GPU starts first: of one wave.
                is_one_wave = units * splits <= problem.num_sms // tile.cluster * tile.cluster
                if 1 < splits <= _MOST_ADDED and is_one_wave and not needs_sum:
                    yield replace(tile, adds=True), splits


def predicted_us(tile: Tile, splits: int, problem: Problem) -> float:
    """Return the time that the model predicts."""
    problem = problem.swapped() if tile.is_swapped else problem
    M, N, K, area = problem.M, problem.N, problem.K, tile.block_M * tile.block_N
    tile_rows, tile_columns = _ceildiv(M, tile.block_M * tile.cluster) * tile.cluster, _ceildiv(N, tile.block_N)
    units = tile_rows * tile_columns * splits
    waves, busy_sms = _ceildiv(units, problem.num_sms), min(1.0, units / problem.num_sms)
    k_blocks = _ceildiv(_ceildiv(K, BLOCK_K), splits)
    sms = busy_sms, busy_sms / splits
    of_a = _load_us(tile.a_rows, M, _row_of_a(problem), problem.a_is_k_major, _ceildiv(M, tile.block_M), waves, sms)
    of_b = _load_us(tile.block_N, N, problem.b_row, problem.b_is_k_major, tile_columns, waves, sms)
    # What overlaps no better for being shared is as in one block.
    loads, alone = (max(one + other / blocks for one, other in zip(of_a, of_b, strict=True)) for blocks in (tile.cluster, 1))
    mma = (_MMA_US + _MMA_ELEMENT_US * area) * (_MMA_IN_CLUSTER if tile.cluster > 1 else 1.0)
    store = _SWAPPED_ELEMENT_US if tile.is_swapped else _UNIT_ELEMENT_US
    end = _UNIT_US + (store * area if splits == 1 or tile.adds else 0.0)
    busy = waves * (k_blocks * (max(mma, loads) + _OVERLAP_LOADS * min(mma, alone)) + end)
    memory = (2 * (M * K + N * K) + _bytes_of(problem.out_dtype) * M * N) / _MEMORY
    if tile.adds:
        add = _GIVE_US + (splits - 1) * 4 * area / _ADDED
    else:
        add = _SUM_US + 8 * splits * M * N / _SUM if splits > 1 else 0.0
    us = _LAUNCH_US + _both(busy, memory, _OVERLAP) + add
    return (us + _CLUSTER_US) * _DOUBT if tile.cluster > 1 else us


def _ceildiv(value: int, divisor: int) -> int:
    return -(-value // divisor)


def _both(one: float, other: float, part: float) -> float:
    return max(one, other) + part * min(one, other)


def _row_of_a(problem: Problem) -> int:
    """Return the elements of a row of `a` in memory."""
    return problem.K if problem.a_is_k_major else problem.M


def _load_us(
    rows: int, extent: int, row: int, is_k_major: bool, tiles: int, waves: int, sms: tuple[float, float]
) -> tuple[float, float]:
    """Return the time of TMA and of the L2 cache for `rows` of an extent that is divided among `tiles`.

    Of the tile that takes longest where there is one wave, else of the mean. `sms` are the part of SMs that are busy, and the
    part that has the same range of K.
    """
    busy_sms, sharing_sms = sms
    inside = _SPLIT_ROW_US if row % _SECTOR else _ROW_US
    cache = busy_sms * _CACHE_ROW_US * (_SPLIT_BYTES if row % _SECTOR else 1.0)
    if is_k_major:
        missing = -extent % rows / waves if extent > rows else rows - extent
        return (rows - missing) * inside + missing * _EMPTY_ROW_US, (rows - missing) * cache
    # Panels of 64 rows, each of which is loaded by one row of 128 bytes for each k; the last one may be cut.
    cut = (1.0 if waves == 1 else 1 / tiles) if extent % BLOCK_K else 0.0
    whole = (_ceildiv(rows, BLOCK_K) - cut) * BLOCK_K
    us = whole * inside + cut * BLOCK_K * _CUT_ROW_US
    return us + (BLOCK_K * sharing_sms * _SHARED_ROW_US if extent < BLOCK_K else 0.0), whole * cache


@functools.lru_cache(maxsize=4096)
def _pick(problem: Problem) -> tuple[Tile, int]:
    return min(choices(problem), key=lambda choice: predicted_us(*choice, problem))


def _bytes_of(dtype: str) -> int:
    return 4 if dtype == "float32" else 2

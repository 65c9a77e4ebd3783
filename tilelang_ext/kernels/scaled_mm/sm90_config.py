"""Which kernel and which configuration a product has on Hopper: the fastest by a small model of an H200.

    loads  = TMA's rows of a K block;   K block = both(MMAs, loads)
    busy   = waves * (K blocks of a tile * K block + end of a tile)
    memory = bytes of a, b and out / rate, and a part more for SMs that have no tile in the last wave
    time   = launch + both(busy, memory)
    Where blocks share the last tiles: busy = tiles / SMs * K blocks * K block + waves * end + exchange, and all SMs have tiles.

where both(x, y) is the greater and a part of the lesser, which does not overlap. The constants were fitted to measured times
(benchmark/results/scaled_mm_choices_h200.csv by benchmark/fit_scaled_mm.py; docs/log/selection.md). Only their order matters:
the model chooses, it does not promise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tilelang_ext import language as T
from tilelang_ext.formats import FP8_BLOCK
from tilelang_ext.kernels.scaled_mm import sm90_persistent, sm90_split_k, vecmat
from tilelang_ext.kernels.scaled_mm.problem import VECMAT_MAX_M, Problem
from tilelang_ext.kernels.scaled_mm.sm90_block import (
    BLOCK_K,
    WGMMA_M,
    Config,
    fits_hopper,
    is_bound_by_loads,
    scale_sets_of,
    stage_scales,
    steps_of,
    walks_in_step,
)

_SHARED_BYTES = 226 * 1024  # of a block, beside barriers
_MAX_STAGES = 8
_WIDTHS = (32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256)  # columns of a tile
_SWAPPED_ROWS = (8, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 192, 224, 240, 256)  # of a tile of swapped operands
_MOST_WAVES, _FEWEST_K_BLOCKS, _MOST_TILE_ROWS = 6, 16, 8  # of products whose last tiles may be divided along K
_MOST_WAVES_IN_LINE, _FEWEST_ROWS_IN_LINE = 12, 4  # where rows of tiles do not walk in step
_FEWEST_PLAIN_ROWS = 17  # with fewer, more than three quarters of an MMA of operands that are not swapped are empty
_REGISTERS, _WITHOUT_PROMOTION = 200, 128  # of a consumer's thread that accumulators and blockwise scales may take
_WIDEST_ALONE = 160  # columns of a tile of one consumer whose operands are not swapped: of more, its MMAs are too long


class Choice(NamedTuple):
    """A kernel, by its file, and its configuration."""

    kernel: str
    config: Any


@dataclass(frozen=True)
class Model:
    """The constants, in microseconds, of one kind of accumulation: in the tensor core, promoted, or by blocks of scales."""

    mma: float  # for 64 x 8 x 128 of one of two consumers
    mma_start: float  # for an MMA tile and K block
    alone: float  # factor, of the times above, where there is one consumer only
    swapped: float  # factor, for swapped operands
    straddle: float  # factor, where a tile meets two blocks of scale_b at any column
    end: float  # of a tile, for 64 x 8 of a consumer's result
    wave: float  # of a tile, beside that
    store: float  # of a tile, for a subtile of its result that is not stored while the next tile is multiplied
    row: float  # of TMA, for a row of 128 bytes
    overlap_loads: float  # part of the lesser of MMAs and loads that does not overlap
    latency: float  # of a load, over the stages of the pipeline
    uneven: float  # part more, where iterations of 4 K blocks do not divide them; twice it for 5, three times for 6
    divided: float  # factor, of tiles divided along K, which must be the faster by more than the model errs
    exchange: float  # of tiles divided along K, the part of giving accumulators that nothing overlaps


@dataclass(frozen=True)
class Shared:
    """The constants that kernels share, in microseconds and bytes per microsecond."""

    launch: float
    overlap: float  # part of the lesser of memory and work that does not overlap
    memory: float
    sm_memory: float  # of one SM
    empty_row: float  # of TMA, for a row past the end
    last_wave: float  # part of its missing tiles by which the last wave of several is shorter
    wide: float  # part more of memory, where swapped operands have 256 columns
    idle: tuple[float, float]  # part more of memory for SMs without a tile in the last wave: of one wave, of several
    split_k_launch: float
    split_k_exchange: float
    split_k_mma: float  # for a K block of a consumer and 64 rows
    split_k_end: float  # for an element of a consumer's accumulator
    split_k_overlap: float
    split_k_memory: float
    split_k_latency: float  # microseconds, after which what a block's stages hold has been loaded
    vecmat_memory: tuple[float, ...]  # by rows from 1 on
    split: float  # of giving accumulators to another block and waiting for them
    split_element: float  # for an element of a tile, given or taken


MODELS = {
    "fast": Model(0.01654, 0.02608, 1.0, 1.025, 1.017, 0.01392, 0.2887, 0.03, 0.0007107, 0.3985, 0.226, 0.0, 1.02, 0.0),
    # Those of blocks as they were fitted before their last fit: rows without fast accumulation were not.
    "rows": Model(0.02268, 0.03737, 1.145, 1.115, 1.019, 0.0, 0.7572, 0.0, 0.001102, 0.0, 0.5381, 0.04133, 1.02, 0.0),
    "blocks": Model(0.01938, 0.09014, 1.255, 1.22, 1.092, 0.0, 0.1393, 0.05885, 0.001625, 0.0, 0.00134, 0.01122, 1.01, 2.2),
}
SHARED = Shared(
    launch=2.305,
    overlap=0.1642,
    memory=4196000.0,
    sm_memory=129400.0,
    empty_row=0.0004776,
    last_wave=0.04352,
    wide=0.04247,
    idle=(0.03106, 0.1355),
    split_k_launch=2.2,
    split_k_exchange=0.0,
    split_k_mma=0.1138,
    split_k_end=0.0003078,
    split_k_overlap=0.7503,
    split_k_memory=4722000.0,
    split_k_latency=1.683,
    vecmat_memory=(4349000.0, 3161000.0, 2299000.0, 2683000.0),
    split=1.631,
    split_element=0.0002155,
)
_MOST_IDLE = 1.5
_VECMAT_WAVES = 0.6


def takes(problem: Problem) -> bool:
    """Whether this file chooses: on Hopper, what TMA can load."""
    return fits_hopper(problem)


def compile_choice(problem: Problem, choice: Choice, compile: Callable) -> Callable:
    """Return the compiled kernel of one choice."""
    if choice.kernel == "vecmat":
        return vecmat.compile_kernel(problem, compile)
    return {"sm90_split_k": sm90_split_k, "sm90_persistent": sm90_persistent}[choice.kernel].compile_kernel(
        problem, choice.config, compile
    )


def memory_of(choice: Choice) -> tuple:
    """Return shapes and dtypes of the memory that the kernel of a choice has beside its tensors, before `out`."""
    return sm90_persistent.memory_of(choice.config) if choice.kernel == "sm90_persistent" else ()


def rounded(M: int) -> int:
    """Return the number of rows whose choice M has: no kernel saves much time on fewer rows between two of them."""
    return M if M <= VECMAT_MAX_M else _ceildiv(M, _step(M)) * _step(M)


def next_rounded(M: int) -> int:
    """Return the rounded number of rows after a rounded one."""
    return rounded(M + 1)


def previous_rounded(M: int) -> int:
    """Return the rounded number of rows before a rounded one; VECMAT_MAX_M is before all that are more."""
    return max(M - _step(M), VECMAT_MAX_M)


def _step(M: int) -> int:
    return 8 if M <= 16 else 16 if M <= 256 else 64 if M <= 1024 else 128


@functools.lru_cache(maxsize=4096)
def pick(problem: Problem) -> Choice:
    """Return the choice with the least predicted time for a problem of a rounded number of rows."""
    return min(choices(problem), key=lambda choice: predicted_us(choice, problem))


# --- choices ---------------------------------------------------------------------------------------------------------


def choices(problem: Problem) -> Iterator[Choice]:
    """Yield every kernel and configuration for a problem of a rounded number of rows."""
    if problem.max_M <= VECMAT_MAX_M:
        yield Choice("vecmat", vecmat.pick_config(problem))
    for config in sm90_split_k.configs(problem):
        yield Choice("sm90_split_k", config)
    for tile in _tiles(problem):
        for config in _persistent(problem, *tile):
            yield Choice("sm90_persistent", config)


def _tiles(problem: Problem) -> Iterator[tuple[int, int, int, bool]]:
    """Yield rows, columns, consumers and whether operands are swapped, of tiles that fit in registers."""
    kind, may_swap = kind_of(problem), problem.out_dtype != "float32"  # a transposed subtile would have rows of 256 bytes
    # Of up to 64 rows half of a tile of 128 or more is empty: wherever both have been measured, swapped operands were faster.
    plain = () if may_swap and problem.max_M <= WGMMA_M else ((128, 2),) if kind == "fast" else ((128, 2), (256, 2))
    # One consumer: as many tiles as SMs, of any width, stream b without an exchange. Measured for blocks of scales alone.
    if kind == "blocks" and _FEWEST_PLAIN_ROWS <= problem.max_M <= WGMMA_M:
        plain = (*plain, (WGMMA_M, 1))
    for block_M, num_consumers in plain:
        for block_N in _WIDTHS:
            straddles = kind == "blocks" and block_N > FP8_BLOCK + math.gcd(block_N, FP8_BLOCK)
            mma_tiles = block_M // (WGMMA_M * num_consumers)
            is_too_wide = num_consumers == 1 and block_N > _WIDEST_ALONE
            if _registers(kind, mma_tiles, block_N, 4) <= _limit(kind) and not straddles and not is_too_wide:
                yield block_M, block_N, num_consumers, False
    if not may_swap:
        return
    most = _ceildiv(problem.max_M, 16) * 16
    for block_N, num_consumers in ((64, 1), (128, 2), (256, 2)):
        for block_M in _SWAPPED_ROWS:
            mma_tiles = block_N // (WGMMA_M * num_consumers)
            if num_consumers == 1 and block_M < min(problem.max_M, WGMMA_M):
                continue  # weights would be loaded again and again for a few rows each
            if block_M <= most and _registers(kind, mma_tiles, block_M, block_M // 4) <= _limit(kind):
                yield block_M, block_N, num_consumers, True


def kind_of(problem: Problem) -> str:
    """Return the key of `MODELS`."""
    if problem.layout_a.k is not None:
        return "blocks"
    return "fast" if problem.fast_accum else "rows"


def _registers(kind: str, mma_tiles: int, mma_N: int, scales: int) -> int:
    accumulators = (mma_tiles + (kind != "fast")) * mma_N // 2
    return accumulators + (scales if kind == "blocks" else 0)


def _limit(kind: str) -> int:
    return _WITHOUT_PROMOTION if kind == "fast" else _REGISTERS


def _persistent(problem: Problem, block_M: int, block_N: int, num_consumers: int, is_swapped: bool) -> Iterator[Config]:
    """Yield the configurations of a tile, whole and divided along K, none if shared memory holds too few stages."""
    kind, k_blocks = kind_of(problem), _ceildiv(problem.K, BLOCK_K)
    bits = T.dtype(problem.out_dtype).bits
    if is_swapped:
        subtile = max(rows for rows in range(8, 65, 8) if block_M % rows == 0)
        subtile_bytes, deferred = subtile * WGMMA_M * bits // 8, 0
    else:
        row_bytes = 128 if kind == "fast" else 64
        subtile = math.gcd(block_N, row_bytes * 8 // bits)
        subtile_bytes = WGMMA_M * subtile * bits // 8
        # Registers hold few deferred subtiles beside the accumulators; the next tile must have the K blocks to store them in.
        count = 3 if block_N == 256 else 2 if block_N == 128 or subtile * bits <= 512 else 1
        deferred = min(count, block_N // subtile, k_blocks // 2) if kind == "fast" else 0
    of_stage = max(stage_scales(block_M), block_M * scale_sets_of(block_N, is_swapped))  # copied or multiplied
    scales = 4 * of_stage if kind == "blocks" else 0
    fixed = 2 * num_consumers * subtile_bytes + (0 if kind == "blocks" else 4 * (block_M + block_N)) + 256
    fitting = (_SHARED_BYTES - fixed) // ((block_M + block_N) * BLOCK_K + scales)
    # With fewer stages than K blocks, N and K need not be constants of the kernel. A stage is released a K block later where
    # accumulators stay in the tensor core, so that one stage would be waited for forever.
    most = min(fitting, _MAX_STAGES, k_blocks - 1 if k_blocks > 2 else k_blocks)
    if fitting < 3:
        return
    config = Config(block_M, block_N, most, subtile, problem.num_sms, deferred, num_consumers, is_swapped)
    # Where MMAs that are promoted are the limit, 5 or 6 stages, all of an iteration, were slower in 48 of 59 measured pairs.
    # Of tiles in one wave, all of which load at once, 7 were faster than 4: their iterations have 4 K blocks too.
    tiles = _tile_rows(config, problem) * _ceildiv(problem.N, block_N)
    is_one_wave = tiles <= problem.num_sms and steps_of(most) < most
    has_all = kind == "fast" or is_bound_by_loads(problem, config) or most == _MAX_STAGES or is_one_wave
    whole = config if has_all else replace(config, num_stages=min(most, 4))
    yield whole
    if _can_divide(config, problem):
        in_line = kind == "blocks" and _tile_rows(config, problem) > _rows_in_step(config, problem)
        yield replace(whole if in_line else config, divides_k=True, deferred=0)


def _can_divide(config: Config, problem: Problem) -> bool:
    """Whether blocks may share tiles: the last wave of every row of tiles is not full."""
    if config.num_consumers == 1 and not config.is_swapped:
        return False  # narrower tiles fill the waves
    columns, tile_rows = _ceildiv(problem.N, config.block_N), _tile_rows(config, problem)
    # Several rows of tiles have been measured for blocks of scales alone.
    if (tile_rows > 1 and kind_of(problem) != "blocks") or _ceildiv(problem.K, BLOCK_K) < _FEWEST_K_BLOCKS:
        return False
    in_step = _rows_in_step(config, problem)
    row_blocks, tiles = problem.num_sms // in_step, columns * tile_rows // in_step
    if tile_rows > in_step:  # all tiles in one line: where many of them are divided, bytes that blocks do not share take longer
        is_large = tile_rows >= _FEWEST_ROWS_IN_LINE and config.block_M == 256  # measured for tiles of 256x128
        return is_large and row_blocks < tiles < _MOST_WAVES_IN_LINE * row_blocks and 0 < tiles % row_blocks <= row_blocks // 6
    return tiles % row_blocks != 0 and tiles < _MOST_WAVES * row_blocks and in_step <= _MOST_TILE_ROWS


def _rows_in_step(config: Config, problem: Problem) -> int:
    """Return the rows of tiles that blocks walk over in step where they share tiles; 1 if all tiles lie in one line."""
    tile_rows, columns = _tile_rows(config, problem), _ceildiv(problem.N, config.block_N)
    return tile_rows if walks_in_step(problem.num_sms, tile_rows, columns) else 1


def _tile_rows(config: Config, problem: Problem) -> int:
    return _ceildiv(problem.max_M, config.block_M)


# --- times -----------------------------------------------------------------------------------------------------------


def predicted_us(choice: Choice, problem: Problem) -> float:
    """Return the time that the model predicts for a problem of `max_M` rows."""
    predict = {"vecmat": _vecmat_us, "sm90_split_k": _split_k_us, "sm90_persistent": _persistent_us}
    return predict[choice.kernel](choice.config, problem)


def _persistent_us(config: Config, problem: Problem) -> float:
    model, M, k_blocks = MODELS[kind_of(problem)], problem.max_M, _ceildiv(problem.K, BLOCK_K)
    rows, mma_N = (config.block_N, config.block_M) if config.is_swapped else (config.block_M, config.block_N)
    mma_tiles = rows // (WGMMA_M * config.num_consumers)
    mma = mma_tiles * (model.mma * mma_N / 8 * config.num_consumers / 2 + model.mma_start)
    mma *= model.alone if config.num_consumers == 1 else 1.0
    mma *= model.swapped if config.is_swapped else model.straddle if FP8_BLOCK % config.block_N else 1.0
    steps = 1 if kind_of(problem) == "fast" else steps_of(config.num_stages)
    mma *= 1.0 if k_blocks % steps == 0 else 1 + model.uneven * (steps - 3)
    tile_rows, num_sms = _tile_rows(config, problem), problem.num_sms
    tiles = tile_rows * _ceildiv(problem.N, config.block_N)
    waves = _ceildiv(tiles, num_sms)
    # Rows past the end are in the last tiles, which set the time of one wave.
    empty_rows = sum(-extent % block / waves for extent, block in ((M, config.block_M), (problem.N, config.block_N)))
    loads = model.row * (config.block_M + config.block_N) + SHARED.empty_row * empty_rows + model.latency / config.num_stages
    stores = mma_tiles * mma_N // config.subtile - config.deferred
    end = model.wave + model.end * mma_tiles * mma_N / 8 + model.store * stores
    k_block = _both(mma, loads, model.overlap_loads)
    if config.divides_k:
        in_step = _rows_in_step(config, problem)
        row_blocks, of_row, idle = num_sms // in_step, tiles // in_step, 0.0
        busy_sms = row_blocks * in_step
        divided = of_row - max(of_row // row_blocks - 1, 0) * row_blocks
        givers = max(1, _ceildiv(row_blocks, divided) - 1)  # of a divided tile
        split = SHARED.split + SHARED.split_element * config.block_M * config.block_N * (1 + givers)
        busy = of_row / row_blocks * k_blocks * k_block + waves * end + split
    else:
        busy_sms = min(tiles, num_sms)
        missing = waves - tiles / num_sms if waves > 1 else 0.0
        busy = (waves - SHARED.last_wave * missing) * (k_blocks * k_block + end)
        idle = SHARED.idle[waves > 1] * min(waves * num_sms / tiles - 1, _MOST_IDLE)
    memory = _bytes_of(problem) / min(SHARED.memory, busy_sms * SHARED.sm_memory)
    memory *= 1 + SHARED.wide if config.is_swapped and config.block_N == 256 else 1.0
    memory *= 1 + idle
    us = SHARED.launch + _both(busy, memory, SHARED.overlap)
    return us * model.divided + model.exchange if config.divides_k else us


def _split_k_us(config: sm90_split_k.Config, problem: Problem) -> float:
    blocks = _ceildiv(problem.N, config.block_N) * config.num_splits
    k_blocks = _ceildiv(_ceildiv(problem.K, BLOCK_K), config.num_splits * config.num_consumers)
    busy = k_blocks * max(1.0, config.block_M / WGMMA_M) * SHARED.split_k_mma
    in_flight = config.num_stages * (config.block_M + config.block_N) * BLOCK_K
    of_block = min(SHARED.sm_memory, in_flight / SHARED.split_k_latency)
    memory = _bytes_of(problem) / min(SHARED.split_k_memory, blocks * of_block)
    exchange = SHARED.split_k_exchange if config.num_splits > 1 else 0.0
    end = SHARED.split_k_end * config.num_consumers * config.block_M * config.block_N
    return SHARED.split_k_launch + exchange + end + _both(busy, memory, SHARED.split_k_overlap)


def _vecmat_us(config: vecmat.Config, problem: Problem) -> float:
    # Blocks that load one slab of wide rows of b end together, and only then do the next ones begin.
    is_slow = config.slabs == 1 and config.rounds > 1 and _ceildiv(problem.N, config.rows) > 8 * problem.num_sms
    memory = SHARED.vecmat_memory[problem.max_M - 1] * (_VECMAT_WAVES if is_slow else 1.0)
    return SHARED.launch + _bytes_of(problem) / memory


def _bytes_of(problem: Problem) -> int:
    M, N, K = problem.max_M, problem.N, problem.K
    return M * K + N * K + T.dtype(problem.out_dtype).bits // 8 * M * N


def _both(one: float, other: float, part: float) -> float:
    return max(one, other) + part * min(one, other)


def _ceildiv(value: int, divisor: int) -> int:
    return -(-value // divisor)

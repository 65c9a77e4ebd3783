"""Attention of a few tokens over a long cache, on every target: blocks for ranges of the keys, and a sum over these.

    S = q k^T;  m' = max(m, rows of S);  P = 2^(scale (S - m'));  l = a l + rows of P;  O = a O + P v      of each range
    out = sum of 2^(lse[range] - lse) O[range] / l[range],  2^lse = sum of 2^lse[range]

The rows of a block are the tokens and query heads that share a head of k and v, so that each byte of the cache is read once for
all of them. A range is a part of the blocks of keys that its own sequence has: short sequences are divided as evenly as long
ones. Rows past the end of a sequence are cleared as they are loaded, since a cache may hold anything there. `sm90_decode` comes
before it in `decode_launch.KERNELS`.

Floor on an H200: the bytes of the cache up to each length at 4.25e12 bytes/s (docs/log/attention.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import LOG2_E, DecodeProblem
from tilelang_ext.kernels.attention.tiles import decode_prim_func
from tilelang_ext.kernels.sm90 import pdl
from tilelang_ext.marks import ROLLED_K

PASS_CONFIGS = {"tl.disable_warp_specialized": True, "tl.disable_tma_lower": True}
_LANES = 64  # channels come in multiples of these: what lies past head_dim is zero
MAX_SPLITS = 64  # twice as many of few rows
_WAVES = 6
_MIN_RANGE_BYTES = 1 << 19  # of keys and values, 8 times what is read while a block begins and ends
NO_WINDOW = 2**31 - 1
_SUM_THREADS = 64
_MAX_RANGES = 2 * MAX_SPLITS  # two of a block at most
_TOGETHER = 8
_METAL_CORES = 16  # Metal does not report them


@dataclass(frozen=True)
class Config:
    """Rows and keys of a tile, channels of q and k in shared memory at a time, value columns of a block, threads, and whether
    P goes through shared memory.
    """

    block_M: int
    block_N: int
    block_K: int
    columns: int
    threads: int
    shares_P: bool

    @property
    def ranges(self) -> int:
        """Results of a block."""
        return 1

    @property
    def blocks_per_sm(self) -> int:
        return 2

    @property
    def min_blocks(self) -> int:
        """Blocks of keys of a range, with fewer of which a thread block's start costs more than it saves."""
        return 4


def pick_config(problem: DecodeProblem) -> Config:
    """Return the configuration for the device, as `tiled` has it: none of them has been timed."""
    channels = -(-problem.head_dim // _LANES) * _LANES
    block_K = channels if channels <= 128 else 64
    if problem.target_kind == "metal":
        return Config(32, 32, block_K, min(channels, 256), 128, False)
    return Config(64, 64, block_K, min(channels, 128), 128, problem.arch.startswith("gfx1"))


def num_splits(problem: DecodeProblem, config: Config, batch, rows, kv_heads, keys, apply: Callable):
    """Return the number of ranges for sizes that are numbers, or expressions of a plan: `apply` is one of its operators.

    As many as fill the SMs once, or one, where they nearly fill each wave. Otherwise so many that the last of several waves
    matters little, but no range is so short that a block's start costs more.
    """
    places = config.blocks_per_sm * (problem.num_sms or _METAL_CORES)
    parts = -(-problem.head_dim // config.columns)
    blocks = apply("max", batch * kv_heads * ((rows + (config.block_M - 1)) // config.block_M) * parts, 1)
    most = apply("min", keys // (config.block_N * config.min_blocks), MAX_SPLITS * (2 if problem.has_few_rows else 1))
    once = apply("max", apply("//", places, blocks), 1)
    waves = apply("//", blocks + (places - 1), places)
    row_bytes = 2 * problem.head_dim * (1 if problem.is_fp8 else 2)
    several = apply("min", apply("//", _WAVES * places, blocks) + 1, keys * row_bytes // _MIN_RANGE_BYTES)
    is_full = apply("<=", 9 * places * waves, blocks * once * 10)
    return apply("max", apply("min", apply("max", once, apply("select", is_full, 0, several)), most), 1)


@dataclass(frozen=True, eq=False)
class _Sequence:
    """Where the keys of the block's sequence lie."""

    problem: DecodeProblem
    page_table: Any
    number: Any
    length: Any

    def page(self, key):
        """Return the first index of the cache for a key."""
        if not self.problem.page_size:
            return self.number
        return self.page_table[self.number, T.truncdiv(key, self.problem.page_size)]

    def row(self, key):
        return T.truncmod(key, self.problem.page_size) if self.problem.page_size else key


@dataclass(frozen=True, eq=False)
class _Buffers:
    """What a block has in shared memory and in registers."""

    q_s: Any  # (block_M, block_K)
    k_s: Any  # (block_N, block_K)
    v_s: Any  # (block_N, columns)
    S: Any
    P: Any
    O: Any
    m: Any  # maxima, in the units of exponents of 2
    m_old: Any
    l: Any
    l_block: Any
    a: Any
    position: Any  # of a row's token among the keys
    k_scale_s: Any  # of the keys of a block
    v_scale_s: Any


def split_kv(problem: DecodeProblem, config: Config):
    """The prim_func (q, cache_k, cache_v, seqlens, page_table, k_scale, v_scale, partial, partial_lse)."""
    dtype, D = problem.dtype, problem.head_dim
    block_M, block_N, block_K, columns = config.block_M, config.block_N, config.block_K, config.columns
    k_steps = -(-D // block_K)
    window = problem.window
    annotations = {ROLLED_K: True} if problem.arch.startswith("gfx11") else None
    most_distance, has_scales, is_per_page = window or NO_WINDOW, problem.scales != "", problem.scales == "page"

    def alloc():
        rows = [T.alloc_fragment((block_M,), "float32") for _ in range(5)]
        return _Buffers(
            T.alloc_shared((block_M, block_K), dtype),
            T.alloc_shared((block_N, block_K), dtype),
            T.alloc_shared((block_N, columns), dtype),
            T.alloc_fragment((block_M, block_N), "float32"),
            (T.alloc_shared if config.shares_P else T.alloc_fragment)((block_M, block_N), dtype),
            T.alloc_fragment((block_M, columns), "float32"),
            *rows,
            T.alloc_fragment((block_M,), "int32"),
            *(T.alloc_shared((block_N,), "float32") for _ in range(2)),
        )

    @T.macro
    def load(cache, sequence, head, key, column, to_s):
        """Load keys or values one by one; rows past the end are cleared."""
        for i, j in T.Parallel(block_N, to_s.shape[1]):
            inside = T.min(key + i, sequence.length - 1)
            to_s[i, j] = T.if_then_else(
                (key + i < sequence.length) & (column + j < D),
                T.cast(cache[sequence.page(inside), sequence.row(inside), head, T.min(column + j, D - 1)], dtype),
                T.cast(0, dtype),
            )

    @T.macro
    def load_q(q, sequence, head, group, row, channel, q_s):
        rows = q.shape[1] * group
        for i, j in T.Parallel(block_M, block_K):
            inside = T.min(row + i, rows - 1)
            q_s[i, j] = T.if_then_else(
                (row + i < rows) & (channel + j < D),
                q[
                    sequence.number,
                    T.truncdiv(inside, group),
                    head * group + T.truncmod(inside, group),
                    T.min(channel + j, D - 1),
                ],
                T.cast(0, dtype),
            )

    @T.macro
    def load_scales(operands, sequence, head, key, k_scale_s, v_scale_s):
        for j in T.Parallel(block_N):
            if is_per_page:
                page = sequence.page(T.min(key + j, sequence.length - 1))
                k_scale_s[j] = operands.k_scale[page, head] * T.float32(problem.scale_log2)
                v_scale_s[j] = operands.v_scale[page, head]
            else:
                k_scale_s[j] = operands.k_scale[head] * T.float32(problem.scale_log2)
                v_scale_s[j] = operands.v_scale[head]

    @T.macro
    def attend(operands, of, sequence, head, group, row, key, column):
        """Add a block of keys."""
        if k_steps == 1:
            load(operands.cache_k, sequence, head, key, 0, of.k_s)
        load(operands.cache_v, sequence, head, key, column, of.v_s)
        if k_steps == 1:
            T.gemm(
                of.q_s, of.k_s, of.S, transpose_B=True, policy=T.GemmWarpPolicy.FullRow, clear_accum=True,
                annotations=annotations,
            )  # fmt: skip
        else:
            T.fill(of.S, 0)
            for step in T.serial(k_steps):
                load_q(operands.q, sequence, head, group, row, step * block_K, of.q_s)
                load(operands.cache_k, sequence, head, key, step * block_K, of.k_s)
                T.gemm(of.q_s, of.k_s, of.S, transpose_B=True, policy=T.GemmWarpPolicy.FullRow, annotations=annotations)
        if has_scales:
            load_scales(operands, sequence, head, key, of.k_scale_s, of.v_scale_s)
        for i, j in T.Parallel(block_M, block_N):
            distance = of.position[i] - (key + j)  # from a key to the row's token, below 0 if the key comes later
            of.S[i, j] = T.if_then_else(
                (key + j < sequence.length) & (distance >= 0) & (distance < most_distance),
                of.S[i, j] * (of.k_scale_s[j] if has_scales else T.float32(problem.scale_log2)),
                -T.infinity("float32"),
            )
        T.copy(of.m, of.m_old)
        T.reduce_max(of.S, of.m, dim=1, clear=False)
        for i in T.Parallel(block_M):
            # A row that has seen no key yet: -inf - -inf would be NaN.
            of.m[i] = T.max(of.m[i], T.float32(-1e30))
            of.a[i] = T.exp2(of.m_old[i] - of.m[i])
        for i, j in T.Parallel(block_M, block_N):
            of.S[i, j] = T.exp2(of.S[i, j] - of.m[i])
        T.reduce_sum(of.S, of.l_block, dim=1)
        for i in T.Parallel(block_M):
            of.l[i] = of.l[i] * of.a[i] + of.l_block[i]
        for i, j in T.Parallel(block_M, columns):
            of.O[i, j] *= of.a[i]
        if has_scales:
            for i, j in T.Parallel(block_M, block_N):
                of.S[i, j] = of.S[i, j] * of.v_scale_s[j]
        T.copy(of.S, of.P)
        T.gemm(of.P, of.v_s, of.O, policy=T.GemmWarpPolicy.FullRow)

    @T.macro
    def emit(operands, seqlens, page_table, partial, partial_lse):
        kv_heads, tokens = operands.cache_k.shape[2], operands.q.shape[1]
        group = T.truncdiv(operands.q.shape[2], kv_heads)
        row_tiles = T.ceildiv(tokens * group, block_M)
        parts, batches = -(-D // columns), operands.q.shape[0]
        with T.Kernel(partial.shape[0], kv_heads * row_tiles * parts, batches, threads=config.threads) as (
            split,
            by,
            batch,
        ):
            of = alloc()
            part = by % parts
            row = T.truncdiv(by // parts, kv_heads) * block_M
            head = T.truncmod(by // parts, kv_heads)
            sequence = _Sequence(problem, page_table, batch, seqlens[batch])
            # Blocks of keys that any row of this block sees, and this range's part of them.
            first = T.alloc_var("int32", 0)
            if window:
                first = T.max(sequence.length - tokens + T.truncdiv(row, group) - window + 1, 0) // block_N
            blocks = T.max(T.ceildiv(sequence.length, block_N) - first, 0)
            begin = T.alloc_var("int32", first + T.truncdiv(split * blocks, partial.shape[0]))
            end = T.alloc_var("int32", first + T.truncdiv((split + 1) * blocks, partial.shape[0]))
            for i in T.Parallel(block_M):
                of.position[i] = sequence.length - tokens + T.truncdiv(row + i, group)
            T.fill(of.O, 0)
            T.fill(of.l, 0)
            T.fill(of.m, -T.infinity("float32"))
            if k_steps == 1:
                load_q(operands.q, sequence, head, group, row, 0, of.q_s)
            for n in T.serial(end - begin):
                attend(operands, of, sequence, head, group, row, (begin + n) * block_N, part * columns)
            for i in T.Parallel(block_M):
                of.a[i] = T.if_then_else(of.l[i] > T.float32(0), T.float32(1) / of.l[i], T.float32(0))
            for i, j in T.Parallel(block_M, columns):
                if (row + i < tokens * group) & (part * columns + j < D):
                    partial[
                        split, batch, T.truncdiv(row + i, group), head * group + T.truncmod(row + i, group), part * columns + j
                    ] = of.O[i, j] * of.a[i]
            if part == 0:
                for i in T.Parallel(block_M):
                    if row + i < tokens * group:
                        partial_lse[split, batch, head * group + T.truncmod(row + i, group), T.truncdiv(row + i, group)] = (
                            T.if_then_else(of.l[i] > T.float32(0), of.m[i] + T.log2(of.l[i]), -T.infinity("float32"))
                        )

    return decode_prim_func(problem, lambda *given: emit(*given[:3], given[3].partial, given[3].partial_lse))


def sum_ranges(problem: DecodeProblem):
    """The prim_func (partial, partial_lse, sinks, out, lse)."""
    types, D = problem.types(), problem.head_dim
    width = -(-D // _SUM_THREADS) * _SUM_THREADS
    is_hopper = problem.arch == "sm_90a"

    @T.prim_func
    def sum_ranges(partial: types.partial, partial_lse: types.partial_lse, sinks: types.sinks, out: types.out, lse: types.lse):
        with T.Kernel(out.shape[1] * out.shape[2], out.shape[0], threads=_SUM_THREADS) as (row, batch):
            total_f = T.alloc_fragment((width,), "float32")
            lse_s = T.alloc_shared((_MAX_RANGES,), "float32")
            token, head = T.truncdiv(row, out.shape[2]), T.truncmod(row, out.shape[2])
            ranges = T.min(partial.shape[0], _MAX_RANGES)
            peak = T.alloc_var("float32", -1e30)
            total = T.alloc_var("float32", 0.0)
            weight = T.alloc_var("float32", 0.0)
            if is_hopper:
                pdl.trigger()
                pdl.wait()
            for i in T.Parallel(_MAX_RANGES):
                lse_s[i] = T.if_then_else(
                    i < ranges, partial_lse[T.min(i, ranges - 1), batch, head, token], -T.infinity("float32")
                )
            for i in T.serial(ranges):
                peak = T.max(peak, lse_s[i])
            if problem.has_sinks:
                peak = T.max(peak, sinks[head] * T.float32(LOG2_E))
                total = T.exp2(sinks[head] * T.float32(LOG2_E) - peak)
            T.fill(total_f, 0)
            # Several ranges per iteration, whose loads are under way together.
            for step in T.serial(T.ceildiv(ranges, _TOGETHER)):
                for i in T.unroll(_TOGETHER):
                    split = step * _TOGETHER + i
                    weight = T.exp2(lse_s[split] - peak)
                    total = total + weight
                    for j in T.Parallel(width):
                        total_f[j] = (
                            total_f[j] + weight * partial[T.min(split, ranges - 1), batch, token, head, T.min(j, D - 1)]
                        )
            weight = T.if_then_else(total > T.float32(0), T.float32(1) / total, T.float32(0))
            for j in T.Parallel(width):
                if j < D:
                    out[batch, token, head, j] = T.cast(total_f[j] * weight, problem.dtype)
            if T.get_thread_binding() == 0:
                lse[batch, head, token] = T.if_then_else(
                    total > T.float32(0), (peak + T.log2(total)) * T.float32(1 / LOG2_E), -T.infinity("float32")
                )

    return sum_ranges


def takes(problem: DecodeProblem) -> bool:
    """Take every problem."""
    return True


def sums_ranges(_: DecodeProblem) -> bool:
    """Return whether the kernel also adds the ranges: `sum_ranges` does."""
    return False


def pass_configs(problem: DecodeProblem) -> dict:
    return PASS_CONFIGS if problem.target_kind == "cuda" else {}

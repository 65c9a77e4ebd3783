"""The sum over ranges of keys by the blocks that computed them, for at most eight rows of a head of k and v.

    out = sum of 2^(lse[range] - lse) O[range],  2^lse = sum of 2^lse[range]

| memory | shape | what |
| --- | --- | --- |
| partial, partial_lse | see `DecodeProblem` | results of all ranges, each divided by its sum; behind them those of groups |
| given | (batch, kv_heads, splits, parts + 1), int64 | words of `split_tiles`: a part of a block is stored, a group is added |

The block of the last range waits for all others of its head and adds what they have stored. Of more than `_MOST` blocks the
last of each group of `_GROUP` adds its group, and the last one of all the groups: one SM would have too much to read. Blocks
begin in the order of their numbers, so those that a block waits for have begun.

A kernel of its own for the sum begins when the blocks of all ranges have ended, and has its first loads to wait for: it took
4 to 5 us (docs/log/attention.md). It remains for more rows.
"""

from dataclasses import dataclass
from typing import Any

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import LOG2_E, DecodeOperands, DecodeProblem, DecodeResults
from tilelang_ext.kernels.attention.sm90_softmax import exp2, log2
from tilelang_ext.kernels.sm90 import split_tiles
from tilelang_ext.kernels.sm90.roles import WARP

MAX_ROWS = 8
_MOST = 16  # blocks whose results one block adds
_GROUP = 8
_WIDTH = 4  # channels of one load of a lane
_VALUES = 144  # registers for loads that are on their way together
_NOTHING = -T.infinity("float32")


def places(splits, ranges: int):
    """Return the results that `partial` has to hold, for `splits` blocks of a head with `ranges` ranges each."""
    return splits * (ranges + 1)


@dataclass(frozen=True, eq=False)
class RangeSum:
    """A block of the kernel, as the sum sees it."""

    problem: DecodeProblem
    results: DecodeResults
    ranges: int  # of a block
    parts: int  # of a block, each of which says that it has stored its results
    rows: Any
    group: Any  # rows of a token
    batch: Any
    kv_head: Any
    split: Any
    threads: int  # which add
    barrier: int  # number of a named one, for these

    @property
    def splits(self):
        return self.results.given.shape[2]

    def give(self, part) -> None:
        """Say that what this thread and those that it has met have stored may be read."""
        split_tiles.give(self.results.given[self.batch, self.kv_head, self.split, part])

    def add(self, thread) -> None:
        """Add what there is to add for this block; of `threads` threads, that many `thread`s from 0 on."""
        _add(self, thread)


def range_sum(traits, operands: DecodeOperands, results: DecodeResults, block, barrier: int) -> RangeSum:
    """Return the sum of a block of one of the two kernels, whose consumers meet at a named barrier."""
    return RangeSum(
        traits.problem, results, traits.config.ranges, traits.config.parts, operands.q.shape[1] * block.keys.group,
        block.keys.group, block.batch, block.kv_head, block.split, traits.roles.consumer_threads, barrier,
    )  # fmt: skip


@T.macro
def _add(of, thread):
    is_last = of.split == of.splits - 1
    if is_last or ((of.splits > _MOST) and (of.split % _GROUP == _GROUP - 1)):
        begin = T.alloc_var("int32", T.if_then_else(of.splits > _MOST, of.split // _GROUP * _GROUP, 0))
        for level in T.serial(T.if_then_else(is_last and (of.splits > _MOST), 2, 1)):
            is_final = (level == 1) or (of.splits <= _MOST)
            count = T.alloc_var("int32", T.if_then_else(level == 0, of.split + 1 - begin, T.ceildiv(of.splits, _GROUP)))
            if thread < WARP:
                _wait(of, level, begin, count, thread)
            T.sync_threads(barrier_id=of.barrier, arrive_count=of.threads)
            first = T.alloc_var("int32", T.if_then_else(level == 0, begin, of.splits) * of.ranges)
            last = T.alloc_var("int32", first - 1 + count * T.if_then_else(level == 0, of.ranges, 1))
            for turn in T.serial(T.ceildiv(of.rows, of.threads // WARP)):
                row = T.alloc_var("int32", turn * (of.threads // WARP) + T.truncdiv(thread, WARP))
                if row < of.rows:
                    token = T.alloc_var("int32", T.truncdiv(row, of.group))
                    head = T.alloc_var("int32", (of.kv_head - token) * of.group + row)
                    _add_row(of, first, last, is_final, token, head, thread % WARP)
            if not is_final:
                T.sync_threads(barrier_id=of.barrier, arrive_count=of.threads)
                if thread == 0:
                    of.give(of.parts)


@T.macro
def _wait(of, level, begin, count, lane):
    """Wait for the words of `count` blocks, or of groups."""
    words = T.alloc_var("int32", count * T.if_then_else(level == 0, of.parts, 1))
    for turn in T.serial(T.ceildiv(words, WARP)):
        word = T.alloc_var("int32", turn * WARP + lane)
        split = T.alloc_var("int32", begin + T.truncdiv(word, of.parts))
        part = T.alloc_var("int32", T.truncmod(word, of.parts))
        if level == 1:
            split = T.min(word * _GROUP + _GROUP, of.splits) - 1
            part = of.parts
        if word < words:
            split_tiles.wait_for(of.results.given[of.batch, of.kv_head, split, part])


@T.macro
def _add_row(of, first, last, is_final, token, head, lane):
    """Add a row of the results from `first` to `last`, by one warp; the result of a group is stored behind all.

    A result takes as many lanes as it has loads of `_WIDTH` channels, so that a warp reads several narrow ones beside each
    other. All loads of a step are on their way together.
    """
    results, batch, D = of.results, of.batch, of.problem.head_dim
    lanes = min(WARP, 1 << (-(-D // _WIDTH) - 1).bit_length())
    beside, loads = WARP // lanes, -(-D // (lanes * _WIDTH))
    turns = min(_VALUES // (loads * _WIDTH), _MOST // beside)
    together = turns * beside
    values = T.alloc_local((turns * loads * _WIDTH,), "float32")
    sums = T.alloc_local((loads * _WIDTH,), "float32")
    total, peak = T.alloc_var("float32", 0.0), T.alloc_var("float32", -1e30)
    for e in T.unroll(loads * _WIDTH):
        sums[e] = T.float32(0)
    for step in T.serial(T.truncdiv(last - first + together, together)):
        place = T.alloc_var("int32", first + step * together)
        own = T.alloc_var("float32", _NOTHING)  # lse of the lane's result
        if (lane < together) and (place + lane <= last):
            own = results.partial_lse[place + lane, batch, head, token]
        for e in T.unroll(turns * loads * _WIDTH):
            values[e] = T.float32(0)
        for i in T.unroll(turns):
            if place + i * beside + lane // lanes <= last:
                for load in T.unroll(loads):
                    channel = T.min((load * lanes + lane % lanes) * _WIDTH, D - _WIDTH)
                    for e in T.vectorized(_WIDTH):
                        values[(i * loads + load) * _WIDTH + e] = results.partial[
                            place + i * beside + lane // lanes, batch, token, head, channel + e
                        ]
        before = T.alloc_var("float32", peak)
        peak = T.max(peak, _of_warp(T.max, own))
        weight = T.alloc_var("float32", exp2(own - peak))
        total = total * _rescale(sums, before, peak) + _of_warp(lambda x, y: x + y, weight)
        for i in T.unroll(turns):
            factor = T.alloc_var("float32", _from_lane(weight, i * beside + lane // lanes))
            for e in T.unroll(loads * _WIDTH):
                sums[e] = sums[e] + factor * values[i * loads * _WIDTH + e]
    for distance in [lanes << n for n in range(beside.bit_length() - 1)]:
        for e in T.unroll(loads * _WIDTH):
            sums[e] = sums[e] + T.shfl_xor(sums[e], distance)
    if of.problem.has_sinks and is_final:
        sink = T.alloc_var("float32", results.sinks[head] * T.float32(LOG2_E))
        before = T.alloc_var("float32", peak)
        peak = T.max(peak, sink)
        total = total * _rescale(sums, before, peak) + exp2(sink - peak)
    inverse = T.alloc_var("float32", T.if_then_else(total > T.float32(0), T.float32(1) / total, T.float32(0)))
    total_lse = T.alloc_var("float32", T.if_then_else(total > T.float32(0), peak + log2(total), _NOTHING))
    to = T.alloc_var("int32", of.splits * of.ranges + T.truncdiv(of.split, _GROUP))
    for load in T.unroll(loads):
        channel = (load * lanes + lane) * _WIDTH
        if (lane < lanes) and (channel < D):
            if is_final:
                for e in T.vectorized(_WIDTH):
                    results.out[batch, token, head, channel + e] = T.cast(sums[load * _WIDTH + e] * inverse, of.problem.dtype)
            else:
                for e in T.vectorized(_WIDTH):
                    results.partial[to, batch, token, head, channel + e] = sums[load * _WIDTH + e] * inverse
    if lane == 0:
        if is_final:
            results.lse[batch, head, token] = total_lse * T.float32(1 / LOG2_E)
        else:
            results.partial_lse[to, batch, head, token] = total_lse


def _from_lane(value, lane):
    return T.call_extern("float32", "__shfl_sync", T.uint32(0xFFFFFFFF), value, lane, WARP)


@T.macro
def _of_warp(combine, value):
    """Return what `combine` makes of the values of all lanes."""
    result = T.alloc_var("float32", value)
    for distance in [16, 8, 4, 2, 1]:
        result = combine(result, T.shfl_xor(result, distance))
    return result


@T.macro
def _rescale(sums, before, peak):
    """Multiply the sums by the factor between two maxima, and return it."""
    factor = T.alloc_var("float32", exp2(before - peak))
    for e in T.unroll(int(sums.shape[0])):
        sums[e] = sums[e] * factor
    return factor

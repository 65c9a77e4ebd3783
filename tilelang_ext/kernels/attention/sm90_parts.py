"""The sum over the parts of divided tiles (`tiles.Remainder`), which `sm90_forward` leaves.

    out = sum of 2^(lse[part] - lse) O[part],  2^lse = sum of 2^lse[part], and of a sink

A part's O is divided by its own sum. Parts come in the order of the persistent blocks that computed them, so that results are
the same each time.
"""

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import LOG2_E, Problem
from tilelang_ext.kernels.attention.tiles import PARTS, alloc_remainder, divided_tiles, types_of_parts
from tilelang_ext.kernels.sm90 import pdl

_THREADS = 128  # of a block
_ELEMENTS = 16  # of a thread: with more, fewer blocks fit into an SM, and they wait for their loads
_TOGETHER = 4  # parts whose loads are under way together


def rows_of_block(channels: int) -> int:
    """Rows of a block."""
    rows = 16
    while rows > 4 and rows * channels > _ELEMENTS * _THREADS:
        rows //= 2
    return rows


def sum_parts(problem: Problem, part: tuple[int, int], block_N: int):
    """The prim_func (partial, partial_lse, k, sinks, out, lse) for parts of these rows and channels, blocks of block_N keys."""
    types, dtype, D = problem.types(), problem.result, problem.head_dim
    rows = rows_of_block(D)
    (block_M, _), (type_of_partial, type_of_lse) = part, types_of_parts(*part)

    @T.prim_func
    def sum_parts(
        partial: type_of_partial,
        partial_lse: type_of_lse,
        k: types.k,
        sinks: types.sinks,
        out: types.out,
        lse: types.lse,
    ):
        of_head = T.ceildiv(out.shape[1], block_M)
        num_tiles = of_head * out.shape[0] * out.shape[2]
        key_blocks = T.ceildiv(k.shape[1], block_N)
        tiles = divided_tiles(num_tiles, key_blocks, problem.num_sms)
        with T.Kernel(block_M // rows, T.max(tiles, 1), threads=_THREADS) as (bx, tile):
            remainder = alloc_remainder(num_tiles, key_blocks, problem.num_sms)
            O_f = T.alloc_fragment((rows, D), "float32")
            slot_s = T.alloc_shared((_TOGETHER,), "int32")  # of parts that are loaded together, -1 where there is none
            lse_s = T.alloc_shared((_TOGETHER, rows), "float32")
            peak_f = T.alloc_fragment((rows,), "float32")
            old_f = T.alloc_fragment((rows,), "float32")
            total_f = T.alloc_fragment((rows,), "float32")
            pdl.trigger()
            pdl.wait()
            number = remainder.full_waves * problem.num_sms + tile
            batch = T.truncdiv(number, of_head * out.shape[2])
            head = T.truncmod(T.truncdiv(number, of_head), out.shape[2])
            query = T.truncmod(number, of_head) * block_M + bx * rows
            first = T.alloc_var("int32", 0)
            last = T.alloc_var("int32", -1)
            if tile < remainder.tiles:  # nothing else stands in it: the barriers below are for all threads
                first = remainder.block_of(tile * remainder.key_blocks)
                last = remainder.block_of((tile + 1) * remainder.key_blocks - 1)
            for i in T.Parallel(rows):
                peak_f[i] = T.float32(-1e30)
                total_f[i] = T.float32(0)
                if problem.has_sinks:
                    peak_f[i] = T.max(peak_f[i], sinks[head] * T.float32(LOG2_E))
                    total_f[i] = T.exp2(sinks[head] * T.float32(LOG2_E) - peak_f[i])
            T.fill(O_f, 0)
            for step in T.serial(T.ceildiv(last - first + 1, _TOGETHER)):
                for p in T.Parallel(_TOGETHER):
                    block = first + step * _TOGETHER + p
                    begin = remainder.begin(block)
                    slot_s[p] = T.if_then_else(
                        (block <= last) & (remainder.begin(block + 1) > begin),
                        PARTS * block + tile - T.truncdiv(begin, remainder.key_blocks),
                        -1,
                    )
                for p, i in T.Parallel(_TOGETHER, rows):
                    lse_s[p, i] = T.if_then_else(
                        slot_s[p] >= 0, partial_lse[T.max(slot_s[p], 0), bx * rows + i], -T.infinity("float32")
                    )
                T.copy(peak_f, old_f)
                for i in T.Parallel(rows):
                    for p in T.unroll(_TOGETHER):
                        peak_f[i] = T.max(peak_f[i], lse_s[p, i])
                for i in T.Parallel(rows):
                    total_f[i] = total_f[i] * T.exp2(old_f[i] - peak_f[i])
                    for p in T.unroll(_TOGETHER):
                        total_f[i] = total_f[i] + T.exp2(lse_s[p, i] - peak_f[i])
                for i, j in T.Parallel(rows, D):
                    O_f[i, j] = O_f[i, j] * T.exp2(old_f[i] - peak_f[i])
                for p in T.unroll(_TOGETHER):
                    for i, j in T.Parallel(rows, D):
                        O_f[i, j] = O_f[i, j] + T.exp2(lse_s[p, i] - peak_f[i]) * T.if_then_else(
                            slot_s[p] >= 0, partial[T.max(slot_s[p], 0), bx * rows + i, j], T.float32(0)
                        )
            for i, j in T.Parallel(rows, D):
                if (last >= first) and (query + i < out.shape[1]):
                    out[batch, query + i, head, j] = T.cast(
                        T.if_then_else(total_f[i] > T.float32(0), O_f[i, j] / total_f[i], T.float32(0)), dtype
                    )
            for i in T.Parallel(rows):
                if (last >= first) and (query + i < out.shape[1]):
                    lse[batch, head, query + i] = T.if_then_else(
                        total_f[i] > T.float32(0),
                        (peak_f[i] + T.log2(total_f[i])) * T.float32(1 / LOG2_E),
                        -T.infinity("float32"),
                    )

    return sum_parts

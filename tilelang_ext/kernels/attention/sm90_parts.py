"""The sum over the parts of divided tiles (`tiles.Remainder`), which `sm90_forward` leaves.

    out = sum of 2^(lse[part] - lse) O[part],  2^lse = sum of 2^lse[part], and of a sink

A part's O is divided by its own sum. Parts come in the order of the persistent blocks that computed them, so that results are
the same each time.
"""

from tilelang_ext import language as T
from tilelang_ext.kernels.attention.problem import LOG2_E, Problem
from tilelang_ext.kernels.attention.tiles import PARTS, alloc_remainder, divided_tiles, types_of_parts
from tilelang_ext.kernels.sm90 import pdl

_ROWS, _THREADS = 16, 128  # of a block


def sum_parts(problem: Problem, part: tuple[int, int], block_N: int):
    """The prim_func (partial, partial_lse, k, sinks, out, lse) for parts of these rows and channels, blocks of block_N keys."""
    types, dtype, D = problem.types(), problem.result, problem.head_dim
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
        with T.Kernel(block_M // _ROWS, T.max(tiles, 1), threads=_THREADS) as (bx, tile):
            remainder = alloc_remainder(num_tiles, key_blocks, problem.num_sms)
            O_f = T.alloc_fragment((_ROWS, D), "float32")
            peak_s = T.alloc_shared((_ROWS,), "float32")
            total_s = T.alloc_shared((_ROWS,), "float32")
            pdl.trigger()
            pdl.wait()
            if tile < remainder.tiles:
                number = remainder.full_waves * problem.num_sms + tile
                batch = T.truncdiv(number, of_head * out.shape[2])
                head = T.truncmod(T.truncdiv(number, of_head), out.shape[2])
                query = T.truncmod(number, of_head) * block_M + bx * _ROWS
                first = T.alloc_var("int32", remainder.block_of(tile * remainder.key_blocks))
                last = T.alloc_var("int32", remainder.block_of((tile + 1) * remainder.key_blocks - 1))
                slot = T.alloc_var("int32", 0)
                for i in T.Parallel(_ROWS):
                    peak_s[i] = T.float32(-1e30)
                    total_s[i] = T.float32(0)
                    if problem.has_sinks:
                        peak_s[i] = T.max(peak_s[i], sinks[head] * T.float32(LOG2_E))
                for block in T.serial(last - first + 1):
                    begin = remainder.begin(first + block)
                    if remainder.begin(first + block + 1) > begin:
                        slot = PARTS * (first + block) + tile - T.truncdiv(begin, remainder.key_blocks)
                        for i in T.Parallel(_ROWS):
                            peak_s[i] = T.max(peak_s[i], partial_lse[slot, bx * _ROWS + i])
                if problem.has_sinks:
                    for i in T.Parallel(_ROWS):
                        total_s[i] = T.exp2(sinks[head] * T.float32(LOG2_E) - peak_s[i])
                T.fill(O_f, 0)
                for block in T.serial(last - first + 1):
                    begin = remainder.begin(first + block)
                    if remainder.begin(first + block + 1) > begin:
                        slot = PARTS * (first + block) + tile - T.truncdiv(begin, remainder.key_blocks)
                        for i in T.Parallel(_ROWS):
                            total_s[i] = total_s[i] + T.exp2(partial_lse[slot, bx * _ROWS + i] - peak_s[i])
                        for i, j in T.Parallel(_ROWS, D):
                            O_f[i, j] = O_f[i, j] + (
                                T.exp2(partial_lse[slot, bx * _ROWS + i] - peak_s[i]) * partial[slot, bx * _ROWS + i, j]
                            )
                for i, j in T.Parallel(_ROWS, D):
                    if query + i < out.shape[1]:
                        out[batch, query + i, head, j] = T.cast(
                            T.if_then_else(total_s[i] > T.float32(0), O_f[i, j] / total_s[i], T.float32(0)), dtype
                        )
                for i in T.Parallel(_ROWS):
                    if query + i < out.shape[1]:
                        lse[batch, head, query + i] = T.if_then_else(
                            total_s[i] > T.float32(0),
                            (peak_s[i] + T.log2(total_s[i])) * T.float32(1 / LOG2_E),
                            -T.infinity("float32"),
                        )

    return sum_parts

"""Sort (token, slot) pairs by expert on the device, into blocks of rows that have one expert each.

    sorted_token_ids[row] = slot << 24 | token        padding: top_k << 24 | tokens

An expert's rows are padded to whole blocks of block_m; an expert without tokens has no block. Outputs are as large as the worst
case needs and `num_valid` says how much of them is in use, so a launch depends on shapes alone and can be captured in a graph.
Rows of an expert come in any order, another one each time: what is computed from a row does not depend on its place. The
contract is that of aiter; `reference.moe_sort` is its truth. One block of threads counts, then places; every 32 threads have
counters of their own, since atomics of all threads on the same few wait for each other.
"""

from typing import NamedTuple

from torch import Tensor

from tilelang_ext import language as T

TOKEN_BITS = 24  # of a sorted token id; the slot lies above
MAX_TOP_K = 127  # slots and the sentinel share the 7 bits that an int32 has left
THREADS, MAX_THREADS = 256, 1024
_GROUP = 32  # threads that share counters
_ENTRIES = 4  # of a thread and step, whose loads are under way together
_MAX_COUNTERS = 2048  # of a kind: 1024 experts fit in the 32 KB that every target has


class Routing(NamedTuple):
    """The tensors that `moe_sort` writes."""

    token_ids: Tensor
    weights: Tensor
    expert_ids: Tensor
    num_valid: Tensor
    positions: Tensor


def capacity_of(tokens: int, top_k: int, num_experts: int, block_m: int) -> int:
    """Return the rows that any routing fits in, whole blocks of block_m; `num_experts` counts those elsewhere too."""
    return -(-(tokens * top_k + num_experts * block_m - top_k) // block_m) * block_m


def moe_sort(block_m: int, max_experts: int, ids_dtype: str = "int32", threads: int = THREADS):
    """The prim_func: (topk_ids, topk_weights, expert_mask, token_ids, weights, expert_ids, num_valid, positions).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | topk_ids | (tokens, top_k), values outside [0, num_experts) are dropped | `ids_dtype`: int32 or int64 |
    | topk_weights | (tokens, top_k) | float32 |
    | expert_mask | (num_experts,), num_experts <= max_experts; 1 where the expert is local, else 0 | int32 |
    | token_ids, weights | (blocks * block_m,) of `capacity_of` | int32, float32 |
    | expert_ids | (blocks,): number of the block's expert among the local ones, -1 past the last block in use | int32 |
    | num_valid | (1,): rows in use | int32 |
    | positions | (tokens, top_k): the row of a slot, -1 where it is dropped or its expert elsewhere | int32 |
    """
    tokens, top_k, num_experts, blocks = T.dynamic("tokens"), T.dynamic("top_k"), T.dynamic("num_experts"), T.dynamic("blocks")
    ids_type = T.Tensor((tokens, top_k), ids_dtype)
    weights_type = T.Tensor((tokens, top_k), "float32")
    mask_type = T.Tensor((num_experts,), "int32")
    groups = max(1, min(threads // _GROUP, _MAX_COUNTERS // max_experts))
    scans = (max_experts - 1).bit_length()
    entries = threads * _ENTRIES  # of a step
    width = -(-max_experts // threads) * threads  # all threads, so that they can meet between scans

    @T.macro
    def find(topk_ids, expert_mask, step, tokens, top_k, num_experts, places_f, experts_f):
        """The (token, slot) pairs of a step as sorted ids, and their experts; -1 past the last, and where none is here."""
        for i in T.Parallel(entries):
            # Variables: as expressions, these would be computed anew at every use, and again for its bounds.
            token = T.alloc_var("int32", T.truncdiv(step * entries + i, top_k))
            slot = T.alloc_var("int32", step * entries + i - token * top_k)
            id, expert, place = T.alloc_var(ids_dtype, -1), T.alloc_var("int32", -1), T.alloc_var("int32", -1)
            if token < tokens:
                id = topk_ids[token, slot]
                place = slot << TOKEN_BITS | token
            if id >= 0 and id < num_experts:  # noqa: SIM102 - the mask is read for real ids
                if expert_mask[T.cast(id, "int32")] != 0:
                    expert = T.cast(id, "int32")
            places_f[i], experts_f[i] = place, expert

    @T.prim_func
    def moe_sort(
        topk_ids: ids_type,
        topk_weights: weights_type,
        expert_mask: mask_type,
        token_ids: T.Tensor((blocks * block_m,), "int32"),
        weights: T.Tensor((blocks * block_m,), "float32"),
        expert_ids: T.Tensor((blocks,), "int32"),
        num_valid: T.Tensor((1,), "int32"),
        positions: T.Tensor((tokens, top_k), "int32"),
    ):
        with T.Kernel(1, threads=threads) as _:
            # Of each group of threads: rows of an expert, and where the next of them goes, from the expert's first on.
            count_s, next_s = (T.alloc_shared((max_experts, groups), "int32") for _ in range(2))
            rows_s = T.alloc_shared((max_experts,), "int32")  # of an expert
            # Sums over this expert and those before it: blocks, and how many are local.
            blocks_s, locals_s = T.alloc_shared((max_experts,), "int32"), T.alloc_shared((max_experts,), "int32")
            blocks_f, locals_f = T.alloc_fragment((width,), "int32"), T.alloc_fragment((width,), "int32")
            places_f, experts_f = T.alloc_fragment((entries,), "int32"), T.alloc_fragment((entries,), "int32")
            none = top_k << TOKEN_BITS | tokens

            for e, group in T.Parallel(max_experts, groups):
                count_s[e, group] = 0
            for step in T.serial(T.ceildiv(tokens * top_k, entries)):
                find(topk_ids, expert_mask, step, tokens, top_k, num_experts, places_f, experts_f)
                for i in T.Parallel(entries):
                    if experts_f[i] >= 0:
                        T.atomic_add(count_s[experts_f[i], i // _GROUP % groups], 1)

            for e in T.Parallel(max_experts):
                rows = T.alloc_var("int32", 0)
                for group in T.serial(groups):
                    next_s[e, group] = rows
                    rows += count_s[e, group]
                rows_s[e] = rows
                blocks_s[e] = T.ceildiv(rows, block_m)
                local = T.alloc_var("int32", 0)
                if e < num_experts:
                    local = expert_mask[e]
                locals_s[e] = local
            for scan in T.serial(scans):
                for e in T.Parallel(width):
                    before = e - (1 << scan)
                    has = (before >= 0) & (e < max_experts)
                    blocks_f[e] = T.if_then_else(has, blocks_s[T.clamp(before, 0, max_experts - 1)], 0)
                    locals_f[e] = T.if_then_else(has, locals_s[T.clamp(before, 0, max_experts - 1)], 0)
                for e in T.Parallel(width):
                    if e < max_experts:
                        blocks_s[e] += blocks_f[e]
                        locals_s[e] += locals_f[e]

            for step in T.serial(T.ceildiv(tokens * top_k, entries)):
                find(topk_ids, expert_mask, step, tokens, top_k, num_experts, places_f, experts_f)
                for i in T.Parallel(entries):
                    token, slot = places_f[i] & (1 << TOKEN_BITS) - 1, places_f[i] >> TOKEN_BITS
                    row, expert = T.alloc_var("int32", -1), T.alloc_var("int32", experts_f[i])
                    if expert >= 0:
                        first = (blocks_s[expert] - T.ceildiv(rows_s[expert], block_m)) * block_m
                        row = first + T.atomic_add(next_s[expert, i // _GROUP % groups], 1, return_prev=True)
                        token_ids[row] = places_f[i]
                        weights[row] = topk_weights[token, slot]
                    if places_f[i] >= 0:
                        positions[token, slot] = row

            # What no row took: the rest of each expert's last block, and the blocks after the last in use.
            for e in T.Parallel(max_experts):
                if e < num_experts:
                    rows = T.alloc_var("int32", rows_s[e])
                    first = T.alloc_var("int32", blocks_s[e] - T.ceildiv(rows, block_m))
                    for j in T.serial(T.ceildiv(rows, block_m)):
                        expert_ids[first + j] = locals_s[e] - 1
                    for j in T.serial(T.ceildiv(rows, block_m) * block_m - rows):
                        token_ids[first * block_m + rows + j] = none
                        weights[first * block_m + rows + j] = 0
            used = T.alloc_var("int32", blocks_s[max_experts - 1])
            for i in T.Parallel(threads):
                if i == 0:
                    num_valid[0] = used * block_m
            for step in T.serial(T.ceildiv(blocks * block_m, threads)):
                for i in T.Parallel(threads):
                    row = step * threads + i
                    if row < blocks * block_m and row >= used * block_m:
                        token_ids[row] = none
                        weights[row] = 0
                        if row % block_m == 0:
                            expert_ids[row // block_m] = -1

    return moe_sort

"""Sort (token, slot) pairs by expert on the device, into blocks of rows that have one expert each.

    sorted_token_ids[row] = slot << 24 | token        padding: top_k << 24 | tokens

An expert's rows are padded to whole blocks of block_m; an expert without tokens has no block. Outputs are as large as the worst
case needs and `num_valid` says how much of them is in use, so a launch depends on shapes alone and can be captured in a graph.
Rows of an expert come in any order, another one each time: what is computed from a row does not depend on its place. The
contract is that of aiter; `reference.moe_sort` is its truth.

A block of threads has a chunk of slots. It counts its own by expert, adds what `count_slots` has counted in the other chunks,
and so knows where every expert starts and how much of it earlier chunks place: one launch where there is one chunk, else two.
Each block reads all counts, so that nobody waits for another block: 32 MB together for 2^18 slots and 128 experts.
"""

from typing import NamedTuple

from torch import Tensor

from tilelang_ext import language as T

TOKEN_BITS = 24  # of a sorted token id; the slot lies above
MAX_TOP_K = 127  # slots and the sentinel share the 7 bits that an int32 has left
_THREADS = 256
CHUNK = 4 * _THREADS  # slots; the loads of a thread's four are under way together


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


def _steps(items, size):
    """Return ceil(items / size) of items > -size: T.ceildiv rounds towards minus infinity, which takes more instructions."""
    return T.truncdiv(items + size - 1, size)


def _find(max_experts: int, ids_dtype: str):
    """The macro (topk_ids, chunk, tokens, top_k, experts_f): experts of a chunk's slots, -1 past the last and out of range."""

    @T.macro
    def find(topk_ids, chunk, tokens, top_k, experts_f):
        for i in T.Parallel(CHUNK):
            # Variables: as expressions, these would be computed anew at every use, and again for its bounds.
            token = T.alloc_var("int32", T.truncdiv(chunk * CHUNK + i, top_k))
            slot = T.alloc_var("int32", chunk * CHUNK + i - token * top_k)
            id = T.alloc_var(ids_dtype, -1)
            if token < tokens:
                id = topk_ids[token, slot]
            experts_f[i] = T.if_then_else((id >= 0) & (id < max_experts), T.cast(id, "int32"), -1)

    return find


def count_slots(max_experts: int, ids_dtype: str = "int32"):
    """The prim_func: (topk_ids, counts), how many slots of each chunk name an expert; a launch ahead of `moe_sort`'s.

    Tensors are those of `moe_sort`; experts elsewhere are counted too.
    """
    tokens, top_k, chunks = T.dynamic("tokens"), T.dynamic("top_k"), T.dynamic("chunks")
    ids_type = T.Tensor((tokens, top_k), ids_dtype)
    find = _find(max_experts, ids_dtype)

    @T.prim_func
    def count_slots(topk_ids: ids_type, counts: T.Tensor((chunks, max_experts), "int32")):
        with T.Kernel(chunks, threads=_THREADS) as chunk:
            count_s = T.alloc_shared((max_experts,), "int32")
            experts_f = T.alloc_fragment((CHUNK,), "int32")
            for e in T.Parallel(max_experts):
                count_s[e] = 0
            find(topk_ids, chunk, tokens, top_k, experts_f)
            for i in T.Parallel(CHUNK):
                if experts_f[i] >= 0:
                    T.atomic_add(count_s[experts_f[i]], 1)
            for e in T.Parallel(max_experts):
                counts[chunk, e] = count_s[e]

    return count_slots


def moe_sort(block_m: int, max_experts: int, ids_dtype: str = "int32", overlapped: bool = False):
    """The prim_func: (topk_ids, topk_weights, expert_mask, counts, token_ids, weights, expert_ids, num_valid, positions).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | topk_ids | (tokens, top_k), values outside [0, num_experts) are dropped | `ids_dtype`: int32 or int64 |
    | topk_weights | (tokens, top_k) | float32 |
    | expert_mask | (num_experts,), num_experts <= max_experts; 1 where the expert is local, else 0 | int32 |
    | counts | (chunks, max_experts) of `count_slots`, a chunk for every CHUNK slots begun; not read where it is one | int32 |
    | token_ids, weights | (blocks * block_m,) of `capacity_of` | int32, float32 |
    | expert_ids | (blocks,): number of the block's expert among the local ones, -1 past the last block in use | int32 |
    | num_valid | (1,): rows in use | int32 |
    | positions | (tokens, top_k): the row of a slot, -1 where it is dropped or its expert elsewhere | int32 |

    On CUDA, the launch after one that is `overlapped` may begin before it has ended, and then waits for that end.
    """
    tokens, top_k, num_experts = T.dynamic("tokens"), T.dynamic("top_k"), T.dynamic("num_experts")
    chunks, blocks = T.dynamic("chunks"), T.dynamic("blocks")
    ids_type = T.Tensor((tokens, top_k), ids_dtype)
    weights_type = T.Tensor((tokens, top_k), "float32")
    mask_type = T.Tensor((num_experts,), "int32")
    width = -(-max_experts // _THREADS) * _THREADS  # all threads, so that they can meet between scans
    scans = (max_experts - 1).bit_length()
    find = _find(max_experts, ids_dtype)

    @T.prim_func
    def moe_sort(
        topk_ids: ids_type,
        topk_weights: weights_type,
        expert_mask: mask_type,
        counts: T.Tensor((chunks, max_experts), "int32"),
        token_ids: T.Tensor((blocks * block_m,), "int32"),
        weights: T.Tensor((blocks * block_m,), "float32"),
        expert_ids: T.Tensor((blocks,), "int32"),
        num_valid: T.Tensor((1,), "int32"),
        positions: T.Tensor((tokens, top_k), "int32"),
    ):
        with T.Kernel(chunks, threads=_THREADS) as chunk:
            if overlapped:
                T.pdl_trigger()
            count_s = T.alloc_shared((width,), "int32")  # slots of this chunk
            rows_s = T.alloc_shared((width,), "int32")  # of an expert, in all chunks
            next_s = T.alloc_shared((width,), "int32")  # where this chunk's first row goes, -1 for experts elsewhere
            # Sums over this expert and those before it, read from one half and written to the other: blocks, and local experts.
            blocks_s, locals_s = (T.alloc_shared((2, width), "int32") for name in ("blocks", "locals"))
            experts_f, ranks_f = T.alloc_fragment((CHUNK,), "int32"), T.alloc_fragment((CHUNK,), "int32")
            weights_f, local_f = T.alloc_fragment((CHUNK,), "float32"), T.alloc_fragment((width,), "int32")
            none = top_k << TOKEN_BITS | tokens

            # Ids, weights and the mask are under way together, before the first of them is waited for.
            for e in T.Parallel(width):
                count_s[e] = 0
                local_f[e] = T.if_then_else(e < num_experts, expert_mask[e], 0)
            find(topk_ids, chunk, tokens, top_k, experts_f)
            for i in T.Parallel(CHUNK):
                token = T.alloc_var("int32", T.truncdiv(chunk * CHUNK + i, top_k))
                slot = T.alloc_var("int32", chunk * CHUNK + i - token * top_k)
                weights_f[i] = T.if_then_else(token < tokens, topk_weights[token, slot], 0)
            for i in T.Parallel(CHUNK):
                ranks_f[i] = 0
                if experts_f[i] >= 0:
                    ranks_f[i] = T.atomic_add(count_s[experts_f[i]], 1, return_prev=True)

            for e in T.Parallel(width):
                before, after = T.alloc_var("int32", 0), T.alloc_var("int32", 0)
                if local_f[e] != 0:
                    for other in T.serial(chunk):
                        before += counts[other, e]
                    for other in T.serial(chunks - 1 - chunk):
                        after += counts[chunk + 1 + other, e]
                rows = T.alloc_var("int32", T.if_then_else(local_f[e] != 0, before + count_s[e] + after, 0))
                rows_s[e] = rows
                next_s[e] = T.if_then_else(local_f[e] != 0, before, -1)
                blocks_s[0, e] = T.ceildiv(rows, block_m)
                locals_s[0, e] = local_f[e]
            for scan in T.serial(scans):
                for e in T.Parallel(width):
                    added = T.max(e - (1 << scan), 0)
                    has = e >= 1 << scan
                    blocks_s[(scan + 1) % 2, e] = blocks_s[scan % 2, e] + T.if_then_else(has, blocks_s[scan % 2, added], 0)
                    locals_s[(scan + 1) % 2, e] = locals_s[scan % 2, e] + T.if_then_else(has, locals_s[scan % 2, added], 0)
            for e in T.Parallel(width):
                if next_s[e] >= 0:
                    next_s[e] += (blocks_s[scans % 2, e] - T.ceildiv(rows_s[e], block_m)) * block_m

            for i in T.Parallel(CHUNK):
                token = T.alloc_var("int32", T.truncdiv(chunk * CHUNK + i, top_k))
                slot = T.alloc_var("int32", chunk * CHUNK + i - token * top_k)
                row = T.alloc_var("int32", -1)
                if experts_f[i] >= 0:
                    row = next_s[experts_f[i]]
                if row >= 0:
                    row += ranks_f[i]
                    token_ids[row] = slot << TOKEN_BITS | token
                    weights[row] = weights_f[i]
                if token < tokens:
                    positions[token, slot] = row

            # What no row took, divided over the chunks: the rest of each expert's last block, and what lies past all experts.
            used = T.alloc_var("int32", blocks_s[scans % 2, max_experts - 1])
            for i in T.Parallel(_THREADS):
                if i == 0 and chunk == 0:
                    num_valid[0] = used * block_m
            for e in T.Parallel(width):
                count = T.alloc_var("int32", T.ceildiv(rows_s[e], block_m))
                first = T.alloc_var("int32", blocks_s[scans % 2, e] - count)
                for j in T.serial(_steps(count - chunk, chunks)):
                    expert_ids[first + chunk + j * chunks] = locals_s[scans % 2, e] - 1
            for step in T.serial(_steps(num_experts * block_m, chunks * _THREADS)):
                for i in T.Parallel(_THREADS):
                    index = T.alloc_var("int32", (step * chunks + chunk) * _THREADS + i)
                    e, j = T.alloc_var("int32", index // block_m), T.alloc_var("int32", index % block_m)
                    if e < num_experts:
                        rows = T.alloc_var("int32", rows_s[e])
                        if j < T.ceildiv(rows, block_m) * block_m - rows:
                            token_ids[blocks_s[scans % 2, e] * block_m - 1 - j] = none
                            weights[blocks_s[scans % 2, e] * block_m - 1 - j] = 0
            for step in T.serial(_steps((blocks - used) * block_m, chunks * _THREADS)):
                for i in T.Parallel(_THREADS):
                    row = T.alloc_var("int32", used * block_m + (step * chunks + chunk) * _THREADS + i)
                    if row < blocks * block_m:
                        token_ids[row] = none
                        weights[row] = 0
                        if row % block_m == 0:
                            expert_ids[row // block_m] = -1

    return moe_sort

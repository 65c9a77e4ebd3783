"""Sort (token, slot) pairs by expert on the device, into blocks of rows that have one expert each.

    sorted_token_ids[row] = slot << 24 | token        padding: top_k << 24 | tokens

The rows of each expert are padded to whole blocks of block_M; an expert without tokens has no block. Outputs have the size of
the worst case, and `num_valid` says how many rows are in use, so a launch depends on shapes alone and can be captured in a
graph. The order of the rows of one expert is free and differs from call to call, since what is computed from a row does not
depend on where it is. The contract is that of aiter; `reference.moe_sort` is the reference.

A block of threads has a chunk of slots. It counts the slots of its chunk by expert and adds the counts of the other chunks,
which `count_slots` wrote; so it knows where each expert starts and how many of its rows belong to earlier chunks. That is one
launch where there is one chunk, and two elsewhere. Each block reads all counts, so that no block waits for another: 32 MB in
all for 2^18 slots and 128 experts.
"""

from tilelang_ext import language as T
from tilelang_ext.kernels.mxfp4_moe.problem import TOKEN_BITS

_THREADS = 256
CHUNK = 4 * _THREADS  # slots of a block; each thread has four, whose loads are in flight together


def capacity_of(tokens: int, top_k: int, num_experts: int, block_M: int) -> int:
    """Return the number of rows in which any routing fits: whole blocks. `num_experts` counts experts on other ranks too."""
    return -(-(tokens * top_k + num_experts * block_M - top_k) // block_M) * block_M


def _steps(items, size):
    """Return ceil(items / size) for items > -size. T.ceildiv rounds towards minus infinity, which takes more instructions."""
    return T.truncdiv(items + size - 1, size)


def _find(max_experts: int, ids_dtype: str):
    """Return the macro find(topk_ids, chunk, tokens, top_k, experts_f), which loads the experts of the slots of a chunk.

    The expert is -1 past the last slot and where the id is out of range.
    """

    @T.macro
    def find(topk_ids, chunk, tokens, top_k, experts_f):
        for i in T.Parallel(CHUNK):
            # Variables, since expressions would be computed anew at each use, and again for the bounds check of each access.
            token = T.alloc_var("int32", T.truncdiv(chunk * CHUNK + i, top_k))
            slot = T.alloc_var("int32", chunk * CHUNK + i - token * top_k)
            id = T.alloc_var(ids_dtype, -1)
            if token < tokens:
                id = topk_ids[token, slot]
            experts_f[i] = T.if_then_else((id >= 0) & (id < max_experts), T.cast(id, "int32"), -1)

    return find


def count_slots(max_experts: int, ids_dtype: str = "int32"):
    """Return the prim_func (topk_ids, counts), launched before `moe_sort`: it counts the slots of each chunk by expert.

    The tensors are those of `moe_sort`. Experts on other ranks are counted too.
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


def moe_sort(block_M: int, max_experts: int, ids_dtype: str = "int32", triggers_next: bool = False):
    """Return the prim_func (topk_ids, topk_weights, expert_mask, counts, token_ids, weights, expert_ids, num_valid, positions).

    | parameter | shape | dtype |
    | --- | --- | --- |
    | topk_ids | (tokens, top_k); values outside [0, num_experts) are dropped | `ids_dtype`: int32 or int64 |
    | topk_weights | (tokens, top_k) | float32 |
    | expert_mask | (num_experts,), num_experts <= max_experts; 1 where the expert is local, else 0 | int32 |
    | counts | (ceil(slots / CHUNK), max_experts), as `count_slots` writes it; not read where there is one chunk | int32 |
    | token_ids, weights | (blocks * block_M,), as many as `capacity_of` returns | int32, float32 |
    | expert_ids | (blocks,): the number of the block's expert among the local ones, -1 past the last block in use | int32 |
    | num_valid | (1,): the number of rows in use | int32 |
    | positions | (tokens, top_k): the row of a slot, -1 where it is dropped or its expert is on another rank | int32 |

    With `triggers_next`, on CUDA, the kernel that is launched next may start before this one has ended (PDL).
    """
    tokens, top_k, num_experts = T.dynamic("tokens"), T.dynamic("top_k"), T.dynamic("num_experts")
    chunks, blocks = T.dynamic("chunks"), T.dynamic("blocks")
    ids_type = T.Tensor((tokens, top_k), ids_dtype)
    weights_type = T.Tensor((tokens, top_k), "float32")
    mask_type = T.Tensor((num_experts,), "int32")
    width = -(-max_experts // _THREADS) * _THREADS  # so that all threads reach the barriers between scans
    scans = (max_experts - 1).bit_length()
    find = _find(max_experts, ids_dtype)

    @T.prim_func
    def moe_sort(
        topk_ids: ids_type,
        topk_weights: weights_type,
        expert_mask: mask_type,
        counts: T.Tensor((chunks, max_experts), "int32"),
        token_ids: T.Tensor((blocks * block_M,), "int32"),
        weights: T.Tensor((blocks * block_M,), "float32"),
        expert_ids: T.Tensor((blocks,), "int32"),
        num_valid: T.Tensor((1,), "int32"),
        positions: T.Tensor((tokens, top_k), "int32"),
    ):
        with T.Kernel(chunks, threads=_THREADS) as chunk:
            if triggers_next:
                T.pdl_trigger()
            count_s = T.alloc_shared((width,), "int32")  # slots of this chunk, by expert
            rows_s = T.alloc_shared((width,), "int32")  # rows of each expert, from all chunks
            next_s = T.alloc_shared((width,), "int32")  # where the first row of this chunk goes, -1 for experts on other ranks
            # Inclusive prefix sums over experts, of blocks and of local experts; a scan reads one half and writes the other.
            blocks_s, locals_s = (T.alloc_shared((2, width), "int32") for name in ("blocks", "locals"))
            experts_f, ranks_f = T.alloc_fragment((CHUNK,), "int32"), T.alloc_fragment((CHUNK,), "int32")
            weights_f, local_f = T.alloc_fragment((CHUNK,), "float32"), T.alloc_fragment((width,), "int32")
            none = top_k << TOKEN_BITS | tokens

            # The loads of ids, weights and the mask are in flight together.
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
                blocks_s[0, e] = T.ceildiv(rows, block_M)
                locals_s[0, e] = local_f[e]
            for scan in T.serial(scans):
                for e in T.Parallel(width):
                    added = T.max(e - (1 << scan), 0)
                    has = e >= 1 << scan
                    blocks_s[(scan + 1) % 2, e] = blocks_s[scan % 2, e] + T.if_then_else(has, blocks_s[scan % 2, added], 0)
                    locals_s[(scan + 1) % 2, e] = locals_s[scan % 2, e] + T.if_then_else(has, locals_s[scan % 2, added], 0)
            for e in T.Parallel(width):
                if next_s[e] >= 0:
                    next_s[e] += (blocks_s[scans % 2, e] - T.ceildiv(rows_s[e], block_M)) * block_M

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

            # Padding, divided over the chunks: the rest of the last block of each expert, and the blocks past all experts.
            used = T.alloc_var("int32", blocks_s[scans % 2, max_experts - 1])
            for i in T.Parallel(_THREADS):
                if i == 0 and chunk == 0:
                    num_valid[0] = used * block_M
            for e in T.Parallel(width):
                count = T.alloc_var("int32", T.ceildiv(rows_s[e], block_M))
                first = T.alloc_var("int32", blocks_s[scans % 2, e] - count)
                for j in T.serial(_steps(count - chunk, chunks)):
                    expert_ids[first + chunk + j * chunks] = locals_s[scans % 2, e] - 1
            for step in T.serial(_steps(num_experts * block_M, chunks * _THREADS)):
                for i in T.Parallel(_THREADS):
                    index = T.alloc_var("int32", (step * chunks + chunk) * _THREADS + i)
                    e, j = T.alloc_var("int32", index // block_M), T.alloc_var("int32", index % block_M)
                    if e < num_experts:
                        rows = T.alloc_var("int32", rows_s[e])
                        if j < T.ceildiv(rows, block_M) * block_M - rows:
                            token_ids[blocks_s[scans % 2, e] * block_M - 1 - j] = none
                            weights[blocks_s[scans % 2, e] * block_M - 1 - j] = 0
            for step in T.serial(_steps((blocks - used) * block_M, chunks * _THREADS)):
                for i in T.Parallel(_THREADS):
                    row = T.alloc_var("int32", used * block_M + (step * chunks + chunk) * _THREADS + i)
                    if row < blocks * block_M:
                        token_ids[row] = none
                        weights[row] = 0
                        if row % block_M == 0:
                            expert_ids[row // block_M] = -1

    return moe_sort

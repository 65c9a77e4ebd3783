"""Sort (token, slot) pairs by expert on the device, into blocks of rows that have one expert each.

    sorted_token_ids[row] = slot << 24 | token        padding: top_k << 24 | tokens

An expert's rows are padded to whole blocks of block_m; an expert without tokens has no block. Outputs are as large as the worst
case needs and `num_valid` says how much of them is in use, so a launch depends on shapes alone and can be captured in a graph.
Rows of an expert come in any order, another one each time: what is computed from a row does not depend on its place. The
contract is that of aiter; `reference.moe_sort` is its truth. One block of threads counts, then places.
"""

from tilelang_ext import language as T

TOKEN_BITS = 24  # of a sorted token id; the slot lies above
MAX_TOP_K = 127  # slots and the sentinel share the 7 bits that an int32 has left
THREADS, MAX_THREADS = 256, 1024


def capacity_of(tokens: int, top_k: int, num_experts: int, block_m: int) -> int:
    """Return the rows that any routing fits in, whole blocks of block_m; `num_experts` counts those elsewhere too."""
    return -(-(tokens * top_k + num_experts * block_m - top_k) // block_m) * block_m


def moe_sort(block_m: int, max_experts: int, ids_dtype: str = "int32", threads: int = THREADS):
    """The prim_func: (topk_ids, topk_weights, expert_mask, token_ids, weights, expert_ids, num_valid,
    positions).

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
            count_s = T.alloc_shared((max_experts,), "int32")  # rows of an expert
            block_s = T.alloc_shared((max_experts,), "int32")  # its first block
            local_s = T.alloc_shared((max_experts,), "int32")  # its number among the local ones
            next_s = T.alloc_shared((max_experts,), "int32")  # where its next row goes
            used_s = T.alloc_shared((1,), "int32")  # blocks in use

            for e in T.Parallel(max_experts):
                count_s[e] = 0
            for step in T.serial(T.ceildiv(tokens * top_k, threads)):
                for i in T.Parallel(threads):
                    # Variables: as expressions, these would be computed anew at every use, and again for its bounds.
                    token = T.alloc_var("int32", (step * threads + i) // top_k)
                    slot = T.alloc_var("int32", (step * threads + i) % top_k)
                    id = T.alloc_var(ids_dtype, -1)
                    if token < tokens:
                        id = topk_ids[token, slot]
                    if id >= 0 and id < num_experts:
                        expert = T.alloc_var("int32", T.cast(id, "int32"))
                        if expert_mask[expert] != 0:
                            T.atomic_add(count_s[expert], 1)

            for e in T.Parallel(max_experts):
                before = T.alloc_var("int32", 0)
                local = T.alloc_var("int32", 0)
                for other in T.serial(num_experts):
                    if other < e:
                        before += T.ceildiv(count_s[other], block_m)
                        local += expert_mask[other]
                block_s[e] = before
                local_s[e] = local
                next_s[e] = before * block_m
                if e == num_experts - 1:
                    used_s[0] = before + T.ceildiv(count_s[e], block_m)
                    num_valid[0] = (before + T.ceildiv(count_s[e], block_m)) * block_m

            for step in T.serial(T.ceildiv(tokens * top_k, threads)):
                for i in T.Parallel(threads):
                    token = T.alloc_var("int32", (step * threads + i) // top_k)
                    slot = T.alloc_var("int32", (step * threads + i) % top_k)
                    id = T.alloc_var(ids_dtype, -1)
                    position = T.alloc_var("int32", -1)
                    if token < tokens:
                        id = topk_ids[token, slot]
                    if id >= 0 and id < num_experts:
                        expert = T.alloc_var("int32", T.cast(id, "int32"))
                        if expert_mask[expert] != 0:
                            row = T.atomic_add(next_s[expert], 1, return_prev=True)
                            token_ids[row] = slot << TOKEN_BITS | token
                            weights[row] = topk_weights[token, slot]
                            position = row
                    if token < tokens:
                        positions[token, slot] = position

            # What no row took: the rest of each expert's last block, and the blocks after the last in use.
            for e in T.Parallel(max_experts):
                if e < num_experts:
                    rows = T.alloc_var("int32", count_s[e])
                    first = T.alloc_var("int32", block_s[e])
                    for j in T.serial(T.ceildiv(rows, block_m)):
                        expert_ids[first + j] = local_s[e]
                    for j in T.serial(T.ceildiv(rows, block_m) * block_m - rows):
                        token_ids[first * block_m + rows + j] = top_k << TOKEN_BITS | tokens
                        weights[first * block_m + rows + j] = 0
            used = T.alloc_var("int32", used_s[0])
            for step in T.serial(T.ceildiv(blocks * block_m, threads)):
                for i in T.Parallel(threads):
                    row = step * threads + i
                    if row < blocks * block_m and row >= used * block_m:
                        token_ids[row] = top_k << TOKEN_BITS | tokens
                        weights[row] = 0
                        if row % block_m == 0:
                            expert_ids[row // block_m] = -1

    return moe_sort

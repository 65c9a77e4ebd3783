"""The sum over the slots of a token, after GEMMs that store each slot in a row of its own: the same bits each time.

It completes what `T.moe_scatter` with mode "reduce" leaves; there is no intrinsic for it.
"""

from tilelang_ext import language as T
from tilelang_ext.formats import MX_GROUP

# For a kernel that uses PDL: its own bounds checks keep accesses inside, and it has no shared memory to order.
PDL_PASS_CONFIGS = {"tl.disable_safe_memory_legalize": True, "tl.disable_thread_storage_sync": True}
_SUM_THREADS = 128
_SUM_SLOTS = 8  # whose loads are in flight together, since the kernel is bound by memory latency


def sum_slots(out_dtype: str, partial_dtype: str = "float32", uses_pdl: bool = False):
    """Return the prim_func (partial, positions, out): out[t, h] = sum over slots s of partial[t, s, h].

    | parameter | shape | dtype |
    | --- | --- | --- |
    | partial | (tokens, top_k, H / 32, 32) | `partial_dtype` |
    | positions | (tokens, top_k), as `moe_sort` writes it | int32 |
    | out | (tokens, H / 32, 32) | `out_dtype` |

    Slots are added in order, in float32, so the result is the same each time. Slots without a row are left out, whatever
    partial holds there. With `uses_pdl`, on CUDA, the kernel starts before the kernel launched before it has ended, and waits
    for that end.
    """
    tokens, top_k, groups = T.dynamic("tokens"), T.dynamic("top_k"), T.dynamic("groups")
    columns = 4 if partial_dtype == "float32" else 8  # of a thread: loads of 16 bytes
    shape, per_group = (_SUM_THREADS, columns), MX_GROUP // columns
    each_slot = range(_SUM_SLOTS)  # written here, since tilelang 0.1.14 takes a call of range in a kernel for a loop of it

    @T.macro
    def load(partial, slot_f, token, slot, row, first, groups):
        """Load zeros where there is no row: adding them does not change the bits of a sum that started from 0."""
        for i, v in T.Parallel(*shape):
            group, column = first + i // per_group, i % per_group * columns + v
            inside = (row >= 0) & (group < groups)
            slot_f[i, v] = T.if_then_else(inside, partial[token, slot, group, column], T.cast(0, partial_dtype))

    @T.macro
    def add(total_f, slot_f):
        for i, v in T.Parallel(*shape):
            total_f[i, v] += T.cast(slot_f[i, v], "float32")

    def load_and_add(partial, slots_f, total_f, token, first_slot, rows, first, groups):
        """Emit all loads, then all additions. This is no macro, in which a Python loop would become a loop of the kernel."""
        for s, slot_f in enumerate(slots_f):
            load(partial, slot_f, token, first_slot + s, rows[s], first, groups)
        for slot_f in slots_f:
            add(total_f, slot_f)

    @T.prim_func
    def sum_slots(
        partial: T.Tensor((tokens, top_k, groups, MX_GROUP), partial_dtype),
        positions: T.Tensor((tokens, top_k), "int32"),
        out: T.Tensor((tokens, groups, MX_GROUP), out_dtype),
    ):
        # Tokens are the first axis of the grid, since CUDA allows at most 65535 blocks along the others.
        with T.Kernel(tokens, T.ceildiv(groups * per_group, _SUM_THREADS), threads=_SUM_THREADS) as (token, bx):
            slots_f = [T.alloc_fragment(shape, partial_dtype) for _ in each_slot]
            total_f, out_f = T.alloc_fragment(shape, "float32"), T.alloc_fragment(shape, out_dtype)
            if uses_pdl:
                T.pdl_sync()
            rows = T.alloc_local((_SUM_SLOTS,), "int32")
            # A variable, since nvcc 13.0 splits the 16-byte store into four when the address has the expression itself.
            first = T.alloc_var("int32", bx * (_SUM_THREADS // per_group))
            T.clear(total_f)
            for step in T.serial(T.ceildiv(top_k, _SUM_SLOTS)):
                for s in T.unroll(_SUM_SLOTS):
                    rows[s] = -1
                    if step * _SUM_SLOTS + s < top_k:
                        rows[s] = positions[token, step * _SUM_SLOTS + s]
                load_and_add(partial, slots_f, total_f, token, step * _SUM_SLOTS, rows, first, groups)
            for i, v in T.Parallel(*shape):
                out_f[i, v] = T.cast(total_f[i, v], out_dtype)
            for i, v in T.Parallel(*shape):
                group, column = first + i // per_group, i % per_group * columns + v
                if group < groups:
                    out[token, group, column] = out_f[i, v]

    return sum_slots

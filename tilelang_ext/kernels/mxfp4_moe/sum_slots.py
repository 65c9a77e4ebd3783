"""The sum over a token's slots, after GEMMs that store every slot by itself: the same result each time."""

from tilelang_ext import language as T
from tilelang_ext.formats import MX_GROUP

_SUM_THREADS, _SUM_SLOTS = 128, 8  # the kernel waits for memory: slots whose loads are in flight together


def sum_slots(out_dtype: str, partial_dtype: str = "float32", overlaps: bool = False):
    """The prim_func after a `reduce`: (partial, positions, out), out[t, h] = sum over slots of partial[t, s, h].

    partial (tokens, top_k, H / 32, 32) of `partial_dtype`; positions of `moe_sort`: slots without a row are left out, whatever
    partial holds there; out (tokens, H / 32, 32). Slots are added in order, in float32, so the result is the same each time.
    On CUDA, a launch that `overlaps` begins before the launch before it has ended, and waits for that end.
    """
    tokens, top_k, groups = T.dynamic("tokens"), T.dynamic("top_k"), T.dynamic("groups")
    columns = 4 if partial_dtype == "float32" else 8  # of a thread: 16 bytes
    shape, per_group = (_SUM_THREADS, columns), MX_GROUP // columns
    each_slot = range(_SUM_SLOTS)  # not within the kernel, where tilelang 0.1.14 takes it for a loop of the kernel

    @T.macro
    def load(partial, slot_f, token, slot, row, first, groups):
        """Zeros where there is no row, which leave the bits of a sum that began with 0."""
        for i, v in T.Parallel(*shape):
            group, column = first + i // per_group, i % per_group * columns + v
            inside = (row >= 0) & (group < groups)
            slot_f[i, v] = T.if_then_else(inside, partial[token, slot, group, column], T.cast(0, partial_dtype))

    @T.macro
    def add(total_f, slot_f):
        for i, v in T.Parallel(*shape):
            total_f[i, v] += T.cast(slot_f[i, v], "float32")

    def load_and_add(partial, slots_f, total_f, token, first_slot, rows, first, groups):
        """All loads, then all sums; no macro, where a loop of Python's is one of the kernel."""
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
        # Tokens come first: CUDA has 65535 blocks at most along the others.
        with T.Kernel(tokens, T.ceildiv(groups * per_group, _SUM_THREADS), threads=_SUM_THREADS) as (token, bx):
            slots_f = [T.alloc_fragment(shape, partial_dtype) for _ in each_slot]
            total_f, out_f = T.alloc_fragment(shape, "float32"), T.alloc_fragment(shape, out_dtype)
            if overlaps:
                T.pdl_sync()
            rows = T.alloc_local((_SUM_SLOTS,), "int32")
            # A variable: of the same expression in an address, nvcc 13.0 makes four stores of one.
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

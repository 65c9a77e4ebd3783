"""Tiles, loops, memory, reductions and atomics: each row of the table fills a tile of the output."""

import numpy as np
from language.table import macros
from language.table.macros import SIZE
from language.table.rows import Recorder, Row

from tilelang_ext import language

THREADS = 64


def inputs(seed: int = 2) -> dict[str, np.ndarray]:
    """A and B: small integers, exact in half."""
    random = np.random.default_rng(seed)
    return {name: random.integers(-8, 9, (SIZE, SIZE)).astype(np.float16) for name in "AB"}


def _not_on_c(name: str) -> dict[str, str]:
    return {"c": rf"T\.{name}: .+; got it on target c; .+"}


def _row(name, build, want, **more) -> Row:
    """A row that is a macro: `build(T)` returns it, with the parameters A, B and the tile C of the output."""
    return Row(name, build, want, **more)


def _assume(hint, A):
    language.evaluate(hint(A[0, 0] < language.float16(100)))


def _assume_true(hint, A):
    hint(A[0, 0] < language.float16(100))


def _barrier(hint, A):
    language.evaluate(hint("shared"))


def _ones(A, B):
    return np.ones_like(A)


def _twos(A, B):
    return np.full_like(A, 2)


def _row_sums(A, B):
    return np.broadcast_to(A.sum(1)[:, None], A.shape)


def _sum(A, B):
    return A + B


ROWS = [
    _row("copy", macros.through(lambda T: T.alloc_fragment((SIZE, SIZE), "float16")), lambda A, B: A),
    _row("alloc_fragment", macros.through(lambda T: T.alloc_fragment((SIZE, SIZE), "float32")), lambda A, B: A),
    _row("alloc_shared", macros.through(lambda T: T.alloc_shared((SIZE, SIZE), "float16")), lambda A, B: A),
    _row("alloc_local", macros.local, lambda A, B: A + 3),
    _row("alloc_var", macros.var, lambda A, B: A + 9),
    _row("async_copy", macros.async_copy, lambda A, B: A),
    _row("fill", macros.fill, lambda A, B: np.full_like(A, 2.5)),
    _row("transpose", macros.transpose, lambda A, B: A.T),
    _row("reshape", macros.view("reshape"), lambda A, B: A.T),
    _row("view", macros.view("view"), lambda A, B: A.T),
    *(_row(name, macros.whole(name), _sum) for name in ("grid",)),
    *(_row(name, macros.loop(name), _sum) for name in ("serial", "Serial", "unroll", "Unroll")),
    _row("Parallel", macros.coordinates, lambda A, B: A.T),
    _row("Pipelined", macros.pipelined, lambda A, B: np.broadcast_to(A.sum(0), A.shape)),
    _row("loop_break", macros.leave, lambda A, B: A + 3),
    *(_row(f"reduce_{name}", macros.reduction(f"reduce_{name}"), lambda A, B, f=f: np.broadcast_to(f(A)[:, None], A.shape))
      for name, f in (("sum", lambda A: A.sum(1)), ("max", lambda A: A.max(1)), ("min", lambda A: A.min(1)),
                      ("abssum", lambda A: abs(A).sum(1)), ("absmax", lambda A: abs(A).max(1)))),
    *(_row(f"reduce_bit{name}", macros.reduction(f"reduce_bit{name}", "int32"),
           lambda A, B, f=f: np.broadcast_to(f.reduce(A.astype(np.int32), 1)[:, None], A.shape))
      for name, f in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor))),
    _row("reduce", macros.reduction("reduce", reduce_type="sum", clear=True), _row_sums),
    _row("cumsum", macros.scan("cumsum"), lambda A, B: A.cumsum(1)),
    _row("cummax", macros.scan("cummax"), lambda A, B: np.maximum.accumulate(A, 1)),
    _row("atomic_add", macros.atomic("atomic_add"), _sum),
    _row("atomic_max", macros.atomic("atomic_max"), lambda A, B: np.maximum(A, B)),
    _row("atomic_min", macros.atomic("atomic_min"), lambda A, B: np.minimum(A, B)),
    *(_row(name, macros.reducer, _row_sums, refused=_not_on_c("reducer_init"))
      for name in ("alloc_reducer", "reducer_init", "reducer_update", "finalize_reducer")),
    _row("Persistent", macros.persistent, lambda A, B: A),
    *(_row(name, macros.vector(name), _sum) for name in ("vectorized", "Vectorized")),
    _row("atomic_addx2", macros.pair("atomic_addx2", 2), _sum),
    _row("atomic_addx4", macros.pair("atomic_addx4", 4), _sum),
    _row("atomic_store", macros.atomic_store, lambda A, B: A),
    _row("atomic_load", macros.atomic_load, lambda A, B: A),
    _row("atomic_or", macros.atomic_or, lambda A, B: A.astype(np.int32) | B.astype(np.int32)),
    _row("index_to_coordinates", macros.coordinates, lambda A, B: A.T),
    _row("continue_loop", macros.skip, lambda A, B: A + 4),
    _row("break_loop", macros.break_loop, lambda A, B: A + 3),
    _row("annotate_layout", macros.layout, lambda A, B: A),
    _row("annotate_safe_value", macros.safe_value, lambda A, B: np.concatenate([A[16:], np.full_like(A[16:], 7)])),
    _row("alloc_global", macros.scratch, lambda A, B: A),
    _row("__ldg", macros.ldg, lambda A, B: A),
    _row("assume", macros.hint("assume", _assume), lambda A, B: A),
    _row("access_ptr", macros.pointer("access_ptr"), _sum),
    _row("address_of", macros.pointer("address_of"), _sum, refused=_not_on_c("address_of")),
    _row("tvm_access_ptr", macros.pointer("tvm_access_ptr"), _sum, refused=_not_on_c("tvm_access_ptr")),
    _row("make_tensor_from_addr", macros.at_address, lambda A, B: A),
    _row("handle_add_byte_offset", macros.past_address, lambda A, B: np.concatenate([A[1:], B[:1]])),
    _row("device_assert", macros.hint("device_assert", _assume_true), lambda A, B: A, refused=_not_on_c("device_assert")),
    _row("print", macros.printed, lambda A, B: A, refused=_not_on_c("print")),
    _row("import_source", macros.hint("import_source", lambda hint, A: hint("// imported")), lambda A, B: A),
    _row("dp4a", macros.dot_of_four, lambda A, B: (A[0, :4] * B[0, :4]).sum() + np.zeros_like(A), refused=_not_on_c("dp4a")),
    _row("ptx_cp_async", macros.asynchronous, lambda A, B: A,
         refused={name: rf"T\.ptx_cp_async: must be an operator that target {target} has; got a call of it; .+"
                  for name, target in (("apple", "metal"), ("c", "c"))}),
    _row("tvm_thread_allreduce", macros.all_reduced, lambda A, B: np.full_like(A, 2 * A[0].sum()),
         refused={"hip": r"T\.tvm_thread_allreduce: .+; got it on target hip; .+", **_not_on_c("tvm_thread_allreduce")}),
    _row("any_of", macros.test("any_of"), refused=_not_on_c("any_of"), want=_ones),
    _row("all_of", macros.test("all_of"), refused=_not_on_c("all_of"), want=_twos),
    *(_row(name, macros.hint(name, lambda hint, A: hint()), lambda A, B: A)
      for name in ("no_set_max_nreg", "annotate_producer_reg_dealloc", "annotate_consumer_reg_alloc",
                   "disable_warp_group_reg_alloc", "sync_threads")),
    _row("ptx_commit_group", macros.hint("ptx_commit_group", lambda hint, A: language.evaluate(hint())), lambda A, B: A),
    _row("ptx_wait_group", macros.async_copy, lambda A, B: A),
    _row("tvm_storage_sync", macros.hint("tvm_storage_sync", _barrier), lambda A, B: A),
    *(_row(name, macros.hint(name, lambda hint, A: hint(24)), lambda A, B: A) for name in ("inc_max_nreg", "dec_max_nreg")),
    _row("set_max_nreg", macros.hint("set_max_nreg", lambda hint, A: hint(24, 1)), lambda A, B: A),
    _row("sync_warp", macros.hint("sync_warp", lambda hint, A: hint()), lambda A, B: A, refused=_not_on_c("sync_warp")),
    _row("annotate_min_blocks_per_sm", macros.hint("annotate_min_blocks_per_sm", lambda hint, A: hint(2)), lambda A, B: A),
    _row("annotate_l2_hit_ratio", macros.hint("annotate_l2_hit_ratio", lambda hint, A: hint({A: 0.5})), lambda A, B: A),
    _row("use_swizzle", macros.hint("use_swizzle", lambda hint, A: hint(2)), lambda A, B: A),
    _row("get_block_extent", macros.extent("get_block_extent", 0), lambda A, B: np.full_like(A, 1)),
    _row("get_block_extents", macros.extent("get_block_extents"), lambda A, B: np.full_like(A, 1)),
    _row("get_block_binding", macros.extent("get_block_binding"), lambda A, B: np.full_like(A, 0)),
    _row("get_block_bindings", macros.extent("get_block_bindings"), lambda A, B: np.full_like(A, 0)),
    _row("get_thread_extent", macros.extent("get_thread_extent", 0), lambda A, B: np.full_like(A, THREADS)),
    _row("get_thread_extents", macros.extent("get_thread_extents"), lambda A, B: np.full_like(A, THREADS)),
]  # fmt: skip

# Multiplied by each chip's own instructions: a kernel apart. Threads end in the last row.
GEMMS = [
    *(_row(name, macros.gemm, lambda A, B: A @ B) for name in ("clear", "gemm")),
    _row("mma_gemm_blockscaled", macros.blockscaled, lambda A, B: A @ B * np.exp2(np.arange(SIZE) % 3 - 1)[:, None]),
    _row("thread_return", macros.early_return, lambda A, B: A,
         refused={"apple": r"T\.thread_return: must be an operator that target metal has; got a call of it; .+",
                  "c": r"target c: blocks have one thread; got thread index \w+ in T\.Kernel's body .+"}),
]  # fmt: skip


def kernel(rows, T=None):
    """C[k], which holds B before, is what row k computes."""
    T = T or Recorder()
    count = len(rows)

    def emit(A, B, C):
        for k, line in enumerate(rows):
            line.emit(T)(A, B, C, k)

    @language.prim_func
    def statements(
        A: language.Tensor((SIZE, SIZE), "float16"), B: language.Tensor((SIZE, SIZE), "float16"),
        C: language.Tensor((count, SIZE, SIZE), "float32"),
    ):  # fmt: skip
        with language.Kernel(1, threads=THREADS):
            emit(A, B, C)

    return statements

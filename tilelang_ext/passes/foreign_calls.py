"""Calls of instructions that a target does not have, refused by the name that they have in the language.

One table says for each instruction why, and what to write instead; the first pass of targets metal, hip and c looks for them in
the tile program, so that the error is the only thing that happens. What a code generator does not know although the table does
not name it is refused in the same form (`naming_unknown`), when the text is generated.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from tvm import IRModule, tirx
from tvm.error import InternalError
from tvm.ir import Op
from tvm.target import Target
from tvm.tirx.stmt_functor import post_order_visit

from tilelang_ext.passes.block_scaled_gemm import product_of

# What upstream's generators say of operators and types that they lack.
_UNTYPED = re.compile(r"(?:Cannot convert type|Unsupported FP8 type in HIP codegen:) (\S+)")
_UNCONVERTED = {
    "hip": {
        "custom[float4_e2m1_unpacked]", "float4_e2m1fn", "float8_e3m4", "float8_e4m3b11fnuz", "float8_e8m0fnu", "int4", "uint4",
    }
}  # fmt: skip
_UNRESOLVED = re.compile(r'Unresolved call ir\.Op\(.*?name="\w+?\.([\w.]+)"')


@dataclass(frozen=True)
class _Foreign:
    """Instructions by the last part of their operators' names, what they are, and what to do instead."""

    operators: str
    what: str
    instead: str
    only: str = ""  # the target that lacks them; none for all


_GEMM = "use T.gemm"
_HOST = "a call of the host's run time, which a kernel cannot make"
_TABLE = (
    _Foreign(
        "deallocate_tmem initialize_tcgen05_descriptor ptx_deallocate_tensor_memory ptx_init_tensor_memory "
        "ptx_tcgen05_cp_warpx4 ptx_tcgen05_mma_blockscaled_ss ptx_tcgen05_mma_ss ptx_tcgen05_mma_ts "
        "ptx_tcgen05_sf_warp_transpose tcgen05_after_thread_sync tcgen05_before_thread_sync tcgen05_gemm "
        "tcgen05_gemm_blockscaled tcgen05_gemm_sp tcgen05_ld tcgen05_mma_arrive tcgen05_st",
        "tensor memory and its instructions belong to NVIDIA's Blackwell", "use T.gemm on shared tiles and a fragment",
    ),
    _Foreign(
        "increase_descriptor_offset initialize_wgmma_descriptor ptx_wgmma_rs ptx_wgmma_sp_rs ptx_wgmma_sp_ss ptx_wgmma_ss "
        "wait_wgmma warpgroup_arrive warpgroup_commit_batch warpgroup_fence_operand warpgroup_wait wgmma_gemm wgmma_gemm_sp",
        "WGMMA belongs to NVIDIA's Hopper", "use T.gemm, which waits by itself",
    ),
    _Foreign(
        "mma_fill mma_store ptx_ldmatrix ptx_mma ptx_mma_block_scale ptx_mma_sm70 ptx_mma_sp ptx_stmatrix tvm_bmma_sync "
        "tvm_fill_fragment tvm_load_matrix_sync tvm_mma_sync tvm_store_matrix_sync",
        "an instruction of NVIDIA's tensor cores", _GEMM,
    ),
    _Foreign("gemm_sp", "sparse tensor cores belong to NVIDIA GPUs", "use T.gemm on the dense matrix"),
    _Foreign(
        "create_tma_descriptor create_tma_im2col_descriptor fence_proxy_async "
        "prefetch_tma_descriptor ptx_cp_async_bulk tma_copy "
        "tma_load tma_load_gather4 tma_load_im2col tma_load_multicast tma_store tma_store_arrive tma_store_cluster "
        "tma_store_scatter4 tma_store_wait",
        "TMA belongs to NVIDIA's Hopper", "use T.copy",
    ),
    _Foreign("c2d_im2col im2col", "im2col is a mode of NVIDIA's TMA", "gather the elements in T.Parallel"),
    _Foreign(
        "create_barriers mbarrier_expect_tx mbarrier_wait_parity ptx_arrive_barrier ptx_arrive_barrier_expect_tx "
        "ptx_cp_async_barrier ptx_cp_async_barrier_noinc ptx_fence_barrier_init ptx_init_barrier_thread_count ptx_wait_barrier",
        "barriers in shared memory belong to NVIDIA GPUs", "use T.sync_threads, or T.Pipelined, which places barriers itself",
    ),
    _Foreign("named_barrier_arrive", "named barriers belong to NVIDIA GPUs", "use T.sync_threads"),
    _Foreign(
        "block_rank_in_cluster clc_get_first_ctaid_x clc_get_first_ctaid_y "
        "clc_get_first_ctaid_z clc_is_canceled clc_try_cancel "
        "clc_try_cancel_multicast cluster_arrive cluster_arrive_relaxed cluster_sync cluster_wait ptx_arrive_cluster_barrier "
        "ptx_cluster_store",
        "clusters of blocks belong to NVIDIA's Hopper", "let each block work on its own",
    ),
    _Foreign("pdl_sync pdl_trigger", "dependent launches belong to NVIDIA's Hopper", "leave it out: launches are in order"),
    _Foreign("rng_init rng_rand rng_rand_float", "random numbers come from NVIDIA's cuRAND", "pass them in a tensor"),
    _Foreign(
        "ldg32 ldg64 ldg128 ldg256 stg32 stg64 stg128 stg256 lds32 lds64 lds128 sts32 sts64 sts128",
        "a load or store of PTX", "read and write the buffer, in T.vectorized where it matters",
    ),
    _Foreign("sync_grid", "blocks of a launch cannot wait for each other here", "launch two kernels"),
    _Foreign(
        "dma_copy dma_end_group dma_start_group dma_wait end_profile_intrinsic start_profile_intrinsic texture2d_load "
        "texture2d_store",
        "an instruction of Qualcomm's processors", "leave it out, or use T.copy",
    ),
    _Foreign(
        "call_llvm_intrin call_llvm_pure_intrin", "an instruction of LLVM, which this target is not generated by",
        "use T.call_extern",
    ),
    _Foreign("get_active_lane_mask vscale", "vectors here have a fixed length", "use T.vectorized"),
    _Foreign(
        "TVMBackendAllocWorkspace TVMBackendAnyListMoveFromPackedReturn TVMBackendAnyListSetPackedArg TVMBackendFreeWorkspace "
        "anylist_getitem anylist_resetitem anylist_setitem_call_cpacked "
        "anylist_setitem_call_packed lookup_param tvm_call_cpacked "
        "tvm_call_cpacked_lowered tvm_call_packed tvm_call_packed_lowered tvm_call_trace_packed tvm_stack_alloca "
        "tvm_stack_make_array tvm_stack_make_shape tvm_struct_get tvm_struct_set tvm_throw_last_error",
        _HOST, "call it before or after the launch",
    ),
    _Foreign(
        "activemask all_sync any_sync ballot ballot_sync get_lane_idx get_warp_group_idx get_warp_idx get_warp_idx_sync "
        "match_all_sync match_any_sync shfl_down_sync shfl_sync shfl_up_sync shfl_xor_sync sync_warp syncthreads_and "
        "syncthreads_count syncthreads_or tl_shuffle_elect tvm_warp_activemask tvm_warp_shuffle tvm_warp_shuffle_down "
        "tvm_warp_shuffle_up warp_reduce_bitand warp_reduce_bitor warp_reduce_max warp_reduce_min warp_reduce_sum",
        "a block has one thread here, and no warps", "use tile operators and T.Parallel", "c",
    ),
    _Foreign("all_of any_of", "reductions of conditions need threads", "use T.reduce_max or T.reduce_min of a bool", "c"),
    _Foreign(
        "finalize_reducer finalize_reducer_v2 reducer_init reducer_update", "target c has no reducers",
        "use T.reduce_sum, or add in a T.serial loop", "c",
    ),
    _Foreign(
        "device_assert device_assert_with_msg", "nothing is checked while a kernel runs here",
        "check the tensors before the call", "c",
    ),
    _Foreign(
        "address_of tvm_access_ptr", "target c takes the operand of an atomic by its element", "use T.access_ptr",
        "atomics of c",
    ),
    _Foreign(
        "tvm_thread_allreduce", "upstream's text of it for HIP meets at a barrier of a wave inside of a branch",
        "use T.reduce_sum and its like, or T.warp_reduce_sum", "hip",
    ),
    _Foreign("tvm_thread_allreduce", "a block has one thread here", "use T.reduce_sum and its like", "c"),
    _Foreign("match_all_sync match_any_sync", "HIP has no match across lanes", "compare with T.shfl_sync in a loop", "hip"),
)  # fmt: skip
_BY_OPERATOR = {operator: foreign for foreign in _TABLE if not foreign.only for operator in foreign.operators.split()}
_BY_TARGET = {(foreign.only, operator): foreign for foreign in _TABLE if foreign.only for operator in foreign.operators.split()}
# Operators whose names in the language differ: all of those that a user may have written.
_WRITTEN = {
    "device_assert_with_msg": "device_assert",
    "ptx_arrive_barrier": "mbarrier_arrive, T.barrier_arrive or T.ptx_arrive_barrier",
    "ptx_arrive_barrier_expect_tx": "mbarrier_arrive_expect_tx or T.ptx_arrive_barrier_expect_tx",
    "mbarrier_wait_parity": "mbarrier_wait_parity or T.barrier_wait",
    "ptx_cp_async_barrier_noinc": "cp_async_barrier_noinc",
    "im2col": "im2col or T.c2d_im2col",
    "ptx_tcgen05_cp_warpx4": "tcgen05_cp_warpx4",
    "ptx_tcgen05_sf_warp_transpose": "tcgen05_sf_warp_transpose",
    **{f"shfl_{way}_sync": f"shfl_{way}" for way in ("down", "up", "xor")},
    "tl_shuffle_elect": "shuffle_elect",
    "tcgen05_gemm": "tcgen05_gemm or T.tcgen05_mma",
    "tcgen05_gemm_blockscaled": "tcgen05_gemm_blockscaled or T.tcgen05_mma_blockscaled",
    "wgmma_gemm": "wgmma_gemm or T.wgmma_mma",
    "tma_load": "tma_load or T.tma_load_2sm",
    "tvm_call_packed": "call_packed or T.tvm_call_packed",
    "tvm_call_cpacked": "call_cpacked or T.tvm_call_cpacked",
    "tvm_call_packed_lowered": "call_packed_lowered or T.tvm_call_packed_lowered",
    "tvm_call_cpacked_lowered": "call_cpacked_lowered or T.tvm_call_cpacked_lowered",
}
# Memory that a target does not have, by scope.
_SCOPES = {
    "shared.barrier": ("alloc_barrier", _BY_OPERATOR["create_barriers"]),
    "shared.cluster_barrier": ("alloc_cluster_barrier", _BY_OPERATOR["cluster_sync"]),
    "shared.tmem": ("alloc_tmem", _BY_OPERATOR["tcgen05_gemm"]),
    "local.descriptor.wgmma": ("alloc_wgmma_desc or T.alloc_descriptor", _BY_OPERATOR["wgmma_gemm"]),
    "local.descriptor.tcgen05_smem": ("alloc_tcgen05_smem_desc", _BY_OPERATOR["tcgen05_gemm"]),
    "local.descriptor.tcgen05_instr": (
        "alloc_tcgen05_instr_desc or T.alloc_tcgen05_instruction_desc",
        _BY_OPERATOR["tcgen05_gemm"],
    ),
}
# Functions that a target's run time does not have, by the names that calls of them have in TIR.
_PRINT = _Foreign("", "a kernel cannot print here", "write the value to a tensor")
_FUNCTIONS = {
    ("c", "DP4A"): ("dp4a", _Foreign("", "an instruction of GPUs", "add the four products in a T.serial loop")),
    **{("c", f"debug_print_{what}"): ("print", _PRINT) for what in ("var", "msg", "buffer_value")},
}
# Copies that ask for more than a copy, by annotations: what they would do otherwise is another thing.
_COPIES = {
    "dst_block": ("copy_cluster", _BY_OPERATOR["cluster_sync"]),
    "cluster_mask": ("copy_cluster", _BY_OPERATOR["cluster_sync"]),
    "is_scatter4": ("tma_scatter4", _BY_OPERATOR["tma_copy"]),
    "gather4_rows": ("tma_gather4", _BY_OPERATOR["tma_copy"]),
}

# Vector atomics that return what was there: all on metal and c, and of 16-bit floats on hip.
_PREVIOUS = {
    f"atomic_addx{count}_ret_elem_op": (
        f"atomic_addx{count}",
        _Foreign("", "return_prev needs an atomic on all elements at once", f"call T.atomic_add {count} times"),
    )
    for count in (2, 4)
}
_HALVES = ("float16", "bfloat16")


def refuse_foreign(mod: IRModule, target: str) -> IRModule:
    """Return `mod`; NotImplementedError for the first instruction in it that `target` does not have."""
    for func in mod.functions.values():
        if isinstance(func, tirx.PrimFunc):
            _refuse(func, target)
    return mod


def _refuse(func: tirx.PrimFunc, target: str) -> None:
    found: list[tuple[str, _Foreign]] = []
    allocated: list[tuple[str, _Foreign]] = []
    buffers: list[tirx.Buffer] = []

    def visit(node):
        if isinstance(node, tirx.Call) and isinstance(node.op, Op):
            operator = node.op.name.rsplit(".", 1)[-1]
            foreign = _BY_OPERATOR.get(operator) or _BY_TARGET.get((target, operator))
            if foreign:
                found.append((_WRITTEN.get(operator, operator), foreign))
            elif operator in ("call_extern", "call_pure_extern"):
                found.extend(_function(node, target))
            elif previous := _PREVIOUS.get(operator):
                if target != "hip" or _element(node.dtype) in _HALVES:
                    found.append(previous)
            elif operator.startswith("atomic_") and node.args and isinstance(node.args[0], tirx.Call):
                pointer = node.args[0].op.name.rsplit(".", 1)[-1] if isinstance(node.args[0].op, Op) else ""
                if foreign := _BY_TARGET.get((f"atomics of {target}", pointer)):
                    found.append((pointer, foreign))
            elif operator == "gemm" and "sf_a_granularity_k" in node.annotations and product_of(node) is None:  # of 0.1.14
                found.append((_WRITTEN["tcgen05_gemm_blockscaled"], _BY_OPERATOR["tcgen05_gemm_blockscaled"]))
            elif operator in ("copy", "async_copy"):
                found.extend(copy for annotation, copy in _COPIES.items() if annotation in node.annotations)
        elif isinstance(node, tirx.SBlock):
            buffers.extend(node.alloc_buffers)
            allocated.extend(_SCOPES[buffer.scope()] for buffer in node.alloc_buffers if buffer.scope() in _SCOPES)

    post_order_visit(func.body, visit)
    _refuse_types([*func.buffer_map.values(), *buffers], target)
    for name, foreign in [*found, *allocated][:1]:
        raise NotImplementedError(f"T.{name}: {foreign.what}; got it on target {target}; {foreign.instead}")


def _refuse_types(buffers: list[tirx.Buffer], target: str) -> None:
    """Refuse tensors and tiles of codes that share bytes, which upstream's passes for HIP take for bytes."""
    for buffer in buffers:
        if target == "hip" and _element(buffer.dtype) == "float4_e2m1fn":
            raise TypeError(_no_type(_element(buffer.dtype), target))


def _element(dtype) -> str:
    return str(dtype).split("x")[0]


def _function(call: tirx.Call, target: str) -> list[tuple[str, _Foreign]]:
    name = getattr(call.args[0], "value", "")
    return [_FUNCTIONS[target, name]] if (target, name) in _FUNCTIONS else []


def naming_unknown(build: Callable, target: str) -> Callable:
    """Return `build`, a code generator's entry, with its errors about operators and types that it lacks put into one line."""

    def checked(mod: IRModule, given: Target):
        _refuse_conversions(mod, target)
        try:
            return build(mod, given)
        except InternalError as error:
            operator, dtype = _UNRESOLVED.search(str(error)), _UNTYPED.search(str(error))
            if operator is None and dtype is None:
                raise
        if operator:
            raise NotImplementedError(
                f"T.{_WRITTEN.get(operator[1], operator[1])}: must be an operator that target {target} has; got a call of it; "
                "docs/guide/language_support.md lists those that it has"
            )
        raise TypeError(_no_type(dtype[1], target))

    return checked


def _no_type(dtype: str, target: str) -> str:
    name = re.sub(r"^custom\[(.*)\]", r"\1", dtype)
    return f"dtype: target {target} has no type for it; got {name}; use float32, or an integer of 8 bits for its codes"


def _refuse_conversions(mod: IRModule, target: str) -> None:
    """Refuse what the generator prints as a conversion that no header defines."""
    found: list[str] = []

    def visit(node):
        if isinstance(node, tirx.Cast):
            found.extend(str(d) for d in (node.dtype, node.value.dtype) if re.sub(r"x\d+$", "", str(d)) in _UNCONVERTED[target])

    if target in _UNCONVERTED:
        for func in mod.functions.values():
            if isinstance(func, tirx.PrimFunc):
                post_order_visit(func.body, visit)
    if found:
        raise TypeError(_no_type(found[0], target))

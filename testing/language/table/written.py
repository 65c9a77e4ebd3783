"""Names that act while the program is written, or that are upstream's own: what each group is, and its names.

No target sees them: they are Python types, builders of TVM's script, helpers that compute numbers, and what NVIDIA's own
programs are made of.
"""

import types

import tvm_ffi
from tilelang import language as upstream

from tilelang_ext import language

_GROUPS = {
    "a Python type, for annotations and isinstance": (
        "Any AnyDType Buffer BufferLoad Call CallEffectKind CommReducer FragmentBuffer IterVar JITFunc KernelLaunchFrame "
        "LocalBuffer PrimExpr PrimFunc ProducerLoad Ptr Range Reduce Ref SharedBuffer SizeVar StringImm Var annotations dtype"
    ),
    "a decorator or declaration of a program": (
        "macro prim_func inline meta_class const dynamic symbolic "
        "empty ptr StridedTensor Tensor GemmWarpPolicy Layout Fragment "
        "PartialFragment BlockScaledLayout annotate_compile_flags annotate_pass_configs annotate_restrict_buffers "
        "BaseTileScheduler PersistentTileScheduler"
    ),
    "a builder of TVM's script": (
        "Assert Else If Let Then While alloc_buffer allocate arg attr axis bind block_name_suffix_context boolean buffer "
        "buffer_decl buffer_store buffer_var call_kernel comm_reducer "
        "decl_buffer env_thread evaluate func_attr func_name func_ret "
        "handle index_map init iter_var launch_thread let "
        "llvm_lookup_intrinsic_id match_buffer meta_var parallel reads ret sblock "
        "sblock_alloc_buffer sblock_attr target thread_binding type_annotation undef var void where writes "
        "tvm_tuple tvm_thread_invariant ignore_loop_partition isnullptr"
    ),
    "the dtype of a vector": "bfloat16x4 bfloat16x8 bfloat16x16 bfloat16x32 bfloat16x64",
    "a question about the program that is being written": (
        "get_cluster_dims get_cluster_extent get_cluster_extents get_cluster_id get_cluster_ids get_cluster_size get_let_value "
        "has_let_value get_tvm_dtype is_f8f6f4_family is_float4 is_float4_e2m1_unpacked is_float4_e2m1fn "
        "validate_gemm_ab_dtypes tma_gather4_bytes"
    ),
    "part of NVIDIA's instructions": (
        "CUDASourceCodeKernel ClusterKernel "
        "SparseTensorCoreIntrinEmitter TCGEN05DescriptorParams TCGEN05TensorCoreIntrinEmitter "
        "TensorCoreIntrinEmitter TensorCoreIntrinEmitterSM120 TensorCoreIntrinEmitterWithLadderTransform WGMMADescriptorParams "
        "WGMMATensorCoreIntrinEmitter WGSparseTensorCoreIntrinEmitter compute_gmma_descriptor compute_umma_descriptor "
        "get_ldmatrix_offset get_mma_micro_size get_swizzle_layout make_blockscaled_gemm_layout make_mma_swizzle_layout "
        "mma_store_index_map call_llvm_intrin call_llvm_pure_intrin"
    ),
    "NVIDIA's warp specialisation": (
        "WSID WSInstr WSOpRef WSPipeline WSRole WSSchedule WSScope WSSync WSSyncKind WarpSpecialize WarpSpecializeFrame "
        "annotate_ws_pipeline_depth annotate_ws_schedule ws ws_op ws_schedule sync_global"
    ),
}  # fmt: skip


def names() -> dict[str, str]:
    """Return what each name is; modules and dtypes are found by what they are."""
    found = {name: what for what, group in _GROUPS.items() for name in group.split()}
    for module in (upstream, language):
        for name in dir(module):
            value = getattr(module, name)
            if name.startswith("_"):
                continue
            if isinstance(value, types.ModuleType):
                found.setdefault(name, "a module of the package")
            elif isinstance(value, tvm_ffi.dtype) and value.lanes > 1:
                found.setdefault(name, "the dtype of a vector")
    return found

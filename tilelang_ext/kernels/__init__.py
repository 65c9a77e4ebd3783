"""Whole kernels behind torch functions: one package per operator, each with the same file names.

`operator` is the torch entry, `arguments` the checks, `problem` what a kernel is compiled for; the other files are kernels.
"""

# Public names, and the modules that they are loaded from on first use.
PUBLIC = {
    "Activation": "tilelang_ext.kernels.mxfp4_moe.activation",
    "HopperWeights": "tilelang_ext.kernels.mxfp4_moe.weights",
    "MXFP4Experts": "tilelang_ext.kernels.mxfp4_moe.experts",
    "MXFP4Weights": "tilelang_ext.kernels.mxfp4_moe.weights",
    "ReplayCache": "tilelang_ext.kernels.gated_delta.operator",
    "attention": "tilelang_ext.kernels.attention.operator",
    "attention_decode": "tilelang_ext.kernels.attention.operator",
    "check_topk_ids": "tilelang_ext.kernels.mxfp4_moe.arguments",
    "gated_delta_decode": "tilelang_ext.kernels.gated_delta.operator",
    "gated_delta_prefill": "tilelang_ext.kernels.gated_delta.prefill_operator",
    "gated_delta_replay": "tilelang_ext.kernels.gated_delta.operator",
    "matmul": "tilelang_ext.kernels.matmul.operator",
    "merge_attention": "tilelang_ext.kernels.attention.operator",
    "mxfp4_moe": "tilelang_ext.kernels.mxfp4_moe.operator",
    "prepare_mxfp4_weights": "tilelang_ext.kernels.mxfp4_moe.weights",
    "scaled_mm": "tilelang_ext.kernels.scaled_mm.operator",
    "tile_for_hopper": "tilelang_ext.kernels.mxfp4_moe.weights",
}

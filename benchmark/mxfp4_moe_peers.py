"""Mixtures of experts of other libraries for bench_mxfp4_moe.py, called as vLLM 0.26.0 calls them on Hopper.

Both are given tokens already sorted by expert, and swizzled weights; neither the sort nor the swizzling is timed.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F

ALPHA, LIMIT = 1.702, 7.0  # of gpt-oss's SwiGLU


def make_triton_kernels(case, layer):
    """Two calls of matmul_ogs in bfloat16: the first gathers and applies SwiGLU, the second weights and adds the slots."""
    from triton_kernels.matmul_ogs import FlexCtx, FnSpecs, FusedActivation, PrecisionConfig, matmul_ogs
    from triton_kernels.matmul_ogs_details import opt_flags
    from triton_kernels.numerics import InFlexData
    from triton_kernels.swiglu import swiglu_fn
    from triton_kernels.tensor import FP4, convert_layout, wrap_torch_tensor
    from triton_kernels.tensor_details import layout

    intermediate, experts, top_k = case.model[2:]
    opt_flags.reset_opt_flags_constraints()
    opt_flags.update_opt_flags_constraints({"split_k": 1})
    swiglu = FusedActivation(FnSpecs("swiglu", swiglu_fn, ("alpha", "limit")), (ALPHA, LIMIT), 2)

    def swizzled(codes, scale):
        value_layout, value_options = layout.make_default_matmul_mxfp4_w_layout(mx_axis=1)
        scale_layout, scale_options = layout.make_default_matmul_mxfp4_w_scale_layout(mx_axis=1, num_warps=8)
        scale = F.pad(scale, (0, -scale.shape[-1] % 4))  # its kernel reads four at a time
        codes = convert_layout(wrap_torch_tensor(codes.mT, dtype=FP4), value_layout, **value_options)
        scale = convert_layout(wrap_torch_tensor(scale.mT), scale_layout, **scale_options)
        return codes, PrecisionConfig(weight_scale=scale, flex_ctx=FlexCtx(rhs_data=InFlexData()))

    def interleaved(rows):
        gate, up = rows.chunk(2, 1)
        return torch.stack([gate, up], 2).flatten(1, 2).contiguous()

    w13, precision13 = swizzled(interleaved(layer.w13.codes), interleaved(layer.w13.scale))
    w2, precision2 = swizzled(layer.w2.codes, layer.w2.scale)
    bias13 = interleaved(layer.w13.bias)
    between = layer.w13.codes.new_empty((1, case.tokens * top_k, intermediate), dtype=torch.bfloat16)

    def bind(inputs, out):
        routing, gather, scatter = triton_kernels_routing(inputs.topk_ids, inputs.topk_weights, experts)
        y = out.view(1, *out.shape)

        def call():
            options = {"precision_config": precision13, "fused_activation": swiglu, "y": between}
            matmul_ogs(inputs.x, w13, bias13, routing, gather_indx=gather, **options)
            options = {"precision_config": precision2, "gammas": routing.gate_scal, "y": y}
            matmul_ogs(between.view(-1, intermediate), w2, layer.w2.bias, routing, scatter_indx=scatter, **options)

        return call

    return bind


def triton_kernels_routing(topk_ids, topk_weights, experts: int):
    """Return (RoutingData, GatherIndx, ScatterIndx) for slots sorted by expert; indices count slots."""
    from triton_kernels import routing

    flat = topk_ids.flatten()
    order = flat.argsort(stable=True)
    slot, place = order.int(), order.argsort().int()
    histogram = flat.bincount(minlength=experts).int()
    blocks = routing.compute_expt_data_torch(histogram, experts, flat.numel())
    weights = topk_weights.flatten()[order].contiguous()
    data = routing.RoutingData(weights, histogram, experts, topk_ids.shape[1], blocks)
    return data, routing.GatherIndx(src_indx=slot, dst_indx=place), routing.ScatterIndx(src_indx=place, dst_indx=slot)


# gpt-oss's SwiGLU of gate a and up b, in CUDA C++
HUMMING_SWIGLU = (
    f"fminf(a, {LIMIT}f) / (1.0f + __expf(-{ALPHA}f * fminf(a, {LIMIT}f))) * (fminf(fmaxf(b, -{LIMIT}f), {LIMIT}f) + 1.0f)"
)


def make_humming(case, layer):
    """Two indexed GEMMs, its activation kernel between them, which quantises rows for fp8, and a kernel that adds the slots."""
    from humming.forward import humming_forward, may_process_input
    from humming.schema.humming import HummingInputSchema, HummingWeightSchema
    from humming.transform import prepare_layer_config, transform_humming_tensors
    from humming.tune import get_heuristics_config
    from weighted_sum_triton import weighted_sum

    hidden, intermediate, experts, top_k = case.model[1:]
    slots = case.tokens * top_k
    activations = HummingInputSchema(a_dtype="float8e4m3") if case.a_dtype == "fp8" else None

    def prepared(weights):
        schema = HummingWeightSchema(b_dtype="float4e2m1", bs_dtype="float8e8m0", weight_scale_group_size=32)
        tensors = {  # copies: it may change codes in place
            "weight": weights.codes.clone().view(torch.int32),
            "weight_scale": weights.scale.clone().view(torch.float8_e8m0fnu),
            "bias": weights.bias.bfloat16(),
        }
        options = {"num_experts": experts, "pad_n_to_multiple": 128, "pad_k_to_multiple": 64, "has_bias": True}
        config = prepare_layer_config(
            weights.rows, weights.k, schema, activations, torch_dtype=torch.bfloat16, tensors=tensors, **options
        )
        tuning = get_heuristics_config(config, shape_m=slots, gemm_type="indexed")
        locks = torch.zeros(2048, dtype=torch.int32, device=weights.codes.device)
        return config, tuning, {"locks": locks, **transform_humming_tensors(config, tensors)}

    gemms = [prepared(layer.w13), prepared(layer.w2)]
    gate_up, down = (layer.w13.bias.new_empty(slots, n, dtype=torch.bfloat16) for n in (2 * intermediate, hidden))

    def gemm(which: int, x, scale, rows, out, slots_of_row: int):
        config, tuning, tensors = gemms[which]
        names = ("sorted_ids", "expert_ids", "num_tokens_padded")
        options = {
            "top_k": slots_of_row,
            "compute_config": json.dumps({"gemm_type": "indexed"}),
            "tuning_config": json.dumps(tuning),
        }
        humming_forward(config, x, outputs=out, input_scale=scale, **dict(zip(names, rows, strict=True)), **tensors, **options)

    def bind(inputs, out):
        rows = [humming_rows(inputs.topk_ids, experts, tuning["block_shape"][0]) for _, tuning, _ in gemms]
        activation = {"activation_type": "binary_split", "activation_impl": HUMMING_SWIGLU}

        def call():
            gemm(0, inputs.x, None, rows[0], gate_up, top_k)
            between, _, scale = may_process_input(gemms[1][0], gate_up, **activation)
            gemm(1, between, scale, rows[1], down, 1)
            weighted_sum(down, inputs.topk_weights, out)

        return call

    return bind


def humming_rows(topk_ids, experts: int, block: int):
    """Return the slots by expert, each expert padded to whole blocks with the number of slots; the expert per block; rows."""
    flat, device = topk_ids.flatten(), topk_ids.device
    order, of_block = [], []
    for expert in range(experts):
        slots = torch.where(flat == expert)[0]
        blocks = -(-len(slots) // block)
        order.append(F.pad(slots, (0, blocks * block - len(slots)), value=flat.numel()))
        of_block += [expert] * blocks
    order = torch.cat(order).int()
    rows = torch.tensor(len(order), dtype=torch.int32, device=device)
    return order, torch.tensor(of_block, dtype=torch.int32, device=device), rows

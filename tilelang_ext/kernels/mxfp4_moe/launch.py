"""Launches of `mxfp4_moe` on torch tensors: which kernels with which tiles, what lies between them, and their compilation."""

from __future__ import annotations

from collections.abc import Callable

import tilelang
import torch
from torch import Tensor

from tilelang_ext.formats import MX_GROUP
from tilelang_ext.kernels.mxfp4_moe import formats as activations
from tilelang_ext.kernels.mxfp4_moe import sm90_launch as hopper
from tilelang_ext.kernels.mxfp4_moe import sm90_scatter as rows
from tilelang_ext.kernels.mxfp4_moe import tiled as stages
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.routing import CHUNK, Routing, capacity_of, count_slots, moe_sort
from tilelang_ext.kernels.mxfp4_moe.sum_slots import sum_slots
from tilelang_ext.kernels.mxfp4_moe.weights import MXFP4Weights, is_tiled
from tilelang_ext.launch.compile import compiled as compile_kernel
from tilelang_ext.launch.device import target_of


def compiled(make: Callable, arguments: tuple, device: torch.device, pass_configs: tuple = ()) -> Callable:
    """Return make(*arguments), a prim_func, as a function of tensors on `device`; see `tilelang_ext.launch.compile`."""
    return compile_kernel(make, arguments, target_of("mxfp4_moe", device), pass_configs)


def launch(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w13: MXFP4Weights,
    w2: MXFP4Weights,
    activation: Activation,
    kind: str,
    epilogue: str,
    expert_mask: Tensor | None,
    out: Tensor,
    *,
    compiled: Callable = compiled,
) -> None:
    """Launch the kernels for arguments of `mxfp4_moe` that have been checked, with at least one slot.

    Whoever has another way to run a prim_func passes a function in place of `compiled`.
    """
    device, dtype = x.device, str(x.dtype).removeprefix("torch.")
    ids_dtype = str(topk_ids.dtype).removeprefix("torch.")
    (tokens, top_k), local_experts = topk_ids.shape, w13.codes.shape[0]
    mask = _every_expert(local_experts, device) if expert_mask is None else expert_mask.int()
    num_experts, module = mask.numel(), None
    if is_tiled(w13):
        module, config = hopper.pick(tokens, top_k, num_experts, kind)
    else:
        _check_tilelang(device)
        config = stages.pick_config(tokens, top_k, num_experts, "metal" if device.type == "mps" else "cuda")
    # No more experts have rows than there are slots: of few tokens, hardly a block of the launches that follow is empty.
    # Rows of ids that are not distinct have to fit too, hence top_k of them at least.
    capacity = capacity_of(tokens, top_k, min(max(num_experts, top_k), topk_ids.numel()), config.block_M)
    # Here, since launches after the sort may read x before the launch before them has ended.
    x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.float().contiguous()

    routing = Routing(
        token_ids=torch.empty(capacity, dtype=torch.int32, device=device),
        weights=torch.empty(capacity, device=device),
        expert_ids=torch.empty(capacity // config.block_M, dtype=torch.int32, device=device),
        num_valid=torch.empty(1, dtype=torch.int32, device=device),
        positions=torch.empty(tokens, top_k, dtype=torch.int32, device=device),
    )
    max_experts = max(64, 1 << (num_experts - 1).bit_length())
    counts = torch.empty(-(-topk_ids.numel() // CHUNK), max_experts, dtype=torch.int32, device=device)
    if len(counts) > 1:
        compiled(count_slots, (max_experts, ids_dtype), device)(topk_ids, counts)
    sort = compiled(moe_sort, (config.block_M, max_experts, ids_dtype, module is not None), device)
    sort(topk_ids, topk_weights, mask, counts, *routing)

    partial_dtype = torch.float32 if module is None else torch.bfloat16
    y = (
        torch.zeros(out.shape, device=device)
        if epilogue == "atomic"
        else x.new_empty((tokens, top_k, out.shape[1]), dtype=partial_dtype)
    )
    if module is not None:
        hopper.run(module, config, activation, epilogue, x, routing, w13, w2, y, compiled)
    else:
        _run(config, activation, kind, epilogue, x, routing, w13, w2, y, compiled)
    if epilogue == "atomic":
        out.copy_(y)
    else:
        if module is None:
            add = compiled(sum_slots, (dtype,), device)
        else:
            add = compiled(sum_slots, ("bfloat16", "bfloat16", True), device, tuple(rows.PASS_CONFIGS.items()))
        add(y.unflatten(2, (-1, MX_GROUP)), routing.positions, out.unflatten(1, (-1, MX_GROUP)))


def _check_tilelang(device: torch.device) -> None:
    """Raise where upstream's CUDA of the general kernels does not compile."""
    if device.type == "cuda" and torch.version.hip is None and tilelang.__version__.startswith("0.1.14"):
        raise NotImplementedError(
            f"mxfp4_moe: these weights need tilelang 0.1.15 on NVIDIA GPUs; got {tilelang.__version__}; "
            "upgrade tilelang, or use tile_for_hopper on a Hopper GPU"
        )


_MASKS: dict[tuple[int, torch.device], Tensor] = {}


def _every_expert(num_experts: int, device: torch.device) -> Tensor:
    """Return the mask of experts that are all here, filled once; one made while a graph is captured is that graph's alone."""
    key = num_experts, device
    of_graph = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if key not in _MASKS and (of_graph or device.type == "cpu"):  # on the CPU it may be a tensor without data
        return torch.ones(num_experts, dtype=torch.int32, device=device)
    if key not in _MASKS:
        _MASKS[key] = torch.ones(num_experts, dtype=torch.int32).to(device)  # which waits, so that any stream may read it
    return _MASKS[key]


def _run(config, activation, kind, epilogue, x: Tensor, routing: Routing, w13, w2, y: Tensor, compiled: Callable) -> None:
    """Both products by the kernels that every target has."""
    hidden_kind, device = activations.between(kind), x.device
    token_ids, weights, expert_ids, num_valid, _ = routing
    hidden = _empty(hidden_kind, len(token_ids), w2.k, device)
    gate_up = compiled(stages.gate_up, (config, activation, kind), device)
    gate_up(*_quantized(x, kind, compiled), token_ids, expert_ids, num_valid, *_by_groups(w13), *hidden)
    down = compiled(stages.down, (config, hidden_kind, epilogue), device)
    down(*hidden, token_ids, weights, expert_ids, num_valid, *_by_groups(w2), y)


def _quantized(x: Tensor, kind: str, compiled: Callable) -> tuple[Tensor, ...]:
    """Return x as `kind`: codes and scales, or itself alone."""
    x = x.unflatten(1, (-1, MX_GROUP))
    if kind in activations.WIDE:
        return (x,)
    dtype = str(x.dtype).removeprefix("torch.")
    codes, scale = _empty(kind, x.shape[0], x.shape[1] * MX_GROUP, x.device)
    if kind == "fp8":
        compiled(activations.quantize_rows, (dtype,), x.device)(x, codes, scale)
    else:
        quantize = compiled(activations.quantize_groups, (kind, dtype), x.device)
        quantize(x.flatten(0, 1), codes.flatten(0, 1), scale.view(-1, 1))
    return codes, scale


def _empty(kind: str, rows: int, k: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return tensors for (rows, k) as `kind`."""
    groups = k // MX_GROUP
    dtype = getattr(torch, activations.codes_dtype(kind))
    codes = torch.empty(rows, groups, activations.group_bytes(kind), dtype=dtype, device=device)
    if kind in activations.WIDE:
        return (codes,)
    return codes, (
        torch.empty(rows, device=device) if kind == "fp8" else torch.empty(rows, groups, dtype=torch.uint8, device=device)
    )


def _by_groups(weights: MXFP4Weights) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (E, rows, K / 32, 16), scales and biases as the kernels take them."""
    return weights.codes.unflatten(2, (weights.scale.shape[2], -1)), weights.scale, weights.bias

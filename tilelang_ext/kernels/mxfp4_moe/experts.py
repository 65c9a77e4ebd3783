"""`MXFP4Experts`: the experts of a gpt-oss layer as a torch module that loads checkpoints by the names they use.

    g, u = rows ::2 and 1::2 of (gate_up_proj[e] . x[t] + gate_up_proj_bias[e])
    y[t] = sum over slots s of routing_weights[t, s] * (down_proj[e] . swiglu(g, u) + down_proj_bias[e])

with e = router_indices[t, s]. The router is not part of it, as in transformers' `GptOssExperts`, which this module replaces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tilelang_ext import quantization
from tilelang_ext.formats import CODES_PER_BYTE, E2M1, E8M0, MX_GROUP
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.operator import mxfp4_moe
from tilelang_ext.kernels.mxfp4_moe.sm90_packing import ScaleError
from tilelang_ext.kernels.mxfp4_moe.weights import (
    HopperWeights,
    MXFP4Weights,
    fits_hopper,
    of_experts,
    prepare_mxfp4_weights,
    tile_for_hopper,
)

_GPT_OSS = Activation()
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_PARTS = {"blocks": E2M1, "scales": E8M0, "bias": None}  # of a projection, and the format of the bytes of each


class _Part(NamedTuple):
    """Some of the experts, whose weights are stored alike."""

    experts: Tensor | None  # which, bool (E,); None for all
    w13: MXFP4Weights | HopperWeights
    w2: MXFP4Weights | HopperWeights
    a_dtype: torch.dtype | str | None


NAMES = tuple(f"{projection}_{part}" for projection in (_GATE_UP, _DOWN) for part in _PARTS)


class MXFP4Experts(nn.Module):
    """The E experts of one layer, with hidden size H and intermediate size I, both multiples of 32.

    | buffer and name in a checkpoint | shape | dtype |
    | --- | --- | --- |
    | gate_up_proj_blocks, gate_up_proj_scales | (E, 2I, H / 32, 16), (E, 2I, H / 32) | uint8 |
    | gate_up_proj_bias | (E, 2I) | float32; loaded from any float |
    | down_proj_blocks, down_proj_scales | (E, H, I / 32, 16), (E, H, I / 32) | uint8 |
    | down_proj_bias | (E, H) | float32; loaded from any float |

    The buffers have the rows of checkpoints: gate rows ::2, up rows 1::2. So any way to fill them will do: `load_state_dict`,
    transformers' `from_pretrained`, `from_checkpoint`, which makes a module and loads it. The first call after the buffers
    changed prepares the weights that the kernels read: a second copy of gate_up_proj with its gate rows apart, and on Hopper
    with bfloat16 or fp8 activations a second copy of all, made by `tile_for_hopper`; there, call the module once before
    `torch.compile`. Experts whose scales tiles cannot hold exactly are computed apart, and the results added: those of FP8 with
    bfloat16 activations if these tiles hold them, the others by the general kernels. The buffers of a new module are undefined
    until they are loaded. `activation`, `a_dtype` and `epilogue` are those of `mxfp4_moe`.

    Raises ValueError for sizes; load_state_dict raises TypeError for dtypes and RuntimeError for names and shapes.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation = _GPT_OSS,
        a_dtype: torch.dtype | str | None = None,
        epilogue: str = "reduce",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if size < 1 or size % MX_GROUP:
                raise ValueError(f"MXFP4Experts: {name} must be a multiple of {MX_GROUP}; got {size}; pad the weights")
        if num_experts < 1:
            raise ValueError(f"MXFP4Experts: num_experts must be at least 1; got {num_experts}; pass the model's")
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.activation, self.a_dtype, self.epilogue = activation, a_dtype, epilogue
        # The buffers that weights were prepared from, each with its version, and the weights; by the activations that they are
        # tiled for (None: not).
        self._prepared: dict[str | None, tuple[list[tuple[Tensor, int | None]], list[_Part]]] = {}
        for projection, rows, k in ((_GATE_UP, 2 * intermediate_size, hidden_size), (_DOWN, hidden_size, intermediate_size)):
            groups = k // MX_GROUP
            shapes = {"blocks": (rows, groups, MX_GROUP // CODES_PER_BYTE), "scales": (rows, groups), "bias": (rows,)}
            for part, shape in shapes.items():
                dtype = torch.float32 if part == "bias" else torch.uint8
                self.register_buffer(f"{projection}_{part}", torch.empty(num_experts, *shape, dtype=dtype, device=device))
        self.register_load_state_dict_pre_hook(_take_bytes)

    @classmethod
    def from_checkpoint(
        cls,
        source: Mapping[str, Tensor] | str | PathLike | Iterable[str | PathLike],
        prefix: str = "",
        *,
        activation: Activation = _GPT_OSS,
        a_dtype: torch.dtype | str | None = None,
        epilogue: str = "reduce",
        device: torch.device | str = "cpu",
    ) -> MXFP4Experts:
        """Return the experts whose tensors are called `prefix` + name, with the sizes that the tensors have.

        `source` is a mapping of names to tensors, or one or several safetensors files, of which only these tensors are read.
        `prefix` is, for layer 3 of gpt-oss, "model.layers.3.mlp.experts.".

        Raises KeyError for missing names, ValueError for shapes, TypeError for dtypes.
        """
        tensors = _select(source, prefix)
        blocks = {name: tensors[f"{name}_blocks"] for name in (_GATE_UP, _DOWN)}
        for name, each in blocks.items():
            if each.ndim != 4 or each.shape[-1] * CODES_PER_BYTE != MX_GROUP:
                raise ValueError(
                    f"MXFP4Experts: {prefix}{name}_blocks must be (E, rows, K / 32, 16); got {tuple(each.shape)}; "
                    "pass the tensors of the checkpoint as they are"
                )
        hidden_size, intermediate_size = (blocks[name].shape[2] * MX_GROUP for name in (_GATE_UP, _DOWN))
        experts = cls(
            blocks[_GATE_UP].shape[0],
            hidden_size,
            intermediate_size,
            activation=activation,
            a_dtype=a_dtype,
            epilogue=epilogue,
            device=device,
        )
        for name in NAMES:
            shape = tuple(getattr(experts, name).shape)
            if tensors[name].shape != shape:
                raise ValueError(
                    f"MXFP4Experts: {prefix}{name} must have shape {shape}, as the blocks imply; "
                    f"got {tuple(tensors[name].shape)}; check the checkpoint"
                )
        experts.load_state_dict(tensors)
        return experts

    @property
    def w13(self) -> MXFP4Weights:
        """Gate and up, as `prepare_mxfp4_weights` returns them."""
        return self._parts(None)[0].w13

    @property
    def w2(self) -> MXFP4Weights:
        """Down, as `prepare_mxfp4_weights` returns it."""
        return self._parts(None)[0].w2

    def _parts(self, tiled: str | None) -> list[_Part]:
        """Return all experts as parts, tiled for these activations on Hopper if `tiled` names any and the scales allow it."""
        buffers = [getattr(self, name) for name in NAMES]
        prepared_from, parts = self._prepared.get(tiled, (None, None))
        # A module that was moved or cast has other tensors; one that was loaded again may have the same, written to.
        if prepared_from is None or not all(map(_is_unchanged, buffers, prepared_from)):
            w13 = prepare_mxfp4_weights(*buffers[:3], source="gpt_oss", gate="interleaved")
            w2 = prepare_mxfp4_weights(*buffers[3:], source="gpt_oss")
            parts = _tiled_parts(w13, w2, tiled, self.a_dtype) if tiled else [_Part(None, w13, w2, self.a_dtype)]
            self._prepared[tiled] = [(buffer, _version_of(buffer)) for buffer in buffers], parts
        return parts

    def forward(
        self,
        hidden_states: Tensor,
        router_indices: Tensor,
        routing_weights: Tensor,
        *,
        expert_mask: Tensor | None = None,
    ) -> Tensor:
        """Return what the experts add to the residual stream, in the shape and dtype of hidden_states.

        hidden_states (..., H) bfloat16 or float16; router_indices (..., top_k) int32 or int64, distinct in each row;
        routing_weights (..., top_k) float; expert_mask (all experts,) bool, true for the experts of this module.
        """
        top_k = router_indices.shape[-1]
        x, parts = hidden_states.reshape(-1, self.hidden_size), self._parts(_tiles_for(hidden_states, self.a_dtype))
        total = None
        for part in parts:
            y = mxfp4_moe(
                x,
                router_indices.reshape(-1, top_k),
                routing_weights.reshape(-1, top_k),
                part.w13,
                part.w2,
                activation=self.activation,
                a_dtype=part.a_dtype,
                epilogue=self.epilogue,
                expert_mask=_mask_of(part.experts, expert_mask),
            )
            total = y if total is None else total + y
        return total.view(hidden_states.shape)

    def __getstate__(self) -> dict:
        """Return what a copy or a file keeps: the buffers, not what is prepared from them."""
        return self.__dict__ | {"_prepared": {}}

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}"
        return f"{sizes}, activation={self.activation.name}, a_dtype={self.a_dtype}, epilogue={self.epilogue}"


def _tiled_parts(w13: MXFP4Weights, w2: MXFP4Weights, tiled: str, a_dtype: torch.dtype | str | None) -> list[_Part]:
    """Return the experts in tiles for `tiled`, those which that cannot hold in tiles for bfloat16, and the rest as they are."""
    with contextlib.suppress(ScaleError):
        return [_Part(None, *(tile_for_hopper(weights, a_dtype=tiled) for weights in (w13, w2)), a_dtype)]
    parts, rest = [], torch.ones(w13.num_experts, dtype=torch.bool, device=w13.codes.device)
    for a_format in dict.fromkeys((tiled, "bfloat16")):
        held = rest & fits_hopper(w13, a_format) & fits_hopper(w2, a_format)
        if held.any():
            everyone = bool(held.all())
            pair = (w13, w2) if everyone else (of_experts(w13, held), of_experts(w2, held))
            tiles = (tile_for_hopper(weights, a_dtype=a_format) for weights in pair)
            parts.append(_Part(None if everyone else held, *tiles, a_dtype if a_format == tiled else None))
            rest = rest & ~held
    if rest.any():
        everyone = bool(rest.all())
        pair = (w13, w2) if everyone else (of_experts(w13, rest), of_experts(w2, rest))
        parts.append(_Part(None if everyone else rest, *pair, a_dtype))
    return parts


def _mask_of(experts: Tensor | None, expert_mask: Tensor | None) -> Tensor | None:
    """Return the mask of a part of the experts, given that of those whose weights are here."""
    if experts is None or expert_mask is None:
        return expert_mask if experts is None else experts
    number = expert_mask.cumsum(0) - 1  # of an expert among those
    return expert_mask & experts[number.clamp(min=0)]


def _tiles_for(x: Tensor, a_dtype: torch.dtype | str | None) -> str | None:
    """Return the a_dtype for which weights are to be tiled on the GPU of x, or None if they are not."""
    is_hopper = x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) == (9, 0) and torch.version.hip is None
    if not is_hopper or x.dtype != torch.bfloat16:
        return None
    return {None: "bfloat16", torch.bfloat16: "bfloat16", torch.float8_e4m3fn: "fp8", "fp8": "fp8"}.get(a_dtype)


def _select(source: Mapping[str, Tensor] | str | PathLike | Iterable[str | PathLike], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of one layer, by name without the prefix."""
    if isinstance(source, Mapping):
        found, present = {name: source[prefix + name] for name in NAMES if prefix + name in source}, list(source)
    else:
        found, present = {}, []
        for path in [source] if isinstance(source, str | PathLike) else source:
            with safe_open(Path(path), framework="pt") as file:
                keys = set(file.keys())
                found |= {name: file.get_tensor(prefix + name) for name in NAMES if prefix + name in keys}
                present += keys
    missing = [prefix + name for name in NAMES if name not in found]
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"MXFP4Experts: {prefix}{name} must be a torch tensor; got {type(tensor).__name__}; convert it")
    if missing:
        prefixes = sorted({key.removesuffix(NAMES[0]) for key in present if key.endswith(NAMES[0])})
        advice = f"pass a prefix such as {prefixes[0]!r}" if prefixes and not found else "pass every file of the layer"
        raise KeyError(f"MXFP4Experts: {', '.join(missing)} must be in the checkpoint; got {len(present)} tensors; {advice}")
    return found


def _version_of(tensor: Tensor) -> int | None:
    """Return how often a tensor was written to; None where nobody counts: in a trace, and for tensors of inference mode."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _is_unchanged(buffer: Tensor, recorded: tuple[Tensor, int | None]) -> bool:
    tensor, version = recorded
    return buffer is tensor and (torch.compiler.is_compiling() or _version_of(buffer) == version)


def _take_bytes(module, state_dict, prefix, *_) -> None:
    """Make bytes of other dtypes uint8; wrong names and shapes are left for torch to report."""
    for name in NAMES:
        key, (_, _, part) = prefix + name, name.rpartition("_")
        if key not in state_dict:
            continue
        tensor, format = state_dict[key], _PARTS[part]
        if format is not None:
            state_dict[key] = quantization.raw_codes(tensor, format, key)
        elif not tensor.dtype.is_floating_point:
            raise TypeError(f"MXFP4Experts: {key} must be a float tensor; got {tensor.dtype}; convert it")

"""Mixtures of experts with MXFP4 weights, of this package and of its peers: cases, inputs, providers. Benchmarks share them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import mxfp4_moe_peers as peers
import torch
from harness import Provider
from numeric import measure

from tilelang_ext import Activation, HopperWeights, MXFP4Weights, mxfp4_moe, prepare_mxfp4_weights, reference, tile_for_hopper
from tilelang_ext.formats import E2M1, BlockScaledLayout

TARGETS = ("auto", "metal", "metal4", "cuda")
A_DTYPES = {"bf16": None, "fp8": "fp8", "mxfp8": "mxfp8", "mxfp4": "mxfp4"}  # as mxfp4_moe takes them
LEAST_COSINE = {"bf16": 0.9999, "fp8": 0.995, "mxfp8": 0.995, "mxfp4": 0.95}  # of any row with the unquantised result
MAX_ERROR = {"bf16": 3e-2}  # of ours; with quantised activations the cosine says more


class Model(NamedTuple):
    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int


MODELS = {
    model.name: model
    for model in (
        Model("gpt-oss-120b", 2880, 2880, 128, 4),
        Model("gpt-oss-20b", 2880, 2880, 32, 4),
        Model("deepseek-like", 7168, 2048, 64, 8),
        Model("small", 128, 96, 4, 2),
    )
}


class Layer(NamedTuple):
    """Weights of a layer, random in every bit of the codes; gate rows lie above up rows."""

    w13: MXFP4Weights | HopperWeights
    w2: MXFP4Weights | HopperWeights


class Inputs(NamedTuple):
    """Tokens of one call and where they go."""

    x: torch.Tensor  # (tokens, hidden) bfloat16
    topk_ids: torch.Tensor  # (tokens, top_k) int32
    topk_weights: torch.Tensor  # (tokens, top_k) float32


@dataclass(frozen=True)
class Case:
    """One layer and batch size, what the GEMMs take activations in, and the target and device it runs on."""

    model: Model
    tokens: int
    a_dtype: str
    target: str
    device: str  # "cuda", "mps", "simulator", or "none" when the kernels are lowered only
    zipf: float = 0.0  # the expert of rank r is chosen as often as r to the power of minus this; 0: all equally often

    @property
    def flops(self) -> int:
        _, hidden, intermediate, _, top_k = self.model
        return 6 * self.tokens * top_k * hidden * intermediate

    def bytes(self, active: int) -> int:
        """Return the bytes that a layer must move: codes and scales of `active` experts, x and y."""
        _, hidden, intermediate, *_ = self.model
        return active * 3 * hidden * intermediate * 17 // 32 + 4 * self.tokens * hidden

    def layer(self, seed: int, device: str) -> Layer:
        generator = torch.Generator(device).manual_seed(seed)
        _, hidden, intermediate, experts, _ = self.model

        def weights(rows: int, k: int, gate: str | None) -> MXFP4Weights:
            codes = torch.randint(256, (experts, rows, k // 2), generator=generator, device=device, dtype=torch.uint8)
            scale = torch.randint(118, 122, (experts, rows, k // 32), generator=generator, device=device, dtype=torch.uint8)
            bias = torch.randn(experts, rows, generator=generator, device=device) / 8
            return prepare_mxfp4_weights(codes, scale, bias.bfloat16(), gate=gate)

        return Layer(weights(2 * intermediate, hidden, "separated"), weights(hidden, intermediate, None))

    def inputs(self, seed: int, device: str) -> Inputs:
        """Every token goes to top_k distinct experts; which experts are hot, if any are, differs with the seed."""
        generator = torch.Generator(device).manual_seed(seed)
        _, hidden, _, experts, top_k = self.model
        logits = torch.randn(self.tokens, experts, generator=generator, device=device)
        if self.zipf:  # the largest of logarithms of probabilities and Gumbel noise is a draw
            noise = torch.rand(self.tokens, experts, generator=generator, device=device).clamp(min=2.0**-24)
            rank = torch.rand(experts, generator=generator, device=device).argsort() + 1
            logits = -self.zipf * rank.log() - (-noise.log()).log()
        values, topk_ids = logits.topk(top_k)
        x = torch.randn(self.tokens, hidden, generator=generator, device=device).bfloat16()
        return Inputs(x, topk_ids.int(), values.softmax(-1))

    def output(self, device: str) -> torch.Tensor:
        """An output full of NaN, so that an element that is not written is seen."""
        return torch.full((self.tokens, self.model.hidden), torch.nan, dtype=torch.bfloat16, device=device)


def expected(layer: Layer, inputs: Inputs) -> torch.Tensor:
    """The result in float64 with nothing quantised or rounded, on the device of the inputs, one expert in use at a time."""
    y = torch.zeros(inputs.x.shape, dtype=torch.float64, device=inputs.x.device)
    for expert in inputs.topk_ids.unique().tolist():
        (d13, bias13), (d2, bias2) = (dequantized(weights, expert) for weights in layer)
        ids = torch.where(inputs.topk_ids == expert, 0, -1)
        activation = partial(reference.swiglu, gate="separated")
        y += reference.moe(inputs.x, ids, inputs.topk_weights, d13, d2, activation=activation, bias13=bias13, bias2=bias2)
    return y


def dequantized(weights: MXFP4Weights, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights (1, rows, k) and biases (1, rows) of one expert."""
    one = slice(expert, expert + 1)
    return reference.dequantize(weights.codes[one], weights.scale[one], E2M1, BlockScaledLayout.e8m0_k32()), weights.bias[one]


def check(case: Case, provider: str, y: torch.Tensor, want: torch.Tensor) -> dict:
    """Return the errors, or stop."""
    cosine = torch.nn.functional.cosine_similarity(y.double(), want, dim=-1).nan_to_num(nan=-1.0).min().item()
    error = measure(y, want)
    where = f"{case.model.name}, {case.tokens} tokens, {case.a_dtype}: {provider}"
    if cosine < LEAST_COSINE[case.a_dtype]:
        raise AssertionError(f"{where}: cosine of a row {cosine:.4f}, must be at least {LEAST_COSINE[case.a_dtype]}")
    if provider == "ours" and error.max > MAX_ERROR.get(case.a_dtype, float("inf")):
        raise AssertionError(f"{where}: max error {error.max:.3g} at {error.worst}, limit {MAX_ERROR[case.a_dtype]:.3g}")
    return {"max_error": error.max, "least_cosine": cosine}


# --- providers -------------------------------------------------------------------------------------------------------


def make_ours(case: Case, layer: Layer):
    tiled_for = {"bf16": "bfloat16", "fp8": "fp8"}.get(case.a_dtype)
    if tiled_for and case.device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        layer = Layer(*(tile_for_hopper(w, a_dtype=tiled_for) for w in layer))

    def bind(inputs: Inputs, out: torch.Tensor):
        options = {"activation": Activation(), "a_dtype": A_DTYPES[case.a_dtype], "out": out}
        return partial(mxfp4_moe, *inputs, *layer, **options)

    return bind


PROVIDERS = (  # make(case, layer) returns bind(inputs, out), which returns the call that is timed
    Provider("ours", "tilelang_ext.mxfp4_moe, sorting and quantisation included", TARGETS[1:], make_ours),
    Provider("triton_kernels", "of vLLM: matmul_ogs with fused SwiGLU, sum over slots", ("cuda",), peers.make_triton_kernels),
    Provider("humming", "both GEMMs, its activation kernel, a Triton kernel for the sum", ("cuda",), peers.make_humming),
)
TAKES = {"ours": tuple(A_DTYPES), "triton_kernels": ("bf16",), "humming": ("bf16", "fp8")}  # activations of each


def installed(provider: Provider) -> bool:
    """Whether the library of a provider can be imported."""
    return provider.name == "ours" or find_spec(provider.name) is not None


def moved(tensors: tuple, device: str):
    """A tuple of tensors, of tuples of them and of other values, with the tensors on `device`."""
    return type(tensors)(
        *(t.to(device) if torch.is_tensor(t) else moved(t, device) if isinstance(t, tuple) else t for t in tensors)
    )

"""Scaled matmuls of this package and of its peers: cases, inputs, providers. Benchmarks share them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from harness import Provider
from torch.nn.functional import ScalingType

from tilelang_ext import reference, scaled_mm
from tilelang_ext.kernels.scaled_mm import tiled, vecmat
from tilelang_ext.kernels.scaled_mm.arguments import LAYOUTS
from tilelang_ext.kernels.scaled_mm.problem import Problem, bucket_of

DTYPES = ("bfloat16", "float16", "float32")  # of the output
RECIPES = {
    "tensor": (ScalingType.TensorWise,) * 2,
    "row": (ScalingType.RowWise,) * 2,
    "block": (ScalingType.BlockWise1x128, ScalingType.BlockWise128x128),
    "mx": (ScalingType.BlockWise1x32,) * 2,
}
ASSUMED_ARCH = "sm_90a"  # when only lowering
TENSOR_CORE_ERROR = 2e-3  # of a sum in the matrix unit, promoted every 128 of K
FAST_ERROR = 3e-2  # of one that stays there


class Inputs(NamedTuple):
    """Codes, and scales in the shapes and strides that torch documents."""

    a: torch.Tensor  # (M, K)
    b: torch.Tensor  # (N, K)
    scale_a: torch.Tensor
    scale_b: torch.Tensor


@dataclass(frozen=True)
class Case:
    """One product: its size, the recipe of its scales, the type of its output, the target and the device it runs on."""

    M: int
    N: int
    K: int
    recipe: str
    dtype: str
    target: str
    device: str  # "cuda", "mps", "simulator", or "none" when the kernel is lowered only

    @property
    def name(self) -> str:
        return f"{self.M}x{self.N}x{self.K} {self.recipe}"

    @property
    def recipes(self) -> tuple[ScalingType, ScalingType]:
        return RECIPES[self.recipe]

    @property
    def layouts(self) -> tuple:
        return tuple(LAYOUTS[recipe.value] for recipe in self.recipes)

    @property
    def flops(self) -> int:
        return 2 * self.M * self.N * self.K

    @property
    def bytes(self) -> int:
        """Bytes of A, B and C, each once; scales are left out."""
        return self.M * self.K + self.N * self.K + self.M * self.N * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def problem(self) -> Problem:
        """What the kernel is compiled for where this benchmark compiles it itself."""
        target_kind, arch = ("cuda", ASSUMED_ARCH) if self.target == "cuda" else ("metal", "")
        fp8, num_sms = "float8_e4m3fn", 0  # the kernels that are compiled here do not ask
        return Problem(target_kind, arch, num_sms, bucket_of(self.M), self.N, self.K, fp8, fp8, *self.layouts, None, self.dtype)

    @property
    def kernel(self) -> tuple:
        """The prim_func without a tuned kernel of one architecture, and its configuration."""
        if vecmat.takes(self.problem):
            config = vecmat.pick_config(self.problem)
            return vecmat.vecmat(self.problem, config), config
        config = tiled.pick_config(self.problem)
        return tiled.scaled_matmul(self.problem, config), config

    def by_blocks(self, seed: int, device: str = "cpu") -> Inputs:
        """Random operands on `device`, scales as kernels take them: every one differs."""
        generator = torch.Generator(device).manual_seed(seed)

        def operand(rows: int, layout) -> tuple[torch.Tensor, torch.Tensor]:
            codes = torch.randn(rows, self.K, generator=generator, device=device).to(torch.float8_e4m3fn)
            shape = layout.scale_shape(rows, self.K)
            if layout.scale_format is not None:
                return codes, torch.randint(125, 130, shape, generator=generator, device=device, dtype=torch.uint8)
            return codes, torch.rand(shape, generator=generator, device=device) / 64 + 1 / 64  # float16 holds the result

        (a, scale_a), (b, scale_b) = operand(self.M, self.layouts[0]), operand(self.N, self.layouts[1])
        return Inputs(a, b, scale_a, scale_b)

    def expected(self, inputs: Inputs) -> torch.Tensor:
        """The product of `by_blocks`, float64."""
        return reference.scaled_matmul(inputs.a, inputs.scale_a, inputs.b, inputs.scale_b, *self.layouts)

    def as_torch(self, inputs: Inputs) -> Inputs:
        """`by_blocks` with scales as torch documents them."""
        scale_a, scale_b = inputs.scale_a, inputs.scale_b
        if self.recipe == "row":
            scale_b = scale_b.t()
        elif self.recipe == "block":
            scale_a = scale_a.t().clone(memory_format=torch.contiguous_format).t()  # of one row, strides count too
            scale_b = torch.nn.functional.pad(scale_b, (0, -scale_b.shape[1] % 4)).t()
        return inputs._replace(scale_a=scale_a, scale_b=scale_b)

    def output(self, device: str = "cpu") -> torch.Tensor:
        """An output full of NaN, so that an element nobody writes is seen."""
        return torch.full((self.M, self.N), torch.nan, dtype=self.torch_dtype, device=device)


def make_ours(case: Case, fast_accum: bool = False):
    def run(inputs: Inputs, out: torch.Tensor) -> None:
        scale_a, scale_b = (inputs.scale_a, case.recipes[0]), (inputs.scale_b, case.recipes[1])
        scaled_mm(inputs.a, inputs.b.t(), *scale_a, *scale_b, use_fast_accum=fast_accum, out=out)

    return run


def make_torch(case: Case, fast_accum: bool = False):
    """The operator below torch.nn.functional.scaled_mm, which has an `out`."""
    recipes = [[recipe.value] for recipe in case.recipes]

    def run(inputs: Inputs, out: torch.Tensor) -> None:
        torch.ops.aten._scaled_mm_v2.out(
            inputs.a, inputs.b.t(), [inputs.scale_a], recipes[0], [], [inputs.scale_b], recipes[1], [],
            None, case.torch_dtype, [], fast_accum, out=out,
        )  # fmt: skip

    return run


def make_vllm(case: Case):
    """CUTLASS: row scales as (M, 1) and (1, N); scales of 128 as (M, K/128) with stride 1 along M, and (K/128, N/128)."""
    if not hasattr(torch.ops._C, "cutlass_scaled_mm"):
        import vllm._custom_ops  # noqa: F401  (registers the operator)
    groups = case.K // 128

    def run(inputs: Inputs, out: torch.Tensor) -> None:
        scale_b = inputs.scale_b[:groups] if case.recipe == "block" else inputs.scale_b
        torch.ops._C.cutlass_scaled_mm(out, inputs.a, inputs.b.t(), inputs.scale_a, scale_b, None)

    return run


def make_deep_gemm(case: Case):
    """Scales (M, K/128) with stride 1 along M, and (N/128, K/128)."""
    import deep_gemm

    groups, contiguous = case.K // 128, {}

    def run(inputs: Inputs, out: torch.Tensor) -> None:
        # Copied by the first call alone, which warms up: torch's are padded along K.
        if id(inputs) not in contiguous:
            contiguous[id(inputs)] = inputs.scale_b.t()[:, :groups].contiguous()
        b = inputs.b, contiguous[id(inputs)]
        deep_gemm.fp8_gemm_nt((inputs.a, inputs.scale_a), b, out, disable_ue8m0_cast=True)

    return run


PROVIDERS = (
    Provider("ours", "tilelang_ext.scaled_mm", ("cuda", "mps", "simulator"), make_ours),
    Provider("ours_fast", "the same, use_fast_accum", ("cuda",), partial(make_ours, fast_accum=True)),
    Provider("torch", "torch's scaled_mm", ("cuda",), make_torch),
    Provider("torch_fast", "the same, use_fast_accum", ("cuda",), partial(make_torch, fast_accum=True)),
    Provider("vllm", "torch.ops._C.cutlass_scaled_mm", ("cuda",), make_vllm),
    Provider("deep_gemm", "deep_gemm.fp8_gemm_nt", ("cuda",), make_deep_gemm),
)
TAKES = {  # recipes of each provider
    "ours": tuple(RECIPES),
    "ours_fast": ("tensor", "row"),
    "torch": ("tensor", "row", "block"),  # MX needs Blackwell
    "torch_fast": ("tensor", "row"),
    "vllm": ("tensor", "row", "block"),
    "deep_gemm": ("block",),
}


def installed(provider: Provider) -> bool:
    """Whether a provider's library is here."""
    module = {"vllm": "vllm", "deep_gemm": "deep_gemm"}.get(provider.name)
    loaded = provider.name == "vllm" and hasattr(torch.ops._C, "cutlass_scaled_mm")
    return module is None or loaded or find_spec(module) is not None

"""What `tilelang-ext tune scaled_mm` measures: sizes, the choices worth a try, inputs, and the values they must have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tilelang_ext import reference
from tilelang_ext.kernels.scaled_mm import sm90_config
from tilelang_ext.kernels.scaled_mm.arguments import LAYOUTS, ROW, ROW_BLOCK, SQUARE_BLOCK, Options
from tilelang_ext.kernels.scaled_mm.launch import RECIPE, add_variant
from tilelang_ext.kernels.scaled_mm.operator import problem_for
from tilelang_ext.kernels.scaled_mm.problem import Problem
from tilelang_ext.kernels.scaled_mm.selection import KERNELS, as_data, key_of
from tilelang_ext.kernels.scaled_mm.signature import MEMBERS, to_plan
from tilelang_ext.launch.device import Target
from tilelang_ext.launch.plan import launcher

__all__ = ["CAPS", "KERNELS", "KINDS", "Case", "cases"]  # what `tune` uses

CAPS = {"M": 65536, "N": 262144, "K": 262144}
KINDS = {"row_fast": ("row", True), "row": ("row", False), "block": ("block", False)}  # recipe, use_fast_accum
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # of a model's matmuls
_RECIPES = {"row": (ROW, ROW), "block": (ROW_BLOCK, SQUARE_BLOCK)}
_CHECKED_ROWS = 64  # compared with float64, spread over all
_ERRORS = {True: 5e-2, False: 2e-3 + 2.0**-8}  # of the larger of a value and the RMS of all; accumulated in the tensor core


@dataclass(frozen=True)
class Case:
    """One size and kind of scales: E4M3 to bfloat16."""

    problem: Problem
    kind: str

    @property
    def key(self) -> str:
        return key_of(self.problem)

    @property
    def name(self) -> str:
        return f"{self.problem.max_M}x{self.problem.N}x{self.problem.K} {self.kind}"

    @property
    def bytes(self) -> int:
        """Bytes of the operands and the result."""
        M, N, K = self.problem.max_M, self.problem.N, self.problem.K
        return M * K + N * K + 2 * M * N

    def choices(self, count: int) -> list:
        """Return the `count` choices that the model predicts to be fastest, and the best of each kernel."""
        ordered = sorted(sm90_config.choices(self.problem), key=lambda choice: sm90_config.predicted_us(choice, self.problem))
        best = {choice.kernel: choice for choice in reversed(ordered)}
        return ordered[:count] + [choice for choice in best.values() if choice not in ordered[:count]]

    def compile_choice(self, choice, compile: Callable) -> None:
        """Call compile(make, *arguments, pass_configs) for the kernel of a choice."""
        sm90_config.compile_choice(self.problem, choice, compile)

    def data(self, choice) -> dict:
        """Return a choice as JSON holds it."""
        return as_data(choice)

    def inputs(self, seed: int) -> tuple:
        """Return arguments of `scaled_mm_out` on the GPU, the output full of NaN; every scale differs."""
        M, N, K = self.problem.max_M, self.problem.N, self.problem.K
        generator = torch.Generator("cuda").manual_seed(seed)
        recipes = _RECIPES[KINDS[self.kind][0]]

        def operand(rows: int, recipe: int) -> tuple[Tensor, Tensor]:
            codes = torch.randn(rows, K, generator=generator, device="cuda").to(torch.float8_e4m3fn)
            scale = torch.rand(LAYOUTS[recipe].scale_shape(rows, K), generator=generator, device="cuda") / 64 + 1 / 64
            return codes, scale

        (a, scale_a), (b, scale_b) = operand(M, recipes[0]), operand(N, recipes[1])
        if self.kind == "block":
            scale_a = scale_a.t().contiguous().t()
            scale_b = torch.nn.functional.pad(scale_b, (0, -scale_b.shape[1] % 4)).t()
        options = Options(recipes[0], 0, recipes[1], 0, KINDS[self.kind][1]).pack()
        out = torch.full((M, N), torch.nan, dtype=torch.bfloat16, device="cuda")
        return a, b.t(), scale_a, scale_b, None, options, out

    def expected(self, arguments: tuple) -> tuple[Tensor, Tensor]:
        """Return some rows, and what they must be, float64."""
        a, b, scale_a, scale_b, *_ = arguments
        M, K = a.shape
        rows = torch.unique(torch.linspace(0, M - 1, min(M, _CHECKED_ROWS), device="cuda").long())
        layouts = [LAYOUTS[recipe] for recipe in _RECIPES[KINDS[self.kind][0]]]
        if self.kind == "block":
            scale_b = scale_b[: -(-K // 128)].t()
        return rows, reference.scaled_matmul(a[rows], scale_a[rows], b.t(), scale_b, *layouts)

    def error(self, out: Tensor, expected: tuple[Tensor, Tensor]) -> str | None:
        """Return what is wrong with a result, None if nothing is."""
        rows, values = expected
        level = torch.maximum(values.abs(), values.square().mean().sqrt())
        largest = ((out[rows].double() - values).abs() / level).nan_to_num(torch.inf).max().item()
        if largest > _ERRORS[KINDS[self.kind][1]]:
            return f"error {largest:.1e}"
        return None if bool(torch.isfinite(out).all()) else "elements that are not finite"

    def launcher(self, choice, arguments: tuple) -> Callable[[tuple], None]:
        """Return a function that launches the kernel of a choice on arguments like these."""
        plan = launcher().plan(RECIPE, MEMBERS)
        add_variant(plan, arguments, self.problem, _Chosen(choice))
        return lambda arguments: plan(*to_plan(arguments))


@dataclass(frozen=True)
class _Chosen:
    """Stands in for the file that chooses."""

    choice: sm90_config.Choice

    def compile_kernel(self, problem: Problem, compile: Callable) -> Callable:
        return sm90_config.compile_choice(problem, self.choice, compile)

    def memory_of(self, problem: Problem) -> tuple:
        return sm90_config.memory_of(self.choice)

    def sizes_served(self, problem: Problem) -> tuple[int, int]:
        return 1, problem.max_M


def cases(sizes: Sequence[str], matmuls: Sequence[tuple[int, int]], kinds: Sequence[str], target: Target) -> list[Case]:
    """Return the cases of sizes as "16x4096x7168", and of `ROWS` rows for each (N, K) of a model's matmuls.

    Raises ValueError for a size that cannot be read, that no kernel of a choice takes, or that is past `CAPS`.
    """
    made = [*map(_size_of, sizes), *((M, N, K) for N, K in matmuls for M in ROWS)]
    return [_case(size, kind, target) for size in dict.fromkeys(made) for kind in kinds]


def _size_of(text: str) -> tuple[int, int, int]:
    try:
        M, N, K = map(int, text.split("x"))
    except ValueError:
        raise ValueError(f"tune: a size must be as 16x4096x7168, M, N and K; got {text}; write it so") from None
    for name, value in (("M", M), ("N", N), ("K", K)):
        if not 0 < value <= CAPS[name]:
            raise ValueError(f"tune: {name} must be from 1 to {CAPS[name]}; got {value} in {text}; tune a smaller size")
    return M, N, K


def _case(size: tuple[int, int, int], kind: str, target: Target) -> Case:
    (M, N, K), (recipe, fast), fp8 = size, KINDS[kind], torch.float8_e4m3fn
    key = torch.device("cuda"), sm90_config.rounded(M), N, K, fp8, fp8, *_RECIPES[recipe], None, torch.bfloat16
    problem = problem_for(target, key, fast)
    if not sm90_config.takes(problem):
        raise ValueError(
            f"tune: {M}x{N}x{K} must be for sm_90a, K a multiple of 16 and N of 8; got a {target.arch}; it has one kernel only"
        )
    return Case(problem, kind)

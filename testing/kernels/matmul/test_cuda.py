"""`matmul` on an NVIDIA GPU: values of random sizes, orders in memory, dtypes and epilogues against float64; graphs, tracing.

Kernels are compiled in parallel first; on Hopper sizes are no constants of them.
"""

import math
import random
from functools import partial

import pytest
import torch
from kernels.compile_on_gpu import compile_matmul_problems
from kernels.matmul.operands import ALL, BF16, FP16, FP32, NONE, name, operands
from numeric import assert_close

from tilelang_ext import reference
from tilelang_ext.kernels.matmul import launch, sm90_config
from tilelang_ext.kernels.matmul.operator import matmul
from tilelang_ext.kernels.matmul.problem import Epilogue, Problem
from tilelang_ext.launch.device import target_of

pytestmark = pytest.mark.cuda

SUM_ERROR = 1e-4  # of a float32 sum in the matrix unit, beside float64
OUTPUTS = (BF16, FP16, FP32)
EPILOGUES = (
    NONE,
    ALL,
    Epilogue(bias_dtype="bfloat16", activation="silu"),
    Epilogue(bias_dtype="float16", activation="gelu_tanh"),
    Epilogue(row_scale=True, activation="relu"),
    Epilogue(column_scale=True, residual_dtype="float32"),
    Epilogue(residual_dtype="float16"),
)
LAYOUTS = [(True, True), (True, False), (False, True), (False, False)]  # whether a and b are K-major


def problem(M, N, K, dtype=BF16, out=None, layout=(True, True), epilogue=NONE) -> Problem:
    target = target_of("matmul", torch.device("cuda", torch.cuda.current_device()))
    return Problem(*target, M, N, K, name(dtype), name(out or dtype), *layout, epilogue)


def random_problems(count: int, seed: int) -> list[Problem]:
    """Sizes are log-uniform; what is contiguous in memory is a multiple of 8 elements in most problems, as TMA demands.

    In each fourth problem some are odd, or even ones.
    """
    generator = random.Random(seed)

    def draw(low, high, multiple):
        return multiple * max(1, round(math.exp(generator.uniform(math.log(low), math.log(high))) / multiple))

    found = []
    for number in range(count):
        multiple = 8 if number % 4 < 3 else generator.choice((1, 2))
        layout = generator.choice(LAYOUTS)
        M = draw(1, 3000, 1 if layout[0] else multiple)
        N, K = draw(8, 6000, multiple), draw(8, 6000, multiple)
        out, epilogue = generator.choice(OUTPUTS), generator.choice(EPILOGUES)
        found.append(problem(M, N, K, generator.choice((BF16, FP16)), out, layout, epilogue))
    return found


def check(of: Problem, seed=0) -> None:
    """Check one call, whose output is poisoned, and that a second one repeats its bits."""
    a, b, *others = (None if operand is None else operand.cuda() for operand in operands(of, seed))
    row_scale, column_scale, bias, residual = others
    given = {
        "row_scale": row_scale,
        "column_scale": column_scale,
        "bias": bias,
        "residual": residual,
        "activation": of.epilogue.activation,
    }
    expected = reference.matmul(a, b, row_scale, column_scale, bias, of.epilogue.activation, residual)
    out = torch.full((of.M, of.N), torch.nan, dtype=getattr(torch, of.out_dtype), device="cuda")
    matmul(a, b, out=out, **given)
    bounds = {"max_error": SUM_ERROR, "rms_error": SUM_ERROR} if of.out_dtype == "float32" else {}
    assert_close(out, expected, dtype=of.out_dtype, **bounds)
    assert torch.equal(out, matmul(a, b, output_dtype=out.dtype, **given)), of


def check_all(problems: list[Problem]) -> None:
    compile_matmul_problems(problems)
    for seed, of in enumerate(problems):
        check(of, seed)


def test_random_problems():
    check_all(random_problems(40, seed=1))


def test_every_order_of_few_rows():
    """One row to a few tiles of them; K of one block and of many, in splits."""
    rows = (1, 8, 16, 24, 40, 64, 72, 136)
    check_all([problem(M, N, K, layout=layout) for M in rows for N, K in ((72, 4104), (4104, 200)) for layout in LAYOUTS])


KINDS = {
    "swapped": lambda tile: tile.is_swapped and not tile.adds,
    "wide": lambda tile: tile.block_M == 256 and tile.block_N > 128 and not tile.adds,
    "added": lambda tile: tile.adds and not tile.is_swapped,
    "both": lambda tile: tile.adds and tile.is_swapped,
    "below": lambda tile: tile.cluster == 2 and not tile.shares_a and not tile.adds,
    "beside": lambda tile: tile.shares_a and not tile.adds,
    "beside, added": lambda tile: tile.shares_a and tile.adds,
    "square": lambda tile: tile.cluster == 4,
    "narrow": lambda tile: tile.block_N < 64 and tile.is_swapped,
    "narrow, not swapped": lambda tile: tile.block_N < 64 and not tile.is_swapped,
    "equal parts": lambda tile: tile.streams,
    "clusters that sum": lambda tile: tile.joins,
    "columns of no MMA": lambda tile: tile.block_N % 64 > 32 and not tile.is_swapped and not tile.thin,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tile(kind, monkeypatch):
    """Swapped operands, tiles of 256 rows, K in splits that one block adds, clusters of every kind, N-major operands in narrow
    boxes and with columns of no MMA: the best of each kind, whatever is picked."""
    sizes = [(24, 264, 1032), (200, 520, 2056), (520, 776, 520), (1032, 392, 4104)]
    with monkeypatch.context() as patch:
        patch.setattr(sm90_config, "choices", partial(_choices_of_kind, KINDS[kind], sm90_config.choices))
        forget()
        check_all([problem(*size, layout=layout) for size, layout in zip(sizes, LAYOUTS, strict=True)])
    forget()


def _choices_of_kind(of_kind, choices, of: Problem) -> list:
    every = list(choices(of))
    return [choice for choice in every if of_kind(choice[0])] or every


def forget() -> None:
    sm90_config._pick.cache_clear()
    launch.plan.cache_clear()


def test_every_epilogue():
    """Of one kernel, and of one with K in splits."""
    sizes, cases = ((200, 264, 136), (40, 136, 4096)), [(out, epilogue) for out in OUTPUTS for epilogue in EPILOGUES]
    check_all([problem(*sizes[i % 2], BF16, out, epilogue=epilogue) for i, (out, epilogue) in enumerate(cases)])


def test_odd_sizes():
    """Every order of operands in memory, with one kernel and with K in splits."""
    sizes = [
        (1, 1, 1),
        (3, 5, 7),
        (1, 8, 3),
        (65, 33, 129),
        (51, 77, 2011),
        (1001, 1003, 1005),
        (8, 4099, 66),
        (300, 130, 4100),
    ]
    layouts = [LAYOUTS[(i + i // 4) % 4] for i in range(len(sizes))]
    check_all([problem(*size, layout=layout, epilogue=ALL) for size, layout in zip(sizes, layouts, strict=True)])


@pytest.mark.parametrize(("M", "N", "K"), [(0, 64, 64), (64, 0, 64), (5, 64, 0)])
def test_empty_sizes(M, N, K):
    """Without K there is what follows the product."""
    a, b = torch.empty(M, K, dtype=BF16, device="cuda"), torch.empty(K, N, dtype=BF16, device="cuda")
    bias = torch.randn(N, device="cuda")
    out = torch.full((M, N), torch.nan, device="cuda")
    matmul(a, b, bias, out=out)
    assert torch.equal(out, bias.expand(M, N))


def test_strides_and_residual_in_place():
    """Rows of a that lie apart, tensors that begin between multiples of 16 bytes; the residual is the output."""
    a = torch.randn(70, 257, device="cuda").to(BF16)[:, 1:]
    b = torch.randn(256, 73, device="cuda").to(BF16)[:, :72]
    out = torch.randn(70, 72, device="cuda").to(BF16)
    expected = a.double() @ b.double() + out.double()
    assert_close(matmul(a, b, residual=out, out=out), expected, dtype="bfloat16")


def test_a_size_of_the_same_choice_compiles_nothing(monkeypatch):
    check(problem(1000, 256, 512))
    first, last = 1000, 1024
    monkeypatch.setattr(launch, "add_variant", None)
    for M in (first, 1001, last):
        check(problem(M, 256, 512))


@pytest.mark.parametrize(("M", "N", "K"), [(3, 512, 8192), (200, 512, 256)])
def test_graph_and_torch_compile(M, N, K):
    """The first has K in splits, whose accumulators lie in the graph's own memory."""
    a, b = torch.randn(M, K, device="cuda").to(FP16), torch.randn(N, K, device="cuda").to(FP16).t()
    expected = a.double() @ b.double()
    out = torch.full((M, N), torch.nan, dtype=FP16, device="cuda")
    matmul(a, b, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        matmul(a, b, out=out)
    a.mul_(2)
    out.fill_(torch.nan)
    graph.replay()
    assert_close(out, 2 * expected, dtype="float16")
    compiled = torch.compile(lambda a, b: matmul(a, b) * 2, fullgraph=True)
    assert_close(compiled(a, b), 4 * expected, dtype="float16", max_error=2e-3)

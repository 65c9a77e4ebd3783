"""The kernel for 1 to 4 rows, in the simulator: values of every layout, tails, and bytes: each weight is read once."""

import pytest
import torch
from kernels.scaled_mm.operands import E4M3, E5M2, MX, PAIRS, ROW, ROW_BLOCK, SQUARE_BLOCK, operands, problem
from numeric import assert_close

from tilelang_ext import simulate
from tilelang_ext.kernels.scaled_mm.vecmat import pick_config, takes, vecmat


def run(M, N, K, recipes, *, format_a=E4M3, format_b=E4M3, bias=None, out="float32"):
    """Check one launch against float64 and return its counts."""
    arguments, expected = operands(M, N, K, recipes, format_a, format_b)
    kernel_problem = problem(M, N, K, recipes, a=format_a, b=format_b, bias=bias, out=out)
    assert takes(kernel_problem)
    result = torch.full((M, N), torch.nan, dtype=getattr(torch, out))
    extra = []
    if bias is not None:
        extra = [torch.randn(N, generator=torch.Generator().manual_seed(3)).to(getattr(torch, bias))]
        expected = expected + extra[0].double()
    report = simulate(vecmat(kernel_problem, pick_config(kernel_problem)), *arguments, *extra, result)
    assert not report.findings, str(report)
    assert_close(result, expected, dtype=out)
    return report.counts


@pytest.mark.parametrize(
    ("recipes", "M"),
    [(recipes, (1, 4)[i % 2]) for i, recipes in enumerate(PAIRS)],
    ids=lambda value: "-".join(recipe.name for recipe in value) if isinstance(value, tuple) else str(value),
)
def test_recipes(recipes, M):
    """One row and four take turns; more recipes and rows are in test_every_weight_is_read_once."""
    run(M, 70, 320, recipes)


@pytest.mark.parametrize(
    ("M", "bias", "out"), [(2, "bfloat16", "float16"), (3, "float16", "bfloat16"), (3, "float32", "float32")]
)
def test_rows_bias_and_outputs(M, bias, out):
    run(M, 33, 256, (ROW, ROW), bias=bias, out=out)


@pytest.mark.parametrize("formats", [(E5M2, E4M3), (E4M3, E5M2)], ids=lambda pair: pair[0].name)
def test_mixed_operands(formats):
    run(2, 20, 128, (ROW_BLOCK, SQUARE_BLOCK), format_a=formats[0], format_b=formats[1])


@pytest.mark.parametrize(
    ("N", "K"),
    [
        (1, 16),  # one load in all
        (5, 24),  # rows start at multiples of 8 bytes: loads of 8
        (7, 33),  # of 1
        (130, 4096 + 16),  # two rounds of loads, the second not full
        (9, 8192 + 272),  # two slabs, the second not full
    ],
)
def test_tails(N, K):
    run(2, N, K, (ROW, ROW))


@pytest.mark.parametrize(
    ("M", "recipes"),
    [
        (1, (ROW, ROW)),
        (1, (MX, MX)),
        (2, (ROW_BLOCK, SQUARE_BLOCK)),
        (3, (MX, MX)),
        (4, (ROW, ROW)),
        (4, (ROW_BLOCK, SQUARE_BLOCK)),
    ],
    ids=str,
)
def test_every_weight_is_read_once(M, recipes):
    """Bytes are those of the weights, of a once per threadgroup, and of the scales that a thread needs for what it loads."""
    N, K = 128, 4096 + 32  # the second round of loads is not full
    config = pick_config(problem(M, N, K, recipes))
    threadgroups = -(-N // (config.rows * config.passes))
    loads = N * K // 16 // config.rows  # by threads, each of `rows` rows
    scales = {ROW: 2 * 4 * M * N, MX: loads * (M + config.rows), ROW_BLOCK: 4 * loads * (M + 1)}[recipes[0]]
    counts = run(M, N, K, recipes)
    assert counts.device_bytes_read == N * K + threadgroups * M * K + scales
    assert counts.device_bytes_written == 4 * M * N
    assert counts.mma == 0
    if M == 1 and recipes[0] is ROW:
        assert counts.device_bytes_read <= 1.02 * N * K


def test_only_up_to_four_rows():
    assert takes(problem(4, 64, 64, (ROW, ROW)))
    assert not takes(problem(5, 64, 64, (ROW, ROW)))

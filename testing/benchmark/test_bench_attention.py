"""The benchmark of attention: what it counts and what it checks, on the CPU; it is timed on an NVIDIA GPU alone."""

import sys
from pathlib import Path

import pytest
import torch

from tilelang_ext import attention_decode, reference

sys.path.append(str(Path(__file__).parents[2] / "benchmark"))
import bench_attention
import bench_attention_decode
from bench_attention import Case


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 5, 7, 4, 2, 8, True),
        Case(1, 7, 5, 2, 1, 8, True, 3),
        Case(1, 6, 9, 2, 2, 8, False),
        Case(1, 4, 9, 1, 1, 8, False, 2),
    ],
    ids=lambda case: case.name,
)
def test_operations(case):
    """Those of the pairs that the reference sees."""
    q, k = torch.zeros(1, case.S_q, 1, 8), torch.zeros(1, case.S_k, 1, 8)
    v = torch.eye(case.S_k)[None, :, None]
    o, _ = reference.attention(q, k, v, 1.0, case.causal, case.window)
    assert case.seen == (o > 0).sum()
    assert case.flops == 4 * case.batch * case.heads * case.seen * case.head_dim


def test_check_notices_a_wrong_row():
    """A result of the reference passes; one with two heads exchanged, or a row that is NaN, does not."""
    case = Case(2, 9, 12, 4, 2, 16, True, 6, True)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, tokens, heads, 16, generator=generator) for tokens, heads in ((9, 4), (12, 2), (12, 2)))
    inputs = object.__new__(bench_attention.Inputs)
    inputs.__dict__ = {"case": case, "q": q, "k": k, "v": v, "sinks": torch.randn(4, generator=generator), "scales": [None] * 3}
    o, _ = reference.attention(q, k, v, 0.25, True, 6, inputs.sinks)
    assert bench_attention.check(inputs, o) > 0.999999
    wrong = o.clone()
    wrong[1, 4, 3] = torch.nan
    for result in (wrong, o.flip(2)):
        with pytest.raises(AssertionError, match="D 16, 2x9x12, 4/2, window 6 sinks: error"):
            bench_attention.check(inputs, result)


def test_cases():
    """Drawn cases are the same for a seed, and what every kernel takes."""
    drawn = bench_attention.random_cases(40, 3)
    assert drawn == bench_attention.random_cases(40, 3)
    assert {case.head_dim for case in drawn} == set(bench_attention.HEAD_DIMS)
    for case in drawn:
        assert case.heads % case.kv_heads == 0
        assert case.S_q <= case.S_k


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_needs_a_gpu():
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU; got none"):
        bench_attention.main([])


def test_check_of_decode():
    """Of the reference's result, in 16 bits and of codes; not of one whose sequences are exchanged."""
    case = bench_attention_decode.Case(16, 2, 30, 2)
    generator = torch.Generator().manual_seed(0)
    inputs = object.__new__(bench_attention_decode.Inputs)
    q, k, v = (torch.randn(2, n, heads, 16, generator=generator).bfloat16() for n, heads in ((1, 16), (30, 2), (30, 2)))
    scales = [torch.rand(2, generator=generator) + 0.5 for _ in range(2)]
    codes = [x.to(torch.float8_e4m3fn) for x in (k, v)]
    names = ("case", "q", "k", "v", "k8", "v8", "k_scale", "v_scale")
    inputs.__dict__ = dict(zip(names, (case, q, k, v, *codes, *scales), strict=True))
    seqlens = torch.full((2,), 30, dtype=torch.int32)
    o = attention_decode(q, k, v, seqlens, return_lse=False)
    assert bench_attention_decode.check(inputs, o, False, 0.9999) > 0.9999
    o = attention_decode(q, *codes, seqlens, k_scale=scales[0], v_scale=scales[1], return_lse=False)
    assert bench_attention_decode.check(inputs, o, True, 0.9999) > 0.9999
    with pytest.raises(AssertionError, match="D 16, 16/2, 2x30: cosine"):
        bench_attention_decode.check(inputs, o.flip(0), True, 0.9999)

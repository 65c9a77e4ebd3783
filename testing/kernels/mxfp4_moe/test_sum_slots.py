"""The sum over the slots of a token: values on every target and by the CUDA text, and what its loads wait for."""

import functools
import re

import pytest
import torch
from cuda.execute import execute, needs_compiler
from cuda.kernels import lower
from kernels.mxfp4_moe.targets import compiled

from tilelang_ext.kernels.mxfp4_moe.sum_slots import sum_slots

TOKENS, TOP_K, GROUPS = 3, 10, 33  # more slots than are loaded at a time, and more columns than a block adds


@functools.cache
def case(dtype):
    """(partial, positions, expected float32): slots without a row hold NaN; slots added in another order give other bits."""
    generator = torch.Generator().manual_seed(0)
    partial = torch.randn(TOKENS, TOP_K, GROUPS, 32, generator=generator)
    partial = (partial * torch.exp2(torch.randint(-9, 10, partial.shape, generator=generator).float())).to(dtype)
    positions = torch.randint(0, 2**31 - 1, (TOKENS, TOP_K), generator=generator, dtype=torch.int32)
    positions[0, [1, 7, 8]], positions[1], positions[2, :9] = -1, -1, -1
    expected = torch.zeros(TOKENS, GROUPS, 32)
    for slot in range(TOP_K):
        expected += torch.where(positions[:, slot, None, None] >= 0, partial[:, slot].float(), 0)
    partial[positions < 0] = torch.nan
    return partial, positions, expected


@pytest.mark.parametrize(
    ("target", "dtype"), [("c", torch.float32), ("metal", torch.bfloat16), ("hip -mcpu=gfx942", torch.float32)]
)
def test_values(target, dtype):
    partial, positions, expected = case(dtype)
    out, name = torch.full_like(partial[:, 0], torch.nan), str(dtype).removeprefix("torch.")
    compiled(sum_slots, (name, name), target)(partial, positions, out)
    assert torch.equal(out.view(torch.uint8), expected.to(dtype).view(torch.uint8))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda(dtype):
    """Loads of 16 bytes, those of eight slots before the first addition, and one store."""
    partial, positions, expected = case(dtype)
    out, name = torch.full_like(partial[:, 0], torch.nan), str(dtype).removeprefix("torch.")
    text = lower(sum_slots(name, name), "sm_80")
    tensors = {"partial": partial, "positions": positions, "out": out}
    execute(text, (TOKENS, 3), tensors, {"tokens": TOKENS, "top_k": TOP_K, "groups": GROUPS})
    assert torch.equal(out.view(torch.uint8), expected.to(dtype).view(torch.uint8))
    vector = {"float32": "float4", "bfloat16": "uint4"}[name]
    accesses = re.findall(rf"= \*\({vector}\*\)\((partial) |(total_f) \+ .*= __\d|\*\({vector}\*\)\((out) ", text)
    assert ["".join(access) for access in accesses] == ["partial"] * 8 + ["total_f"] * 8 + ["out"]

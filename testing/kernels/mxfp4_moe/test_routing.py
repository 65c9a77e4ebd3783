"""Sorting tokens by expert on the device, against reference.moe_sort: the same rows for each expert, in any order."""

import pytest
import torch
from cuda.execute import execute, needs_compiler
from cuda.kernels import lower
from kernels.mxfp4_moe.operands import launch_kernels
from kernels.mxfp4_moe.targets import TARGETS, compiled

from tilelang_ext import reference
from tilelang_ext.kernels.mxfp4_moe.problem import TOKEN_BITS
from tilelang_ext.kernels.mxfp4_moe.routing import CHUNK, capacity_of, count_slots, moe_sort
from tilelang_ext.kernels.mxfp4_moe.weights import MXFP4Weights

BLOCK_M, MAX_EXPERTS = 4, 16


def by_cuda_text(prim_func):
    """A function of tensors, as `compiled` returns; it runs one block of threads after the other."""
    text = lower(prim_func, "sm_90a")
    names = [prim_func.buffer_map[parameter].name for parameter in prim_func.params]

    def run(*tensors):
        tensors = dict(zip(names, tensors, strict=True))
        (tokens, top_k), chunks = tensors["topk_ids"].shape, len(tensors["counts"])
        sizes = {"tokens": tokens, "top_k": top_k, "chunks": chunks}
        if "expert_mask" in tensors:
            sizes |= {"num_experts": len(tensors["expert_mask"]), "blocks": len(tensors["expert_ids"])}
        execute(text, (chunks, 1), tensors, sizes)

    return run


def routing(tokens, top_k, num_experts, seed=0):
    """Distinct experts for each token, never the second last, which stays empty."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(tokens, num_experts, generator=generator)
    score[:, max(num_experts - 2, 0)] = -1
    return score.topk(top_k).indices, torch.rand(tokens, top_k, generator=generator)


def check(target, topk_ids, topk_weights, num_experts, mask=None, ids_dtype=torch.int32):
    """Sort into poisoned outputs and compare what each expert got, its padding, and the blocks behind."""
    tokens, top_k = topk_ids.shape
    capacity = capacity_of(tokens, top_k, num_experts, BLOCK_M)
    token_ids = torch.full((capacity,), -7, dtype=torch.int32)
    weights = torch.full((capacity,), torch.nan)
    expert_ids = torch.full((capacity // BLOCK_M,), -7, dtype=torch.int32)
    num_valid = torch.full((1,), -7, dtype=torch.int32)
    positions = torch.full((tokens, top_k), -7, dtype=torch.int32)
    kernel_mask = torch.ones(num_experts, dtype=torch.int32) if mask is None else mask.int()
    topk_ids, options = topk_ids.to(ids_dtype), (max(MAX_EXPERTS, num_experts), str(ids_dtype).removeprefix("torch."))
    counts = torch.full((max(1, -(-tokens * top_k // CHUNK)), options[0]), -7, dtype=torch.int32)

    def of_target(make, arguments):
        return by_cuda_text(make(*arguments)) if target == "cuda" else compiled(make, arguments, target)

    if len(counts) > 1:
        of_target(count_slots, options)(topk_ids, counts)
    sort = of_target(moe_sort, (BLOCK_M, *options))
    sort(topk_ids, topk_weights, kernel_mask, counts, token_ids, weights, expert_ids, num_valid, positions)

    want = reference.moe_sort(topk_ids, topk_weights, num_experts, BLOCK_M, mask)
    assert token_ids.shape == want.token_ids.shape
    assert num_valid.item() == want.num_valid.item()
    assert torch.equal(expert_ids, want.expert_ids)
    for expert in range(-1, num_experts):
        rows = (expert_ids == expert).repeat_interleave(BLOCK_M)
        got_order, want_order = token_ids[rows].argsort(), want.token_ids[rows].argsort()
        assert torch.equal(token_ids[rows][got_order], want.token_ids[rows][want_order])
        assert torch.equal(weights[rows][got_order], want.weights[rows][want_order])
        used = token_ids[rows] != top_k << TOKEN_BITS | tokens
        assert torch.equal(used, want.token_ids[rows] != top_k << TOKEN_BITS | tokens), "padding lies behind the rows in use"

    for id in want.token_ids.tolist():
        if id != top_k << TOKEN_BITS | tokens:
            assert token_ids[positions[id & 0xFFFFFF, id >> TOKEN_BITS]] == id
    assert (positions >= 0).sum() == (want.token_ids != top_k << TOKEN_BITS | tokens).sum()
    assert (positions >= -1).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts"),
    [
        (0, 2, 4),
        (1, 1, 2),
        (1, 4, 16),  # one row in a block
        (37, 3, 7),
        (CHUNK, 2, MAX_EXPERTS),  # two chunks, both full
    ],
)
def test_sets(target, tokens, top_k, num_experts):
    check(target, *routing(tokens, top_k, num_experts), num_experts)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tokens", [9, 2 * CHUNK + 5])
def test_all_tokens_to_one_expert(target, tokens):
    check(target, torch.full((tokens, 1), 2), torch.rand(tokens, 1), 5)


@pytest.mark.parametrize("target", TARGETS)
def test_experts_elsewhere_and_out_of_range(target):
    topk_ids, topk_weights = routing(20, 3, 8)
    topk_ids[3, 1], topk_ids[4, 0], topk_ids[5, 2] = 8, -1, 2**31 - 1
    check(target, topk_ids, topk_weights, 8)
    mask = torch.tensor([True, False, True, True, False, False, True, True])
    check(target, topk_ids, topk_weights, 8, mask)
    check(target, topk_ids, topk_weights, 8, torch.zeros(8, dtype=torch.bool))


def test_int64_ids():
    """As all ids of test_tiled.py are, which runs them on target c too."""
    topk_ids, topk_weights = routing(5, 2, 4)
    topk_ids[0, 0] = 2**32 + 1  # is no expert 1
    check("metal", topk_ids, topk_weights, 4, ids_dtype=torch.int64)


@pytest.mark.parametrize("target", ["c", "metal", pytest.param("cuda", marks=needs_compiler)])
def test_many_experts(target):
    """In one chunk, and in three, of which the last is the smallest."""
    check(target, *routing(20, 4, 1024), 1024)
    topk_ids, topk_weights = routing(701, 3, 1024)
    topk_ids[3, 1], topk_ids[400, 0], topk_ids[700, 2] = 1024, -1, 2**31 - 1
    mask = torch.rand(1024) < 0.7
    check(target, topk_ids, topk_weights, 1024, mask)


@pytest.mark.parametrize(("tokens", "chunks"), [(1, 1), (CHUNK // 4, 1), (CHUNK // 4 + 1, 2), (5 * CHUNK, 20)])
def test_launches(tokens, chunks):
    """One chunk needs no other's counts; where there are more, a kernel before the sort counts them."""
    launched = []

    def compiled(make, options, device, pass_configs):
        return lambda *tensors: launched.append((make, tensors))

    def empty(*shape, dtype=torch.uint8):
        return torch.empty(shape, dtype=dtype, device="meta")

    experts, H = 70, 32
    w13 = MXFP4Weights(empty(experts, 2 * H, H // 2), empty(experts, 2 * H, 1), empty(experts, 2 * H), 2 * H, H, True)
    w2 = MXFP4Weights(empty(experts, H, H // 2), empty(experts, H, 1), empty(experts, H), H, H, False)
    x, topk_ids = empty(tokens, H, dtype=torch.bfloat16), empty(tokens, 4, dtype=torch.int64)
    launch_kernels((x, topk_ids, empty(tokens, 4), w13, w2), x, compiled=compiled)
    makes, operands = zip(*launched, strict=True)
    sort = makes.index(moe_sort)
    assert makes[:sort] == (count_slots,) * (chunks > 1)
    counts = operands[sort][3]
    assert counts.shape == (chunks, 128)
    if chunks > 1:
        assert operands[0][1] is counts

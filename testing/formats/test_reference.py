"""The reference against its own equations, written out element by element or group by group."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilelang_ext import checkpoints, reference
from tilelang_ext import quantization as q
from tilelang_ext.formats import E2M1, E4M3, E5M2, E8M0, BlockScaledLayout

PER_TENSOR, PER_ROW, MX = BlockScaledLayout.per_tensor(), BlockScaledLayout.per_row(), BlockScaledLayout.e8m0_k32()
BLOCK_A, BLOCK_B = BlockScaledLayout.block(1, 128), BlockScaledLayout.block(128, 128)
seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_fp8(seed: int, *shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return (torch.randn(shape, generator=generator(seed)) * 4).to(dtype)


def random_scale(seed: int, layout: BlockScaledLayout, rows: int, k: int) -> torch.Tensor:
    """A different scale in each block."""
    shape = layout.scale_shape(rows, k)
    if layout.scale_format is E8M0:
        return torch.randint(117, 137, shape, generator=generator(seed), dtype=torch.uint8)
    return 2 ** (torch.rand(shape, generator=generator(seed)) * 8 - 4)


def random_mxfp4(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    *lead, rows, k = shape
    packed = torch.randint(256, (*lead, rows, k // 2), generator=generator(seed), dtype=torch.uint8)
    return packed, torch.randint(119, 127, (*lead, rows, k // 32), generator=generator(seed + 1), dtype=torch.uint8)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


# --- dequantize ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [PER_TENSOR, PER_ROW, BLOCK_A, BLOCK_B, MX], ids=lambda b: f"{b.rows}x{b.k}")
def test_dequantize_element_by_element(layout):
    rows, k = 130, 160
    codes, scale = random_fp8(0, rows, k), random_scale(1, layout, rows, k)
    values = reference.dequantize(codes, scale, E4M3, layout)
    assert values.dtype == torch.float64
    for i in (0, 1, 127, 128, 129):
        for j in (0, 1, 31, 32, 127, 128, 159):
            s = scale[i // (layout.rows or rows), j // (layout.k or k)].item()
            factor = 2.0 ** (s - 127) if layout is MX else s
            assert values[i, j] == codes[i, j].double().item() * factor


def test_dequantize_takes_the_short_forms_of_a_scale():
    codes = random_fp8(0, 3, 64)
    row = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float16)
    full = reference.dequantize(codes, row[:, None], E4M3, PER_ROW)
    assert torch.equal(full, codes.double() * row.double()[:, None])
    assert torch.equal(reference.dequantize(codes, row, E4M3, PER_ROW), full)
    for scale in (torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([[3.0]])):
        assert torch.equal(reference.dequantize(codes, scale, E4M3, PER_TENSOR), codes.double() * 3)
    by_group = torch.tensor([126, 130], dtype=torch.uint8)  # all rows alike
    expected = codes.double() * torch.tensor([0.5, 8.0]).repeat_interleave(32)
    assert torch.equal(reference.dequantize(codes, by_group, E4M3, MX), expected)
    assert torch.equal(reference.dequantize(codes, by_group.view(torch.float8_e8m0fnu), E4M3, MX), expected)


def test_dequantize_zero_sentinel():
    codes, scale = torch.ones(1, 64).to(torch.float8_e4m3fn), torch.tensor([[0, 255]], dtype=torch.uint8)
    plain = reference.dequantize(codes, scale, E4M3, MX)
    assert (plain[0, :32] == 2.0**-127).all()
    assert plain[0, 32:].isnan().all()
    assert reference.dequantize(codes, scale, E4M3, MX, zero_sentinel=True).eq(0).all()


# --- products --------------------------------------------------------------------------------------------------------

PAIRS = [(PER_TENSOR, PER_TENSOR), (PER_ROW, PER_ROW), (BLOCK_A, BLOCK_B), (MX, MX), (PER_TENSOR, PER_ROW)]


@pytest.mark.parametrize(("layout_a", "layout_b"), PAIRS, ids=lambda b: f"{b.rows}x{b.k}")
@pytest.mark.parametrize(("dtype_a", "dtype_b"), [(E4M3, E4M3), (E4M3, E5M2)], ids=lambda f: f.name)
def test_scaled_matmul_group_by_group(layout_a, layout_b, dtype_a, dtype_b):
    m, n, k = 3, 133, 288
    A = random_fp8(0, m, k, dtype=getattr(torch, dtype_a.dtype))
    B = random_fp8(1, n, k, dtype=getattr(torch, dtype_b.dtype))
    scale_a, scale_b = random_scale(2, layout_a, m, k), random_scale(3, layout_b, n, k)
    got = reference.scaled_matmul(A, scale_a, B, scale_b, layout_a, layout_b)
    sa, sb = ((2.0 ** (s.double() - 127) if s.dtype == torch.uint8 else s.double()).tolist() for s in (scale_a, scale_b))
    expected = torch.zeros(m, n, dtype=torch.float64)
    for g in range(0, k, 32):
        by_row = [sa[i // (layout_a.rows or m)][g // (layout_a.k or k)] for i in range(m)]
        by_column = [sb[j // (layout_b.rows or n)][g // (layout_b.k or k)] for j in range(n)]
        factor = torch.tensor([[x * y for y in by_column] for x in by_row], dtype=torch.float64)
        expected += factor * (A[:, g : g + 32].double() @ B[:, g : g + 32].double().T)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_scaled_matmul_adds_to_c_without_scaling_it():
    A, B, C = random_fp8(0, 4, 64), random_fp8(1, 5, 64), torch.full((4, 5), 1e6)
    scale = torch.tensor(0.25)
    product = reference.scaled_matmul(A, scale, B, scale, PER_TENSOR)
    assert torch.equal(reference.scaled_matmul(A, scale, B, scale, PER_TENSOR, C=C), product + 1e6)
    assert C.eq(1e6).all()


def test_scaled_matmul_one_hot_rows_are_weights():
    weights, scale = q.quantize(torch.randn(7, 128, generator=generator(0)) * 2.0 ** torch.arange(7)[:, None], E4M3, MX)
    one_hot = torch.eye(128).to(torch.float8_e5m2)
    got = reference.scaled_matmul(one_hot, torch.full((4,), 127, dtype=torch.uint8), weights, scale, MX)
    assert torch.equal(got, reference.dequantize(weights, scale, E4M3, MX).T)


def test_scaled_matmul_takes_transposed_operands():
    A, B = random_fp8(0, 64, 4).T, random_fp8(1, 64, 5).T
    scale = random_scale(2, MX, 4, 64), random_scale(3, MX, 5, 64)
    assert torch.equal(
        reference.scaled_matmul(A, scale[0], B, scale[1], MX),
        reference.scaled_matmul(A.contiguous(), scale[0], B.contiguous(), scale[1], MX),
    )


def test_scaled_matmul_errors():
    A, scale = random_fp8(0, 4, 64), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"A, B: must be \(M, K\) and \(N, K\); got \(4, 64\) and \(64, 4\)"):
        reference.scaled_matmul(A, scale, A.T, scale, PER_TENSOR)
    with pytest.raises(TypeError, match="dtype: must be one of"):
        reference.scaled_matmul(A.float(), scale, A, scale, PER_TENSOR)


def test_mxfp4_matmul_one_hot_and_negatives():
    packed, scale = random_mxfp4(0, 96, 256)
    assert torch.equal(reference.mxfp4_matmul(torch.eye(256), packed, scale), reference.dequantize(packed, scale, E2M1, MX).T)
    A = torch.randn(64, 256, generator=generator(2))
    right = reference.mxfp4_matmul(A, packed, scale)
    assert cosine(reference.mxfp4_matmul(A, packed >> 4 | packed << 4, scale), right) < 0.5  # swapped nibbles
    steep = torch.randint(90, 150, scale.shape, generator=generator(3), dtype=torch.uint8)
    right = reference.mxfp4_matmul(A, packed, steep)
    assert cosine(reference.mxfp4_matmul(A, packed, steep.roll(1, -1)), right) < 0.5  # scales of the next group
    assert cosine(reference.mxfp4_matmul(A, packed, steep.roll(1, 0)), right) < 0.5  # and of the next row


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "mxfp8", "mxfp4", "fp8"])
def test_requantize(kind):
    x = torch.randn(5, 64, generator=generator(0), dtype=torch.float64)
    got = reference.requantize(x, kind)
    assert torch.equal(reference.requantize(got, kind), got)  # what is stored once is stored again without error
    assert (
        0
        < (got - x).abs().max()
        <= {"bfloat16": 2**-8, "float16": 2**-11, "mxfp8": 2**-4, "fp8": 2**-4, "mxfp4": 0.25}[kind] * x.abs().max()
    )


def test_requantize_error():
    with pytest.raises(ValueError, match="kind: must be bfloat16, float16, fp8, mxfp8 or mxfp4; got 'int8'"):
        reference.requantize(torch.zeros(1, 32), "int8")


# --- activations -----------------------------------------------------------------------------------------------------


def test_swiglu_of_gpt_oss():
    gate, up = [-9.0, -1.0, 0.5, 7.5, 3.0], [0.0, -8.0, 2.0, 9.0, -0.5]
    expected = []
    for g, u in zip(gate, up, strict=True):
        g, u = min(g, 7.0), max(-7.0, min(u, 7.0))
        expected.append(g / (1 + math.exp(-1.702 * g)) * (u + 1))
    interleaved = torch.tensor([gate, up]).T.reshape(1, -1)
    torch.testing.assert_close(reference.swiglu(interleaved)[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    separated = torch.tensor([gate + up])
    assert torch.equal(reference.swiglu(separated, gate="separated"), reference.swiglu(interleaved))
    assert not torch.equal(reference.swiglu(separated), reference.swiglu(interleaved))
    assert reference.swiglu(separated, alpha=1.0, limit=2.0, gate="separated").max() <= 2 * 3


def test_silu_mul():
    gate_up = torch.randn(3, 8, generator=generator(0), dtype=torch.float64)
    torch.testing.assert_close(reference.silu_mul(gate_up), torch.nn.functional.silu(gate_up[:, :4]) * gate_up[:, 4:])
    with pytest.raises(ValueError, match="gate: must be 'interleaved' or 'separated'; got 'first'"):
        reference.silu_mul(gate_up, gate="first")


# --- mixture of experts ----------------------------------------------------------------------------------------------


def problem(seed: int, tokens: int, experts: int = 5, top_k: int = 2, hidden: int = 64, inner: int = 32):
    """Routing and weights of every size different; the last expert gets no token."""
    g = generator(seed)
    scores = torch.rand(tokens, experts, generator=g)
    scores[:, -1] = -1
    weights, ids = scores.topk(top_k)
    w13 = reference.dequantize(*random_mxfp4(seed + 1, experts, 2 * inner, hidden), E2M1, MX)
    w2 = reference.dequantize(*random_mxfp4(seed + 2, experts, hidden, inner), E2M1, MX)
    bias13, bias2 = torch.randn(experts, 2 * inner, generator=g), torch.randn(experts, hidden, generator=g)
    return torch.randn(tokens, hidden, generator=g), ids, weights, w13, w2, {"bias13": bias13, "bias2": bias2}


@pytest.mark.parametrize("between", [None, "bfloat16", "mxfp8", "mxfp4"])
def test_moe_token_by_token(between):
    x, ids, weights, w13, w2, biases = problem(0, 9)
    y = reference.moe(x, ids, weights, w13, w2, between=between, **biases)
    expected = torch.zeros_like(y)
    for t in range(9):
        for s in range(2):
            e = ids[t, s]
            hidden = reference.swiglu(w13[e] @ x[t].double() + biases["bias13"][e].double())
            if between:
                hidden = reference.requantize(hidden[None], between)[0]
            expected[t] += weights[t, s].double() * (w2[e] @ hidden + biases["bias2"][e].double())
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_moe_swapped_gate_and_up_is_seen():
    x, ids, weights, w13, w2, _ = problem(3, 64)
    x = x / 16  # where gate and up are large, swiglu is near g * u for positive ones, and a swap shows less
    right = reference.moe(x, ids, weights, w13, w2)
    gate, up = checkpoints.split_gate_up(w13)
    assert cosine(reference.moe(x, ids, weights, checkpoints.interleave_gate_up(up, gate), w2), right) < 0.5
    separated = torch.cat([gate, up], dim=1)
    same = reference.moe(x, ids, weights, separated, w2, activation=lambda h: reference.swiglu(h, gate="separated"))
    torch.testing.assert_close(same, right)


def test_moe_expert_parallel_parts_add_up():
    x, ids, weights, w13, w2, biases = problem(5, 17)
    mask = torch.tensor([True, False, True, True, False])
    parts = [
        reference.moe(x, ids, weights, w13[m], w2[m], **{k: b[m] for k, b in biases.items()}, expert_mask=m)
        for m in (mask, ~mask)
    ]
    torch.testing.assert_close(sum(parts), reference.moe(x, ids, weights, w13, w2, **biases))


def test_moe_without_tokens_and_with_ids_out_of_range():
    x, ids, weights, w13, w2, _ = problem(6, 0)
    for between in (None, "mxfp8", "mxfp4"):
        assert reference.moe(x, ids, weights, w13, w2, between=between).shape == (0, 64)
    x, ids, weights, w13, w2, biases = problem(6, 4)
    outside = ids.clone()
    outside[1], outside[2] = -1, 99
    y = reference.moe(x, outside, weights, w13, w2, **biases)
    assert y[1:3].eq(0).all()
    torch.testing.assert_close(y[0], reference.moe(x, ids, weights, w13, w2, **biases)[0])


@settings(max_examples=40)
@given(
    seed=seeds,
    tokens=st.integers(0, 70),
    experts=st.integers(1, 9),
    block_m=st.sampled_from([1, 4, 16, 32]),
    masked=st.booleans(),
    data=st.data(),
)
def test_moe_sort_keeps_the_contract(seed, tokens, experts, block_m, masked, data):
    top_k = data.draw(st.integers(1, min(experts, 4)))
    g = generator(seed)
    ids = torch.rand(tokens, experts, generator=g).topk(top_k).indices
    weights = torch.rand(tokens, top_k, generator=g) + 0.5
    mask = torch.rand(experts, generator=g) < 0.5 if masked else torch.ones(experts, dtype=torch.bool)
    result = reference.moe_sort(ids, weights, experts, block_m, mask if masked else None)
    capacity = tokens * top_k + experts * block_m - top_k
    assert len(result.token_ids) == len(result.weights) == len(result.expert_ids) * block_m == -(-capacity // block_m) * block_m
    assert [t.dtype for t in result] == [torch.int32, torch.float32, torch.int32, torch.int32]
    used = result.num_valid.item()
    local = mask.nonzero().flatten().tolist()
    assert used == sum(-(-int((ids == e).sum()) // block_m) * block_m for e in local)
    seen = set()
    for row, entry in enumerate(result.token_ids.tolist()):
        slot, token = entry >> 24, entry & 0xFFFFFF
        expert = result.expert_ids[row // block_m].item()
        if slot == top_k:
            assert token == tokens
            assert result.weights[row] == 0
        else:
            assert ids[token, slot] == local[expert]
            assert result.weights[row] == weights[token, slot]
            seen.add((token, slot))
        assert (expert == -1) == (row >= used)
    assert seen == {(t, s) for t in range(tokens) for s in range(top_k) if mask[ids[t, s]]}


def test_moe_sort_small_case_by_hand():
    ids, weights = torch.tensor([[2, 0], [0, 3]]), torch.tensor([[0.5, 0.25], [0.125, 1.0]])
    result = reference.moe_sort(ids, weights, 4, 2)
    pad, slot1 = 2 << 24 | 2, 1 << 24
    assert result.token_ids.tolist() == [slot1 | 0, 1, 0, pad, slot1 | 1, pad, *[pad] * 4]
    assert result.weights.tolist() == [0.25, 0.125, 0.5, 0, 1.0, 0, 0, 0, 0, 0]
    assert result.expert_ids.tolist() == [0, 2, 3, -1, -1]
    assert result.num_valid.tolist() == [6]
    masked = reference.moe_sort(ids, weights, 4, 2, torch.tensor([False, True, True, True]))
    assert masked.expert_ids.tolist() == [1, 2, -1, -1, -1]  # numbered among the local experts


def test_moe_sort_error():
    with pytest.raises(ValueError, match=r"at most 127 slots and 2 experts; got \(tokens, top_k\) = \(1, 3\)"):
        reference.moe_sort(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3), 2, 16)

"""`attention` and `merge_attention` at their door and on the CPU: values, errors by message, tracing, the launch elsewhere."""

import itertools

import pytest
import torch
from kernels.attention.operands import BF16, E4M3, FP16, check, expected, operands, problem, random_scales

from tilelang_ext import attention, merge_attention, reference
from tilelang_ext.kernels.attention import launch
from tilelang_ext.kernels.attention.arguments import Arguments
from tilelang_ext.launch.device import Target


def test_reference_is_torch_s():
    """Where torch has the function: full, and causal with as many queries as keys."""
    q, k, v, _ = operands(2, 9, 9, 4, 2, 16)
    for causal in (False, True):
        o, lse = reference.attention(q, k, v, 0.3, causal)
        given = (x.double().transpose(1, 2) for x in (q, k, v))
        wanted = torch.nn.functional.scaled_dot_product_attention(*given, is_causal=causal, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(o, wanted.transpose(1, 2))
        assert lse.shape == (2, 4, 9)


def test_masks_by_the_rule():
    """A key is seen where 0 <= position - key, if causal, and below the window; a sink is one more key without a value."""
    S_q, S_k, window = 5, 7, 3
    q, k, v, sinks = operands(1, S_q, S_k, 2, 1, 8)
    o, lse = reference.attention(q, k, v, 0.5, window=window, sinks=sinks)
    for i, h in itertools.product(range(S_q), range(2)):
        position = i + S_k - S_q
        seen = [j for j in range(S_k) if 0 <= position - j < window]
        scores = torch.stack([0.5 * (q[0, i, h].double() @ k[0, j, 0].double()) for j in seen] + [sinks[h].double()])
        weights = torch.softmax(scores, 0)[:-1]
        torch.testing.assert_close(o[0, i, h], weights @ v[0, seen, 0].double())
        torch.testing.assert_close(lse[0, h, i], torch.logsumexp(scores, 0))


@pytest.mark.parametrize(("dtype", "causal", "window", "has_sinks"), [(BF16, True, None, True), (FP16, False, 4, False)])
def test_values(dtype, causal, window, has_sinks):
    """With a batch and with lengths; queries that see no key; every output starts as NaN."""
    q, k, v, sinks = operands(2, 9, 6, 4, 2, 24, dtype)
    options = {"causal": causal, "window": window, "sinks": sinks if has_sinks else None, "softmax_scale": 0.2}
    wanted = reference.attention(q, k, v, 0.2, causal, window, options["sinks"])
    out = torch.full(q.shape, torch.nan, dtype=dtype)
    o, lse = attention(q, k, v, out=out, **options)
    assert o is out
    check(o, lse, *wanted)
    if not has_sinks:
        assert not o[:, :3].any()
        assert (lse[:, :, :3] == -torch.inf).all()
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32) for cu in ([0, 9, 9, 18], [0, 6, 6, 12]))
    o, lse = attention(*(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    check(o.view(q.shape), lse.view(4, 2, 9).transpose(0, 1), *wanted)
    assert isinstance(attention(q, k, v, return_lse=False), torch.Tensor)


def test_values_of_codes():
    """float8_e4m3fn on the CPU: one scale for all and one per head, a scale left out, the dtype of the result."""
    of = problem(16, E4M3)
    q, k, v, _ = operands(2, 5, 7, 4, 2, 16, E4M3)
    q_scale, k_scale, v_scale = random_scales(of, 4, 2)
    wanted = expected(of, q, k, v, None, scales=(q_scale, k_scale, v_scale))
    o, lse = attention(q, k, v, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
    assert o.dtype == BF16
    check(o, lse, *wanted)
    o, lse = attention(q, k, v, q_scale=q_scale, k_scale=k_scale, out=torch.full(q.shape, torch.nan, dtype=FP16))
    check(o, lse, *expected(of, q, k, v, None, scales=(q_scale, k_scale, torch.ones(1))))


def test_merge():
    """Two sets of keys are as good as both at once, also where one has nothing to see; what has no weight may be NaN."""
    q, k, v, _ = operands(2, 7, 12, 2, 2, 16)
    both = reference.attention(q, k, v, 0.25)
    parts = [attention(q, k[:, keys], v[:, keys], softmax_scale=0.25) for keys in (slice(0, 5), slice(5, 12))]
    check(*merge_attention(*parts[0], *parts[1]), *both)
    check(*reference.merge_attention(*parts[0], *parts[1]), *both)
    nothing = torch.full_like(parts[0][0], torch.nan), torch.full_like(parts[0][1], -torch.inf)
    for o, lse in (merge_attention(*parts[0], *nothing), merge_attention(*nothing, *parts[0])):
        assert torch.equal(o, parts[0][0])
        assert torch.equal(lse, parts[0][1])
    o, lse = merge_attention(*nothing, *nothing)
    assert not o.any()
    assert (lse == -torch.inf).all()


def test_torch_compile_and_gradients():
    q, k, v, sinks = operands(1, 5, 5, 2, 1, 16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q, k, v):
        o, lse = attention(q, k, v, causal=True, sinks=sinks)
        return o.float() * 2, lse

    o, lse = compiled(q, k, v)
    check(o / 2, lse, *reference.attention(q, k, v, 0.25, True, sinks=sinks))
    o, lse = attention(q.clone().requires_grad_(), k, v)
    for result in (o, lse):
        with pytest.raises(NotImplementedError, match="attention: has no gradient; got a backward pass"):
            result.sum().backward()


Q, K = torch.zeros(1, 3, 4, 16, dtype=BF16), torch.zeros(1, 5, 2, 16, dtype=BF16)
CU = torch.zeros(2, dtype=torch.int32)
CODES = tuple(x.to(E4M3) for x in (Q, K, K))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (
            (Q.float(), K, K),
            {},
            TypeError,
            "attention: q must be bfloat16, float16 or float8_e4m3fn; got torch.float32; cast it",
        ),
        ((Q, K.half(), K), {}, TypeError, "attention: k must be torch.bfloat16; got torch.float16; cast it"),
        (
            (Q, K, K),
            {"q_scale": torch.ones(1)},
            ValueError,
            "q_scale must be None where q is torch.bfloat16; got a tensor; use",
        ),
        ((Q.to(E4M3), K, K), {}, TypeError, "k must be torch.float8_e4m3fn; got torch.bfloat16; cast it"),
        (
            CODES,
            {"k_scale": torch.ones(4)},
            ValueError,
            r"k_scale must have shape \(1,\) or \(2,\); got \(4,\); pass one or one per",
        ),
        (
            CODES,
            {"out": Q.to(E4M3)},
            TypeError,
            "out must be bfloat16 or float16 where q is torch.float8_e4m3fn; got torch.float8",
        ),
        ((Q[0], K, K), {}, ValueError, r"q must have dimensions \(batch, tokens, heads, head_dim\); got \(3, 4, 16\)"),
        ((Q, K, K[:, :4]), {}, ValueError, r"v must have shape \(1, 5, 2, 16\); got \(1, 4, 2, 16\)"),
        ((Q[:, :, :3], K, K), {}, ValueError, "heads of q must be a multiple of those of k; got 3 and 2"),
        ((Q[..., :12], K[..., :12], K[..., :12]), {}, ValueError, "must be a multiple of 8 up to 512; got 12; pad it"),
        ((Q, K, K), {"window": 0}, ValueError, "attention: window must be at least 1; got 0; pass None"),
        ((Q, K, K), {"softmax_scale": -1.0}, ValueError, "softmax_scale must be positive and finite; got -1.0"),
        ((Q, K, K), {"sinks": torch.zeros(4).half()}, TypeError, "sinks must be torch.float32; got torch.float16"),
        ((Q, K, K), {"sinks": torch.zeros(3)}, ValueError, r"sinks must have shape \(4,\); got \(3,\)"),
        ((Q[0], K[0], K[0]), {"cu_seqlens_q": CU}, ValueError, "cu_seqlens_q and cu_seqlens_k must be given together"),
        (
            (Q, K, K),
            {"cu_seqlens_q": CU, "cu_seqlens_k": CU},
            ValueError,
            r"q must have dimensions \(tokens, heads, head_dim\)",
        ),
        (
            (Q[0], K[0], K[0]),
            {"cu_seqlens_q": CU, "cu_seqlens_k": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            r"cu_seqlens_k must have shape \(sequences \+ 1,\), one for both; got \(3,\)",
        ),
        ((Q, K, K), {"out": torch.zeros(1, 4, 3, 16, dtype=BF16).transpose(1, 2)}, ValueError, "out must be contiguous"),
        ((Q, K.to("meta"), K), {}, ValueError, "attention: k must be on the device of q, cpu; got meta; move it"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        attention(*arguments, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ((0, torch.zeros(1, 3, 2, 8).double()), TypeError, "merge_attention: o must have o's dtype, of 16 bits or float32"),
        ((2, torch.zeros(1, 2, 2, 8)), ValueError, r"other_o must have o's shape, .*; got \(1, 2, 2, 8\); view it"),
        ((1, torch.zeros(1, 2, 3).half()), TypeError, "lse must be float32; got torch.float16; cast it"),
        ((3, torch.zeros(1, 3, 2)), ValueError, r"other_lse must have shape \(1, 2, 3\); got \(1, 3, 2\); transpose it"),
    ],
)
def test_errors_of_merge(change, error, message):
    given = [torch.zeros(1, 3, 2, 8), torch.zeros(1, 2, 3)] * 2
    given[change[0]] = change[1]
    with pytest.raises(error, match=message):
        merge_attention(*given)


def test_kernel_of_a_device():
    """Which file serves a head size on Hopper and elsewhere."""
    given = Arguments(Q, K, K, *[None] * 6, Q, torch.zeros(1, 4, 3))

    def file_of(head_dim, target):
        q = torch.zeros(1, 3, 4, head_dim, dtype=BF16)
        problem = launch.problem_of(given._replace(q=q), 1, 0, 0.5, target)
        return launch.implementation_of(problem).__name__.rpartition(".")[2]

    hopper = Target("cuda", "sm_90a", 132)
    assert [file_of(D, hopper) for D in (8, 64, 256)] == ["sm90_forward"] * 3
    assert file_of(264, hopper) in ("sm90_wide", "tiled")  # tilelang 0.1.14 has no clusters
    for target in (Target("cuda", "sm_80", 108), Target("hip", "gfx942", 304), Target("metal", "", 0)):
        assert file_of(64, target) == "tiled"

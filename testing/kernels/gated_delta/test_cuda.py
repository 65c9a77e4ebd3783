"""The operators of the gated delta rule on an NVIDIA GPU, beside the reference in float64."""

import pytest
import torch
from kernels.gated_delta.operands import PREFILL_TOLERANCE, expected, inputs, poisoned
from numeric import assert_close, measure

from tilelang_ext import ReplayCache, gated_delta_decode, gated_delta_prefill, gated_delta_replay, reference

pytestmark = pytest.mark.cuda
CONTEST = {1: 10, 4: 8, 8: 7, 16: 7, 32: 7, 48: 7, 64: 8}  # workloads of each batch


def on_gpu(given):
    return {name: tensor.cuda() for name, tensor in given.items()}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("state_dtype", "tokens"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 5)])
def test_values(state_dtype, tokens, per_channel):
    """Few and many sequences, in place, into another tensor, and in a CUDA graph."""
    for batch in (1, 7, 40):
        given = on_gpu(inputs(batch, tokens, 2, 6, 64, 96, state_dtype=state_dtype, per_channel=per_channel))
        wanted, states = expected(given, 0.25, l2_norm=True)
        dtype = str(state_dtype).removeprefix("torch.")
        out, new_state = (tensor.cuda() for tensor in poisoned(given))
        gated_delta_decode(**given, scale=0.25, use_qk_l2norm=True, out=out, new_state=new_state)
        assert_close(out, wanted, dtype="bfloat16")
        assert_close(new_state, states[:, -1], dtype=dtype)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gated_delta_decode(**given, scale=0.25, use_qk_l2norm=True, out=out, new_state=new_state)
        out.fill_(torch.nan)
        graph.replay()
        assert_close(out, wanted, dtype="bfloat16")
        gated_delta_decode(**given, scale=0.25, use_qk_l2norm=True, out=out, new_state=given["state"])
        assert_close(given["state"], states[:, -1], dtype=dtype)


def test_pool_with_strides():
    """Slots that lie apart, out of order; q, k and v as parts of one projection."""
    given = on_gpu(inputs(3, 1, 2, 4, 128, 128, slots=5))
    given |= {
        "state": torch.cat([given["state"].flatten(1), torch.zeros(5, 64, device="cuda")], 1)[:, :-64].view(5, 4, 128, 128)
    }
    fused = torch.cat([given[name].flatten(2) for name in "qkv"], 2)
    for name, part in zip("qkv", fused.split([256, 256, 512], 2), strict=True):
        given[name] = part.unflatten(2, given[name].shape[2:])
    before = given["state"].clone()
    indices = torch.tensor([4, -1, 2], dtype=torch.int32, device="cuda")
    wanted, states = expected({**given, "state": before}, 128**-0.5, slots=[4, 0, 2])
    out, _ = gated_delta_decode(**given, state_indices=indices, new_state=given["state"])
    assert_close(out[[0, 2]], wanted[[0, 2]], dtype="bfloat16")
    assert not out[1].any()
    assert_close(given["state"][[4, 2]], states[[0, 2], -1], dtype="float32")
    assert torch.equal(given["state"][[0, 1, 3]], before[[0, 1, 3]])


@pytest.mark.parametrize(("tokens", "per_channel"), [(1, False), (1, True), (3, False)])
def test_replay(tokens, per_channel):
    """Twenty-two tokens: windows fill, states are written, rings wrap."""
    steps, entries = 22 // tokens, 8 + tokens
    of_all = on_gpu(inputs(5, steps * tokens, 2, 4, 128, 64, per_channel=per_channel))
    given = dict(of_all)
    cache = ReplayCache.empty(given["state"], entries, 2, torch.bfloat16, per_channel=per_channel)
    windows = torch.zeros(5, 2, dtype=torch.int32, device="cuda")
    wanted, _ = expected({**of_all, "state": of_all["state"].clone()}, 0.2)
    for step in range(steps):
        part = slice(step * tokens, (step + 1) * tokens)
        given.update({name: of_all[name][:, part] for name in "qkvab"})
        tensors = [given[name] for name in ("q", "k", "v", "state", "A_log", "dt_bias", "a", "b")]
        out = gated_delta_replay(*tensors, windows, cache, scale=0.2)
        assert_close(out, wanted[:, part], dtype="bfloat16")
        windows = cache.next_windows(windows, tokens)


@pytest.mark.parametrize(
    ("sizes", "lengths", "dtype", "state_dtype"),
    [
        ((3, 130, 2, 4, 128, 128), None, torch.bfloat16, torch.float32),
        ((1, 700, 2, 6, 64, 128), [0, 1, 63, 64, 65, 0, 300, 200], torch.float16, torch.float32),
        ((40, 65, 4, 4, 128, 128), None, torch.bfloat16, torch.bfloat16),  # two consumers
        ((1, 100, 1, 2, 32, 48), [3, 90], torch.bfloat16, torch.float32),  # the kernel for every problem
    ],
)
def test_prefill(sizes, lengths, dtype, state_dtype):
    """From zeros, and on in place; tokens past the last sequence, k and v of them NaN, are not touched; in a CUDA graph."""
    given = inputs(*sizes, dtype=dtype, state_dtype=state_dtype, slots=len(lengths or range(sizes[0])))
    given["a"][:, ::2] /= 8
    given, bounds = on_gpu(given), [0, *torch.tensor(lengths or []).cumsum(0).tolist()]
    state, options = given.pop("state"), {"scale": 0.3, "use_qk_l2norm": True}
    flat = dict(given)
    if lengths:
        for name in "kv":
            given[name][:, bounds[-1] :] = torch.nan
        flat |= {name: given[name][0] for name in "qkvab"}
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    out = torch.full_like(flat["v"], torch.nan)
    before = state.clone()
    _, fresh = gated_delta_prefill(**flat, **options, out=torch.full_like(out, torch.nan))
    gated_delta_prefill(**flat, **options, initial_state=state, final_state=state, out=out)
    graph, expected_out, after = torch.cuda.CUDAGraph(), out.clone(), state.clone()
    with torch.cuda.graph(graph):
        gated_delta_prefill(**flat, **options, initial_state=state, final_state=state, out=out)
    state.copy_(before), out.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(out, expected_out, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(state, after, rtol=0, atol=0)
    of_out = PREFILL_TOLERANCE[str(dtype).removeprefix("torch.")]
    of_state = PREFILL_TOLERANCE["bfloat16" if torch.bfloat16 in (dtype, state_dtype) else "float16"]
    for i in range(len(before)):
        batch, at = (slice(0, 1), slice(*bounds[i : i + 2])) if lengths else (slice(i, i + 1), slice(None))
        part = {name: given[name][batch, at] if name in "qkvab" else given[name] for name in given}
        if part["q"].shape[1] == 0:
            assert torch.equal(state[i], before[i])
            continue
        for initial, final in ((before[i : i + 1], state), (torch.zeros_like(before[:1]), fresh)):
            wanted, states = expected({**part, "state": initial}, 0.3, l2_norm=True)
            assert_close(final[i : i + 1], states[:, -1], dtype="float32", **of_state)
            if final is state:
                assert_close(out[None, at] if lengths else out[batch], wanted, dtype="bfloat16", **of_out)
    if lengths:
        assert out[bounds[-1] :].isnan().all()


def test_workloads_of_the_contest():
    """The 54 workloads of `gdn_decode_qk4_v8_d128_k_last`, each with a seed of its own: one unit in the last place and 1e-3."""
    batches = [batch for batch, count in CONTEST.items() for _ in range(count)]
    assert len(batches) == 54
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        given = on_gpu(inputs(batch, 1, 4, 8, 128, 128))
        wanted, states = expected(given, 128**-0.5)
        out, new_state = (tensor.cuda() for tensor in poisoned(given))
        gated_delta_decode(**given, out=out, new_state=new_state)
        ulp = torch.exp2(torch.floor(torch.log2(wanted.abs().clamp(min=1e-30))) - 7)
        assert ((out.double() - wanted).abs() <= ulp + 1e-3).all(), seed
        assert_close(new_state, states[:, -1], dtype="float32", max_error=1e-5)


@pytest.mark.parametrize(("state_dtype", "most"), [(torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_drift_over_a_thousand_steps(state_dtype, most):
    """The largest error of a state after 1,000 steps, over its root mean square; printed for docs/log/gated_delta.md."""
    given = on_gpu(inputs(4, 1, 2, 4, 128, 128, state_dtype=state_dtype))
    exact = given["state"].double()
    for _ in range(1000):
        for name in "qkvab":
            given[name].copy_(torch.randn_like(given[name]) * (128**-0.5 if name == "k" else 3.0))
        exact = reference.gated_delta(**{**given, "state": exact}, scale=1.0)[1][:, -1]
        gated_delta_decode(**given, scale=1.0, new_state=given["state"])
    error = measure(given["state"], exact)
    print(f"{state_dtype}: max {error.max:.1e}, RMS {error.rms:.1e}")
    assert error.max < most

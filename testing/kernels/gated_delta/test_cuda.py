"""`gated_delta_decode` and `gated_delta_replay` on an NVIDIA GPU, beside the reference in float64."""

import pytest
import torch
from kernels.gated_delta.operands import expected, inputs, poisoned
from numeric import assert_close, measure

from tilelang_ext import ReplayCache, gated_delta_decode, gated_delta_replay, reference

pytestmark = pytest.mark.cuda


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

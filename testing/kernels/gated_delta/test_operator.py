"""`gated_delta_decode` as a torch function: values on the CPU, which states are kept, and what it refuses."""

import pytest
import torch
from kernels.gated_delta.operands import expected, inputs, poisoned
from numeric import assert_close

from tilelang_ext import ReplayCache, gated_delta_decode, gated_delta_replay

SIZES = 3, 2, 2, 4, 32, 8


def test_reference_is_the_recurrence():
    """By hand, for one head of one sequence, with loops."""
    given = inputs(1, 2, 1, 1, 32, 4)
    S = given["state"][0, 0].double()
    for t in range(2):
        q, k, v = (given[name][0, t, 0].double() for name in ("q", "k", "v"))
        x = given["a"][0, t, 0].double() + given["dt_bias"][0].double()
        S = S * torch.exp(-torch.exp(given["A_log"][0].double()) * torch.log1p(torch.exp(x)))
        beta = 1 / (1 + torch.exp(-given["b"][0, t, 0].double()))
        S = S + beta * torch.outer(v - S @ k, k)
        out, states = expected(given, 0.5)
        torch.testing.assert_close(out[0, t, 0], 0.5 * S @ q)
        torch.testing.assert_close(states[0, t, 0], S)


def test_new_state_and_default_scale():
    given = inputs(*SIZES)
    out, new_state = gated_delta_decode(**given)
    wanted, states = expected(given, 32**-0.5)
    assert_close(out, wanted, dtype="bfloat16")
    assert_close(new_state, states[:, -1], dtype="float32")


def test_in_place_and_each_token():
    given = inputs(*SIZES, per_channel=True)
    _, states = expected(given, 0.25, l2_norm=True)
    out, every = poisoned(given, each_token=True)
    results = gated_delta_decode(**given, scale=0.25, use_qk_l2norm=True, out=out, new_state=every)
    assert results[0] is out
    assert results[1] is every
    assert_close(every, states, dtype="float32")
    state = given["state"]
    _, same = gated_delta_decode(**given, scale=0.25, use_qk_l2norm=True, new_state=state)
    assert same is state
    assert_close(state, states[:, -1], dtype="float32")


def test_pool_of_states():
    given = inputs(*SIZES, slots=6)
    before = given["state"].clone()
    indices, accepted = (torch.tensor(values, dtype=torch.int32) for values in ([4, -1, 2], [2, 1, 0]))
    wanted, states = expected({**given, "state": before}, 1.0, slots=[4, 0, 2], accepted=[2, 1, 0])
    out, _ = gated_delta_decode(**given, scale=1.0, state_indices=indices, num_accepted=accepted, new_state=given["state"])
    assert_close(out[[0, 2]], wanted[[0, 2]], dtype="bfloat16")
    assert not out[1].any()
    assert_close(given["state"][4], states[0], dtype="float32")
    assert torch.equal(given["state"][[0, 1, 2, 3, 5]], before[[0, 1, 2, 3, 5]])


def test_no_sequences():
    given = inputs(0, 1, 1, 1, 32, 4)
    out, new_state = gated_delta_decode(**given)
    assert [out.shape, new_state.shape] == [(0, 1, 1, 4), (0, 1, 4, 32)]


def test_fake_tensors_and_schemas():
    given = inputs(*SIZES)
    out, new_state = poisoned(given)
    ops = torch.ops.tilelang_ext
    tensors = (*given.values(), None, None, 0.25, 0)
    torch.library.opcheck(ops.gated_delta_decode_out, (*tensors, out, new_state), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(ops.gated_delta_decode_, (*tensors, out), test_utils=("test_schema", "test_faketensor"))
    cache = ReplayCache.empty(given["state"], 6, 2, torch.bfloat16)
    windows = torch.zeros(3, 2, dtype=torch.int32)
    torch.library.opcheck(
        ops.gated_delta_replay,
        (*given.values(), None, windows, *(ring.zero_() for ring in cache), 0.25, 0, out),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_backward_is_refused():
    given = inputs(*SIZES)
    given["v"].requires_grad_()
    out, _ = gated_delta_decode(**given)
    with pytest.raises(NotImplementedError, match="gated_delta_decode: has no gradient"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": lambda t: t[:, 0]}, ValueError, r"q must have 4 dimensions, .*; got \(3, 2, 32\); add the one of tokens"),
        ({"k": lambda t: t[:, :1]}, ValueError, r"k must have shape \(3, 2, 2, 32\); got \(3, 1, 2, 32\)"),
        ({"state": lambda t: t.transpose(2, 3)}, ValueError, r"state must have shape \(3, 4, 8, 32\); got \(3, 4, 32, 8\)"),
        ({"state": lambda t: t.half()}, TypeError, "state must be float32 or bfloat16; got torch.float16; cast it"),
        ({"q": lambda t: t.float()}, TypeError, "q must be bfloat16 or float16; got torch.float32"),
        ({"b": lambda t: t.float()}, TypeError, "b must be torch.bfloat16; got torch.float32"),
        ({"dt_bias": lambda t: t.bfloat16()}, TypeError, "dt_bias must be torch.float32; got torch.bfloat16"),
        ({"q": lambda t: t[..., :24], "k": lambda t: t[..., :24]}, ValueError, "K, the last dimension of q, must be one of"),
        ({"v": lambda t: t[..., :3]}, ValueError, "V, the last dimension of v, must be a multiple of 4; got 3"),
        ({"v": lambda t: t[:, :, :3]}, ValueError, "heads of v must be a multiple of those of q; got 3 and 2"),
        ({"q": lambda t: t.repeat(1, 5, 1, 1)}, ValueError, "tokens must be 1 to 8; got 10"),
        ({"a": lambda t: t.to("meta")}, ValueError, "a must be on the device of q, cpu; got meta"),
    ],
)
def test_what_is_refused(change, error, message):
    given = inputs(*SIZES)
    for name, of in change.items():
        given[name] = of(given[name])
    with pytest.raises(error, match=f"gated_delta_decode: {message}"):
        gated_delta_decode(**given)


def test_refused_states():
    given = inputs(*SIZES)
    indices = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="new_state must be given with state_indices; got None"):
        gated_delta_decode(**given, state_indices=indices)
    with pytest.raises(ValueError, match="num_accepted must be None where new_state keeps every token's state"):
        gated_delta_decode(**given, num_accepted=indices, new_state=poisoned(given, each_token=True)[1])
    turned = torch.empty(3, 4, 32, 8).transpose(2, 3)
    with pytest.raises(ValueError, match="new_state must be contiguous but for its first dimension"):
        gated_delta_decode(**given, new_state=turned)


def replay(given, cache, windows, **options):
    tensors = {name: given[name] for name in ("q", "k", "v", "state", "A_log", "dt_bias", "a", "b")}
    return gated_delta_replay(*tensors.values(), windows, cache, **options)


@pytest.mark.parametrize("options", [{}, {"per_channel": True}])
def test_replay(options):
    """Steps of two tokens, of which sequences accept another number; the state is written when the window is full."""
    steps, batch, entries = 7, 2, 8
    given = inputs(batch, 2, 1, 2, 32, 4, slots=3, **options)
    cache = ReplayCache.empty(given["state"], entries, 1, torch.bfloat16, per_channel="per_channel" in options)
    indices = torch.tensor([2, 0], dtype=torch.int32)
    windows = torch.zeros(batch, 2, dtype=torch.int32)
    initial, history = given["state"].clone(), [[], []]
    for step in range(steps):
        accepted = torch.tensor([step % 3, (step + 1) % 3], dtype=torch.int32)
        fresh = inputs(batch, 2, 1, 2, 32, 4, **options)
        given.update({name: fresh[name] for name in "qkvab"})
        out = replay(given, cache, windows, scale=0.5, state_indices=indices, use_qk_l2norm=True)
        windows = cache.next_windows(windows, 2, accepted)
        assert windows[:, 1].max() <= entries - 2
        for i in range(batch):
            tokens = [{name: given[name][i] for name in "qkvab"}]
            of_all = {name: torch.cat([part[name] for part in (*history[i], *tokens)])[None] for name in "qkvab"}
            of_all |= {"state": initial[indices[i].item()][None], "A_log": given["A_log"], "dt_bias": given["dt_bias"]}
            wanted, _ = expected(of_all, 0.5, l2_norm=True)
            assert_close(out[i], wanted[0, -2:], dtype="bfloat16")
            history[i].append({name: given[name][i, : accepted[i]] for name in "qkvab"})
    assert not torch.equal(given["state"][0], initial[0])
    assert torch.equal(given["state"][1], initial[1])


def test_replay_refuses():
    given = inputs(*SIZES)
    windows = torch.zeros(3, 2, dtype=torch.int32)
    cache = ReplayCache.empty(given["state"], 6, 2, torch.bfloat16)
    with pytest.raises(ValueError, match="gated_delta_replay: rings must have more entries than there are tokens, 2; got 2"):
        replay(given, ReplayCache(*(ring[:, :2] for ring in cache)), windows)
    with pytest.raises(ValueError, match=r"gated_delta_replay: decay_ring must have shape \(3, 6, 4\); got \(3, 6, 4, 1\)"):
        replay(given, cache._replace(decay=cache.decay[..., None]), windows)
    with pytest.raises(TypeError, match=r"gated_delta_replay: windows must be torch\.int32; got torch\.int64"):
        replay(given, cache, windows.long())

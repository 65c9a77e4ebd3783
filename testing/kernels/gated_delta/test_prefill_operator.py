"""`gated_delta_prefill` as a torch function: values on the CPU, states, what it refuses, and the launches of its plan."""

import pytest
import torch
from kernels.gated_delta.operands import inputs
from launch.fakes import FakeCuda, compile_without_nvcc
from numeric import assert_close

from tilelang_ext import gated_delta_prefill, reference
from tilelang_ext.kernels.gated_delta import prefill_launch, prefill_operator
from tilelang_ext.launch.device import Target

SIZES = 2, 5, 2, 4, 32, 16  # batch, tokens, qk_heads, heads, K, V
BOUNDS = [0, 3, 3, 5]


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on cuda:0."""

    is_cuda = True
    device = torch.device("cuda", 0)


def operands(*sizes, **options):
    """What `gated_delta_prefill` takes, and an initial state."""
    given = inputs(*sizes, **options)
    return given, given.pop("state")


def wanted(given, state, scale=32**-0.5, l2_norm=False):
    out, states = reference.gated_delta(**given, state=state, scale=scale, l2_norm=l2_norm)
    return out, states[:, -1]


def check(got, expected):
    assert_close(got[0], expected[0], dtype="bfloat16")
    assert_close(got[1], expected[1], dtype=str(got[1].dtype).removeprefix("torch."))


def test_states():
    """None, an initial one, one in place, one given; float32 and bfloat16."""
    given, state = operands(*SIZES, state_dtype=torch.bfloat16)
    fresh = gated_delta_prefill(**given)
    check(fresh, wanted(given, torch.zeros(2, 4, 16, 32)))
    assert fresh[1].dtype == torch.float32
    options = {"scale": 0.25, "use_qk_l2norm": True}
    expected = wanted(given, state, 0.25, True)
    before = state.clone()
    results = [torch.full_like(tensor, torch.nan) for tensor in (given["v"], state)]
    got = gated_delta_prefill(**given, initial_state=state, out=results[0], final_state=results[1], **options)
    assert all(x is y for x, y in zip(got, results, strict=True))
    check(got, expected)
    assert torch.equal(state, before)
    got = gated_delta_prefill(**given, initial_state=state, final_state=state, **options)
    assert got[1] is state
    check(got, expected)


def test_sequences():
    """One without tokens keeps its state; tokens past the last sequence are left as they were."""
    given, _ = operands(1, 7, 2, 4, 32, 16)
    of_tokens = {name: tensor[0] if name in "qkvab" else tensor for name, tensor in given.items()}
    state, cu_seqlens = torch.randn(3, 4, 16, 32), torch.tensor(BOUNDS, dtype=torch.int32)
    out = torch.full_like(of_tokens["v"], torch.nan)
    _, final = gated_delta_prefill(**of_tokens, initial_state=state, cu_seqlens=cu_seqlens, out=out)
    for i in (0, 2):
        of = slice(BOUNDS[i], BOUNDS[i + 1])
        part = {name: tensor[:, of] if name in "qkvab" else tensor for name, tensor in given.items()}
        check((out[None, of], final[i : i + 1]), wanted(part, state[i : i + 1]))
    assert torch.equal(final[1], state[1])
    assert out[BOUNDS[-1] :].isnan().all()
    assert gated_delta_prefill(**of_tokens, cu_seqlens=cu_seqlens[:1])[1].shape == (0, 4, 16, 32)


def test_no_tokens():
    given, state = operands(2, 0, 2, 4, 32, 16)
    assert not gated_delta_prefill(**given)[1].any()
    assert torch.equal(gated_delta_prefill(**given, initial_state=state)[1], state)
    assert gated_delta_prefill(**given, initial_state=state, final_state=state)[1] is state


def test_fake_tensors_and_schemas():
    given, state = operands(*SIZES)
    out, ops = torch.empty_like(given["v"]), torch.ops.tilelang_ext
    tests = ("test_schema", "test_faketensor")
    tensors = (*given.values(), state, None, 0.25, 0, out)
    torch.library.opcheck(ops.gated_delta_prefill_out, (*tensors, torch.empty_like(state)), test_utils=tests)
    torch.library.opcheck(ops.gated_delta_prefill_, tensors, test_utils=tests)


def test_backward_is_refused():
    given, _ = operands(*SIZES)
    given["k"].requires_grad_()
    for result in gated_delta_prefill(**given):
        with pytest.raises(NotImplementedError, match="gated_delta_prefill: has no gradient"):
            result.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": lambda t: t[0]}, ValueError, r"q must have dimensions \(batch, tokens, qk_heads, K\); got \(5, 2, 32\)"),
        ({"k": lambda t: t[:, :1]}, ValueError, r"k must have shape \(2, 5, 2, 32\); got \(2, 1, 2, 32\)"),
        ({"q": lambda t: t.float()}, TypeError, "q must be bfloat16 or float16; got torch.float32"),
        ({"v": lambda t: t.half()}, TypeError, "v must be torch.bfloat16; got torch.float16"),
        ({"q": lambda t: t[..., :24]}, ValueError, r"K, the last dimension of q, must be one of \(32, 64, 128\); got 24"),
        ({"v": lambda t: t[..., :8]}, ValueError, "V, the last dimension of v, must be a multiple of 16; got 8"),
        ({"v": lambda t: t[:, :, :3]}, ValueError, "heads of v must be a multiple of those of q; got 3 and 2"),
        ({"dt_bias": lambda t: t[:, None].repeat(1, 32)}, ValueError, "a and dt_bias must have a gate per head"),
        ({"initial_state": lambda t: t.half()}, TypeError, "initial_state must be float32 or bfloat16; got torch.float16"),
        ({"initial_state": lambda t: t[:1]}, ValueError, r"initial_state must have shape \(2, 4, 16, 32\); got \(1, 4,"),
        ({"a": lambda t: t.to("meta")}, ValueError, "a must be on the device of q, cpu; got meta"),
    ],
)
def test_what_is_refused(change, error, message):
    given, state = operands(*SIZES)
    given["initial_state"] = state
    for name, of in change.items():
        given[name] = of(given[name])
    with pytest.raises(error, match=f"gated_delta_prefill: {message}"):
        gated_delta_prefill(**given)


def test_refused_results():
    given, state = operands(*SIZES)
    transposed = torch.empty(2, 4, 32, 16).transpose(2, 3)
    with pytest.raises(ValueError, match="final_state must be contiguous; got strides"):
        gated_delta_prefill(**given, final_state=transposed)
    with pytest.raises(TypeError, match=r"final_state must be torch\.float32; got torch\.bfloat16"):
        gated_delta_prefill(**given, initial_state=state, final_state=state.bfloat16())
    with pytest.raises(ValueError, match=r"cu_seqlens must have shape \(sequences \+ 1,\)"):
        gated_delta_prefill(*(given[n][0] for n in "qkv"), *(given[n] for n in ("A_log", "dt_bias")),
                            *(given[n][0] for n in "ab"), cu_seqlens=torch.zeros(1, 2, dtype=torch.int32))  # fmt: skip


def test_plan(monkeypatch):
    """Two launches, with every tensor's address; another number of tokens compiles nothing; slices are copied."""
    cuda = FakeCuda()
    compile_without_nvcc(monkeypatch)
    plan = cuda.launcher.plan(prefill_launch.RECIPE)
    monkeypatch.setattr(prefill_launch, "plan", lambda: plan)
    monkeypatch.setattr(prefill_launch, "target_of", lambda name, device: Target("cuda", "sm_90a", 132))
    unused = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 4, 64, 64)
    monkeypatch.setattr(prefill_launch, "_unused", lambda device, problem: unused)
    for count, tokens in ((1, 70), (2, 200)):
        given, state = operands(3, tokens, 2, 4, 64, 64)
        out = torch.empty_like(given["v"])
        call = [x.as_subclass(OnCuda) for x in (*given.values(), state, out)]
        prefill_operator._in_place(*call[:8], None, 0.25, 0, call[8])
        assert len(cuda.launches()) == 2 * count
        assert len(cuda.lines("load")) == 2
        solve, scan = cuda.launches()[-2:]
        slots = 3 * -(-tokens // 64) * 4
        assert solve.grid[0] == slots
        assert {x.data_ptr() for x in call[:2]} <= set(solve.parameters)
        assert {x.data_ptr() for x in call[7:]} <= set(scan.parameters)
        assert scan.block[0] == 256  # a producer and one consumer, since all blocks run at once
    call[1] = call[1].repeat(1, 1, 1, 2)[..., :64]
    prefill_operator._in_place(*call[:8], None, 0.25, 0, call[8])
    assert call[1].data_ptr() not in cuda.launches()[-2].parameters

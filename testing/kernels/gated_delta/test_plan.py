"""The plan of `gated_delta_decode` on a driver that writes down its launches: who shares a kernel, and its parameters."""

import pytest
import torch
from kernels.gated_delta.operands import inputs, poisoned
from launch.fakes import FakeCuda, compile_without_nvcc

from tilelang_ext.kernels.gated_delta import launch as launches
from tilelang_ext.kernels.gated_delta import operator
from tilelang_ext.kernels.gated_delta.arguments import Arguments, ReplayArguments
from tilelang_ext.launch.device import Target

PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
SIZES = {"tokens": 1, "qk_heads": 2, "heads": 4, "K": 128, "V": 64}


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on cuda:0."""

    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch):
    """The fake driver, and an operator whose plan launches there."""
    cuda = FakeCuda()
    compile_without_nvcc(monkeypatch)
    plans = {kind: cuda.launcher.plan(launches.recipe(kind)) for kind in (Arguments, ReplayArguments)}
    monkeypatch.setattr(launches, "plan", plans.get)
    monkeypatch.setattr(launches, "target_of", lambda name, device: Target("cuda", "sm_90a", 132))
    monkeypatch.setattr(launches, "_unused", lambda device: torch.zeros(1, dtype=torch.int32))
    return cuda


def arguments(given, indices=None, accepted=None, each_token=False, in_place=False):
    """Arguments of `gated_delta_decode_out`, and the tensors among them by name."""
    out, new_state = poisoned(given, each_token=each_token)
    numbers = [None if values is None else torch.tensor(values, dtype=torch.int32) for values in (indices, accepted)]
    tensors = [*given.values(), *numbers, out, None if in_place else new_state]
    *tensors, out, new_state = [None if x is None else x.as_subclass(OnCuda) for x in tensors]
    return (*tensors, 0.25, 0, out, new_state)


def addresses(call):
    return {x.data_ptr() for x in call if isinstance(x, torch.Tensor)}


def test_parameters(cuda):
    """Every tensor's address, and the strides of slots and sequences; a second call compiles nothing."""
    given = inputs(2, **SIZES)
    call = arguments(given)
    for count in (1, 2):
        operator._out(*call)
        assert len(cuda.launches()) == count
    done = cuda.launches()[0]
    assert done == cuda.launches()[1]
    assert addresses(call) <= set(done.parameters)
    assert given["state"].stride(0) in done.parameters
    assert len(cuda.lines("load")) == 1
    assert 1 in done.attributes.get(PROGRAMMATIC_STREAM_SERIALIZATION, ())


def test_batches_share_a_kernel_until_another_configuration(cuda):
    """Grids follow the batch: a block has 8 rows per warp here, in two warps or in four."""
    for batch, warps, variants in [(1, 2, 1), (24, 2, 1), (25, 4, 2), (49, 4, 2)]:
        operator._out(*arguments(inputs(batch, **SIZES)))
        done = cuda.launches()[-1]
        assert done.grid[0] == batch * 4 * 64 // (warps * 8)
        assert done.block[0] == warps * 32
        assert len(cuda.lines("load")) == variants


def test_slices_are_read_where_they_are(cuda):
    """q, k and v as parts of one projection, and a pool whose slots lie apart."""
    given = inputs(2, **SIZES, slots=3)
    fused = torch.cat([given[name].flatten(2) for name in "qkv"], 2)
    for name, part in zip("qkv", fused.split([256, 256, 256], 2), strict=True):
        given[name] = part.unflatten(2, given[name].shape[2:])
    pool = torch.zeros(3, 4 * 64 * 128 + 64)
    given["state"] = pool[:, : 4 * 64 * 128].unflatten(1, (4, 64, 128))
    call = arguments(given, indices=[2, 0], in_place=True)
    operator._out(*call)
    done = cuda.launches()[-1]
    assert addresses(call) <= set(done.parameters)
    assert {pool.stride(0), fused.stride(0)} <= set(done.parameters)


def test_misaligned_inputs_are_copied(cuda):
    given = inputs(2, **SIZES)
    wide = torch.zeros(2, 1, 2, 132, dtype=torch.bfloat16)
    given["q"] = wide[..., :128]
    given["v"] = torch.zeros(2 * 4 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 1, 4, 64)
    call = arguments(given)
    operator._out(*call)
    parameters = set(cuda.launches()[-1].parameters)
    assert not {call[0].data_ptr(), call[2].data_ptr()} & parameters
    assert {call[1].data_ptr(), call[3].data_ptr()} <= parameters


@pytest.mark.parametrize("each_token", [False, True])
def test_several_tokens(cuda, each_token):
    given = inputs(2, **{**SIZES, "tokens": 3})
    call = arguments(given, accepted=None if each_token else [1, 2], each_token=each_token)
    operator._out(*call)
    assert addresses(call) <= set(cuda.launches()[-1].parameters)


def test_replay(cuda):
    """Every tensor's address, with and without a pool's indices."""
    given = inputs(2, **SIZES)
    cache = operator.ReplayCache.empty(given["state"], 9, 2, torch.bfloat16)
    windows, out = torch.zeros(2, 2, dtype=torch.int32), poisoned(given)[0]
    for indices in (None, torch.tensor([1, 0], dtype=torch.int32)):
        tensors = (*given.values(), indices, windows, *cache)
        call = *(None if x is None else x.as_subclass(OnCuda) for x in tensors), 0.5, 0, out.as_subclass(OnCuda)
        operator._replay(*call)
        assert addresses(call) <= set(cuda.launches()[-1].parameters)
    assert len(cuda.lines("load")) == 2

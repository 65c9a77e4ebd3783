"""The kernel of `gated_delta_decode` from its Metal and HIP texts, in the simulator, beside the reference in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernels.gated_delta.operands import expected, inputs, poisoned
from numeric import assert_close

from tilelang_ext import metal, simulate
from tilelang_ext.kernels.gated_delta.config import MAX_WEIGHED, Config, pick_config
from tilelang_ext.kernels.gated_delta.decode import decode
from tilelang_ext.kernels.gated_delta.problem import Problem
from tilelang_ext.kernels.gated_delta.rows import PASS_CONFIGS
from tilelang_ext.launch import recipe
from tilelang_ext.launch.expression import recipe_of
from tilelang_ext.rocm import program as rocm

SCALE = 0.125
UNUSED = torch.zeros(1, dtype=torch.int32)


def problem(given, **options):
    _, tokens, qk_heads, K = given["q"].shape
    heads, V = given["v"].shape[2:]
    names = {name: str(given[name].dtype).removeprefix("torch.") for name in ("q", "state")}
    return Problem(
        target_kind="metal",
        num_sms=0,
        tokens=tokens,
        qk_heads=qk_heads,
        heads=heads,
        K=K,
        V=V,
        dtype=names["q"],
        state_dtype=names["state"],
        scale=SCALE,
        per_channel=given["a"].dim() == 4,
        **options,
    )


def run(target, given, config, indices=None, accepted=None, **options):
    """Return out and new_state, or with `in_place` the state that the kernel has changed."""
    of = problem(given, has_indices=indices is not None, has_accepted=accepted is not None, **options)
    prim_func = decode(of, config)
    program = metal.lower(prim_func) if target == "metal" else rocm.lower(prim_func, target)
    out, new_state = poisoned(given, each_token=of.each_token)
    state = given["state"].clone()
    numbers = [UNUSED if values is None else torch.tensor(values, dtype=torch.int32) for values in (indices, accepted)]
    tensors = {**given, "state": state}.values()
    target_state = new_state.flatten(0, 1) if of.each_token else new_state
    report = simulate(program, *tensors, *numbers, out, target_state, target=target, check=True, timeout=300)
    assert not report.findings, str(report)
    return out, state if of.in_place else new_state


def check(given, got, wanted):
    for tensor, reference, name in zip(got, wanted, ("out", "state"), strict=True):
        dtype = str(tensor.dtype).removeprefix("torch.")
        assert_close(tensor, reference, dtype=dtype), name


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx942", "hip -mcpu=gfx1100"])
def test_one_token(target):
    given = inputs(3, 1, 2, 4, 128, 16)
    out, states = expected(given, SCALE)
    check(given, run(target, given, Config(2, 4)), (out, states[:, -1]))


@pytest.mark.parametrize(
    ("sizes", "config", "options", "dtypes"),
    [
        ((2, 1, 1, 3, 32, 20), Config(1, 4), {}, {"dtype": torch.float16}),
        ((1, 1, 2, 2, 256, 8), Config(2, 4, 16), {"in_place": True}, {}),
        ((2, 1, 2, 4, 64, 16), Config(4, 4), {"l2_norm": True}, {"state_dtype": torch.bfloat16}),
        ((2, 3, 1, 2, 128, 8), Config(2, 4), {"each_token": True}, {"per_channel": True}),
    ],
)
def test_sizes_types_and_states(sizes, config, options, dtypes):
    given = inputs(*sizes, **dtypes)
    out, states = expected(given, SCALE, l2_norm=options.get("l2_norm", False))
    check(given, run("metal", given, config, **options), (out, states if "each_token" in options else states[:, -1]))


def test_pool_of_states():
    """Slots out of order; an index below 0 is no sequence, one past the pool gives NaN, and no other slot is touched."""
    given = inputs(4, 2, 1, 2, 32, 8, slots=5)
    indices, accepted = [3, -1, 0, 5], [1, 2, 0, 2]
    out, new_state = run("metal", given, Config(1, 4), indices, accepted)
    here = {name: given[name] if name in ("A_log", "dt_bias", "state") else given[name][[0, 2]] for name in given}
    wanted_out, wanted_states = expected(here, SCALE, slots=[3, 0], accepted=[1, 0])
    check(given, (out[[0, 2]], new_state[[3, 0]]), (wanted_out, wanted_states))
    assert not out[1].any()
    assert out[3].isnan().all()
    assert new_state[[1, 2, 4]].isnan().all()
    changed = run("metal", given, Config(1, 4), indices, accepted, in_place=True)[1]
    check(given, (out[[0, 2]], changed[[3]]), (wanted_out, wanted_states[:1]))
    np.testing.assert_array_equal(changed[[0, 1, 2, 4]].numpy(), given["state"][[0, 1, 2, 4]].numpy())


def test_state_is_read_and_written_once():
    given = inputs(1, 1, 2, 4, 128, 32)
    of = problem(given)
    out, new_state = poisoned(given)
    report = simulate(metal.lower(decode(of, Config(4, 8))), *given.values(), UNUSED, UNUSED, out, new_state)
    state_bytes = given["state"].nbytes
    assert report.counts.device_bytes_written == state_bytes + out.nbytes
    beside_state = report.counts.device_bytes_read - state_bytes
    assert 0 <= beside_state <= 4 * 4 * (2 * 2 * 128 + 32 * 2 * 32)  # q and k by each warp, v by each lane


@pytest.mark.parametrize("options", [{}, {"in_place": True}, {"limit": 8}, {"limit": 64}, {"state_dtype": "bfloat16"}])
@pytest.mark.parametrize(("heads", "K", "V", "tokens"), [(8, 128, 128, 1), (3, 512, 20, 1), (32, 128, 128, 8), (1, 32, 4, 2)])
def test_configurations_cover_all_rows(heads, K, V, tokens, options):
    of = Problem("cuda", 132, tokens, 1, heads, K, V, "bfloat16", **{"state_dtype": "float32", **options})
    for batch in (1, 2, 8, 64, 1000):
        config = pick_config(of, batch)
        assert min(config.rows_per_lane, config.warps, config.turns) >= 1
        assert V % (config.rows * config.warps * config.turns) == 0
        assert config.rows % config.groups == 0
        if of.limit:
            assert 2 * config.rows_per_lane <= config.lanes
            assert config.turns == 1 or of.limit <= min(config.lanes, MAX_WEIGHED)


def test_blocks_per_sm():
    """Few sequences: shared memory for six blocks; in place and with many sequences none. Text for Hopper alone."""
    of = Problem("cuda", 132, 1, 1, 2, 32, 128, "bfloat16", "float32")
    few, many = pick_config(of, 1), pick_config(of, 4096)
    assert (few.max_blocks_per_sm, many.max_blocks_per_sm) == (6, 0)
    assert pick_config(replace(of, in_place=True), 1).max_blocks_per_sm == 0
    assert pick_config(replace(of, target_kind="hip"), 1).max_blocks_per_sm == 0
    lowered = recipe.lower(decode(of, few), "sm_90a", PASS_CONFIGS)
    assert [step["shared_bytes"] for step in lowered.variant["steps"]] == [recipe_of(228 * 1024 // 6 - 1024)]

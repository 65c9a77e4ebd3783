"""The replay kernel over many steps in the simulator, beside the recurrence in float64 over all tokens."""

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.kernels import lower
from kernels.attention.operands import FUNCTIONS
from kernels.gated_delta.operands import expected, inputs
from kernels.hopper import execute
from numeric import assert_close

from tilelang_ext import ReplayCache, gated_delta_replay, metal, simulate
from tilelang_ext.kernels.gated_delta.config import MMA_LANES, Config
from tilelang_ext.kernels.gated_delta.prefill_problem import HOPPER
from tilelang_ext.kernels.gated_delta.problem import Problem
from tilelang_ext.kernels.gated_delta.replay import replay
from tilelang_ext.kernels.gated_delta.rows import PASS_CONFIGS
from tilelang_ext.rocm import program as rocm

SCALE, LIMIT = 0.2, 4
UNUSED = torch.zeros(1, dtype=torch.int32)


class Replay:
    """A pool of states and rings on one target; poisoned where nothing was written."""

    def __init__(self, target, batch, tokens, qk_heads, heads, K, V, per_channel=False, l2_norm=False, turns=1):
        sizes = {"tokens": tokens, "qk_heads": qk_heads, "heads": heads, "K": K, "V": V}
        dtypes = {"dtype": "bfloat16", "state_dtype": "float32"}
        options = {"per_channel": per_channel, "l2_norm": l2_norm, "scale": SCALE, "limit": LIMIT}
        problem = Problem("metal", 0, **sizes, **dtypes, **options)
        prim_func = replay(problem, Config(1, 4, turns=turns))
        self.target = target
        self.program = metal.lower(prim_func) if target == "metal" else rocm.lower(prim_func, target)
        nan = torch.nan
        self.k = torch.full((batch, problem.ring, qk_heads, K), nan, dtype=torch.bfloat16)
        self.r = torch.full((batch, problem.ring, heads, V), nan)
        self.decay = torch.full((batch, problem.ring, heads, *([K] if per_channel else [])), nan)
        self.windows = torch.zeros(batch, 2, dtype=torch.int32)
        self.tokens, self.ring, self.limit = tokens, problem.ring, LIMIT

    def launch(self, given, out):
        tensors = *given.values(), UNUSED, self.windows, self.k, self.r, self.decay, out
        report = simulate(self.program, *tensors, target=self.target, check=True, timeout=300)
        assert not report.findings, str(report)

    def step(self, given, accepted):
        """Compute the tokens of each sequence, and move the windows past the accepted ones."""
        out = torch.full(given["v"].shape, torch.nan, dtype=torch.bfloat16)
        self.launch(given, out)
        first, count = self.windows.T
        is_written = count + self.tokens > self.limit
        first, count = torch.where(is_written, (first + count) % self.ring, first), torch.where(is_written, 0, count)
        self.windows = torch.stack([first, count + torch.tensor(accepted)], 1).int()
        return out


@pytest.mark.parametrize(
    ("target", "sizes", "options"),
    [
        ("metal", (2, 1, 2, 4, 64, 8), {"turns": 2}),
        ("metal", (2, 1, 1, 2, 32, 4), {"per_channel": True, "l2_norm": True}),
        ("hip -mcpu=gfx942", (1, 1, 1, 2, 64, 8), {}),
    ],
)
def test_decode(target, sizes, options):
    """Eleven steps: the window fills, the state is written twice, and the ring wraps."""
    steps = 11
    batch, _, *rest = sizes
    of_all = inputs(batch, steps, *rest, per_channel=options.get("per_channel", False))
    wanted, _ = expected(of_all, SCALE, l2_norm=options.get("l2_norm", False))
    kept = Replay(target, *sizes, **options)
    given = dict(of_all)
    before = given["state"].clone()
    written = []
    for t in range(steps):
        given.update({name: of_all[name][:, t : t + 1].contiguous() for name in "qkvab"})
        out = kept.step(given, [1] * batch)
        assert_close(out[:, 0], wanted[:, t], dtype="bfloat16")
        written.append(not torch.equal(given["state"], before))
        before = given["state"].clone()
    assert [t for t in range(steps) if written[t]] == [4, 8]


def test_verify_keeps_accepted_tokens_alone():
    """Three tokens a step, of which each sequence accepts another number; rejected entries are overwritten."""
    given = inputs(2, 3, 1, 2, 32, 4)
    kept = Replay("metal", 2, 3, 1, 2, 32, 4)
    history = {name: [[] for _ in range(2)] for name in "qkvab"}
    initial = given["state"].clone()
    for accepted in ([1, 3], [2, 1], [3, 0], [1, 2], [2, 3]):
        fresh = inputs(2, 3, 1, 2, 32, 4)
        given.update({name: fresh[name] for name in "qkvab"})
        out = kept.step(given, accepted)
        for i in range(2):
            of_all = {name: torch.cat([*history[name][i], given[name][i]])[None] for name in "qkvab"}
            of_all |= {"state": initial[i : i + 1], "A_log": given["A_log"], "dt_bias": given["dt_bias"]}
            wanted, _ = expected(of_all, SCALE)
            assert_close(out[i], wanted[0, -3:], dtype="bfloat16")
            for name in "qkvab":
                history[name][i].append(given[name][i, : accepted[i]])


# What the CUDA text of the kernel calls beside FUNCTIONS
_OF_CUDA = """
void tilelang_ext_prefetch_l2(const void*, int) {}
void tilelang_ext_prefetch_line_l2(const void*) {}
float rsqrtf(float x) { return 1 / std::sqrt(x); }
"""


class ReplayOnHopper(Replay):
    """The kernel's CUDA text run on the CPU; with four lanes per row products are those of MMAs."""

    def __init__(self, config, problem, batch):
        prim_func = replay(problem, config)
        self.text = lower(prim_func.with_attr("global_symbol", "replay"), HOPPER, **PASS_CONFIGS)
        assert ("mma_sync" in self.text) == (config.lanes == MMA_LANES)
        self.blocks = batch * problem.heads * problem.V // (config.warps * config.rows * config.turns)
        state = torch.empty(batch, problem.heads, problem.V, problem.K)
        self.cache = ReplayCache.empty(state, problem.ring, problem.qk_heads, torch.bfloat16)
        for tensor in self.cache:
            tensor.fill_(torch.nan)
        self.windows = torch.zeros(batch, 2, dtype=torch.int32)
        self.tokens, self.ring, self.limit = 1, problem.ring, problem.limit

    def launch(self, given, out):
        rings = {"k_ring": self.cache.k, "r_ring": self.cache.r, "decay_ring": self.cache.decay}
        tensors = given | rings | {"windows": self.windows, "out": out}
        scalars = {f"{name}_stride_{i}": stride for name in given for i, stride in enumerate(given[name].stride())}
        scalars |= {"batch": len(out), "state_slots": len(self.cache.k)}
        execute(self.text, (self.blocks, 1), tensors, {}, scalars, functions=FUNCTIONS + _OF_CUDA)


@needs_compiler
@pytest.mark.parametrize(
    ("state_dtype", "config", "limit"),
    [
        ("bfloat16", Config(1, 16, lanes=4, turns=2), 3),
        ("float32", Config(2, 8, lanes=16, turns=2), 3),
        ("float32", Config(1, 8, lanes=16), 9),
    ],
)
def test_on_hopper(state_dtype, config, limit):
    """Windows fill and wrap, and the state is written."""
    sizes, tokens = (1, 2, 64, 32), 2 * limit
    of_all = inputs(2, tokens, *sizes, state_dtype=getattr(torch, state_dtype))
    wanted, _ = expected(of_all, SCALE, l2_norm=True)
    problem = Problem("cuda", 132, 1, *sizes, "bfloat16", state_dtype, scale=SCALE, l2_norm=True, limit=limit)
    kept = ReplayOnHopper(config, problem, 2)
    given = dict(of_all)
    for t in range(tokens):
        given.update({name: of_all[name][:, t : t + 1].contiguous() for name in "qkvab"})
        out = kept.step(given, [1, 1])
        assert_close(out[:, 0], wanted[:, t], dtype="bfloat16", max_error=2e-2, rms_error=5e-3)  # written states are rounded


@pytest.mark.parametrize("target", ["metal", "metal, decays of channels", pytest.param("cuda", marks=needs_compiler)])
def test_long_windows(target):
    """Windows of many entries, none, one, and the most that are not written, beside the operator on the CPU; NaN elsewhere."""
    limit, K, V, per_channel = 20, 32, 16, target.endswith("channels")
    state_dtype = "bfloat16" if target == "cuda" else "float32"
    given = inputs(4, 1, 1, 2, K, V, per_channel=per_channel, state_dtype=getattr(torch, state_dtype))
    windows = torch.tensor([[17, 13], [20, 0], [20, 1], [0, 19]], dtype=torch.int32)
    cache = ReplayCache.empty(given["state"], limit + 1, 1, torch.bfloat16, per_channel=per_channel)
    for tensor in cache:
        tensor.fill_(torch.nan)
    for i, (first, count) in enumerate(windows.tolist()):
        entries = [(first + n) % (limit + 1) for n in range(count)]
        cache.k[i, entries], cache.r[i, entries] = torch.randn(count, 1, K).bfloat16() / 4, torch.randn(count, 2, V)
        cache.decay[i, entries] = -torch.rand_like(cache.decay[i, entries]).cumsum(0) / 4
    options = {"per_channel": per_channel, "scale": SCALE, "limit": limit}
    problem = Problem(target.partition(",")[0], 132, 1, 1, 2, K, V, "bfloat16", state_dtype, **options)
    wanted, kept = torch.full_like(given["v"], torch.nan), ReplayCache(*(tensor.clone() for tensor in cache))
    gated_delta_replay(**given, windows=windows, cache=kept, scale=SCALE, out=wanted)
    out = torch.full_like(given["v"], torch.nan)
    if target == "cuda":
        on_hopper = ReplayOnHopper(Config(1, 16, lanes=4), problem, 4)
        on_hopper.cache, on_hopper.windows = cache, windows
        on_hopper.launch(given, out)
    else:
        tensors = *given.values(), UNUSED, windows, *cache, out
        report = simulate(metal.lower(replay(problem, Config(1, 4))), *tensors, target="metal", check=True, timeout=300)
        assert not report.findings, str(report)
    assert_close(out, wanted.double(), dtype="bfloat16")
    for i, (first, count) in enumerate(windows.tolist()):
        for ours, theirs in zip(cache, kept, strict=True):
            entry = (first + count) % (limit + 1)
            assert_close(ours[i, entry], theirs[i, entry].double(), dtype=str(ours.dtype).removeprefix("torch."))

"""`gated_delta_decode` and `gated_delta_replay` beside the kernels of flash-linear-attention and vLLM.

    python benchmark/bench_gated_delta.py --csv gated_delta.csv              # on an NVIDIA GPU
    python benchmark/bench_gated_delta.py --batch 1 64 --vllm DIR            # DIR holds an unpacked vllm wheel
    python benchmark/bench_gated_delta.py --sglang FILE                      # fused_recurrent_linear_replayssm.py of SGLang

The decode case of the FlashInfer contest: 4 heads of q and k, 8 of v, 128 x 128, one token. One CUDA graph chains calls over
different states, 600 MB in all, so that none is found in L2; the time is that of one call. The first inputs of a batch are
the contest's workloads of that size, each with a seed of its own, and each is checked. Replay's calls go through whole cycles,
those that write the state included. Every provider is checked against float64 before anything is timed.
"""

import argparse
import importlib
import importlib.util
import math
import sys
import types
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), str(ROOT / "testing")]

from harness import METHOD, Column, describe, find_device, progress, show, time_cuda_in_turn, write_csv  # noqa: E402
from numeric import assert_close  # noqa: E402

from tilelang_ext import ReplayCache, gated_delta_decode, gated_delta_replay, reference  # noqa: E402

QK_HEADS, HEADS, K, V = 4, 8, 128, 128
SCALE = K**-0.5
BATCHES = [1, 4, 8, 16, 32, 48, 64, 256]
CONTEST = {1: 10, 4: 8, 8: 7, 16: 7, 32: 7, 48: 7, 64: 8}  # workloads of each batch among its 54
ROTATED_BYTES, MAX_CALLS = 600_000_000, 200
WINDOW = 8  # tokens that replay keeps
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIMES = (
    Column("case", "batch, state"),
    Column("provider", "provider"),
    Column("us", "us", ",.2f"),
    Column("floor", "floor, us", ",.2f"),
    Column("gbps", "GB/s", ",.0f"),
    Column("max_error", "max error", ".1e"),
)


class Inputs:
    """What one call takes, and its results, poisoned."""

    def __init__(self, batch: int, state_dtype: torch.dtype):
        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, device="cuda") * scale).bfloat16()

        self.q, self.k = normal(batch, 1, QK_HEADS, K), normal(batch, 1, QK_HEADS, K, scale=K**-0.5)
        self.v = normal(batch, 1, HEADS, V)
        self.state = torch.randn(batch, HEADS, V, K, device="cuda").to(state_dtype)
        self.A_log, self.dt_bias = torch.randn(HEADS, device="cuda"), torch.randn(HEADS, device="cuda") * 2
        self.a, self.b = normal(batch, 1, HEADS, scale=4.0), normal(batch, 1, HEADS, scale=2.0)
        self.out = torch.full_like(self.v, torch.nan)
        self.new_state = torch.full_like(self.state, torch.nan)

    @property
    def tensors(self) -> tuple:
        return self.q, self.k, self.v, self.state, self.A_log, self.dt_bias, self.a, self.b


def ours(inputs: Inputs, _: int):
    """Return a call that writes new_state, and what it writes."""
    call = partial(gated_delta_decode, *inputs.tensors, out=inputs.out, new_state=inputs.new_state)
    return call, lambda: (inputs.out, inputs.new_state)


def ours_in_place(inputs: Inputs, _: int):
    state = inputs.state.clone()
    tensors = *inputs.tensors[:3], state, *inputs.tensors[4:]
    return partial(gated_delta_decode, *tensors, out=inputs.out, new_state=state), lambda: (inputs.out, state)


def replay(inputs: Inputs, number: int):
    """Return call `number` of a cycle: a window with 1 to WINDOW tokens, of which the last is written with the state."""
    cache = ReplayCache.empty(inputs.state, WINDOW + 1, QK_HEADS, torch.bfloat16)
    cache.k.normal_(std=K**-0.5), cache.r.normal_(), cache.decay.copy_(-torch.rand_like(cache.decay).cumsum(1))
    windows = torch.zeros(len(inputs.q), 2, dtype=torch.int32, device="cuda")
    windows[:, 1] = number % WINDOW + 1 if number else 0  # the call that is checked has an empty window
    state = inputs.state.clone()
    tensors = *inputs.tensors[:3], state, *inputs.tensors[4:]
    return partial(gated_delta_replay, *tensors, windows, cache, out=inputs.out), lambda: (inputs.out, None)


def fla(inputs: Inputs, _: int):
    """Its recurrent kernel takes gates as they come out of a kernel before, and states (K, V)."""
    recurrent = importlib.import_module("fla.ops.gated_delta_rule").fused_recurrent_gated_delta_rule
    gate = -torch.exp(inputs.A_log) * torch.nn.functional.softplus(inputs.a.float() + inputs.dt_bias)
    state, results = inputs.state.float().transpose(2, 3).contiguous(), []

    def call():
        results[:] = recurrent(
            inputs.q, inputs.k, inputs.v, g=gate, beta=inputs.b.sigmoid(), scale=SCALE, initial_state=state,
            output_final_state=True,
        )  # fmt: skip

    return call, lambda: (results[0], results[1].transpose(2, 3))


def vllm(inputs: Inputs, _: int):
    """Its packed decode updates a pool in place, whose slot 0 is no sequence."""
    decode = importlib.import_module("vllm.third_party.flash_linear_attention.ops.fused_recurrent")
    batch = len(inputs.q)
    packed = torch.cat([tensor.flatten(1) for tensor in (inputs.q, inputs.k, inputs.v)], 1)
    pool = torch.cat([inputs.state[:1], inputs.state])
    slots = torch.arange(1, batch + 1, dtype=torch.int32, device="cuda")
    call = partial(
        decode.fused_recurrent_gated_delta_rule_packed_decode,
        packed, inputs.a[:, 0], inputs.b[:, 0], inputs.A_log, inputs.dt_bias, SCALE, pool, inputs.out, slots,
    )  # fmt: skip
    return call, lambda: (inputs.out, pool[1:])


def sglang(inputs: Inputs, number: int):
    """Call `number` of a cycle of its replay, whose WINDOW-th call writes the state; caches of 16 bits, which suit it best."""
    decode = sys.modules["sglang_replay"].fused_recurrent_linear_replayssm_decode
    batch, state = len(inputs.q), inputs.state.clone()
    packed = torch.cat([tensor.flatten(1) for tensor in (inputs.q, inputs.k, inputs.v)], 1)
    deltas = torch.randn(batch, HEADS, WINDOW, V, device="cuda").bfloat16()
    keys = (torch.randn(batch, QK_HEADS, WINDOW, K, device="cuda") * K**-0.5).bfloat16()
    gates, slots = -torch.rand(batch, HEADS, WINDOW, device="cuda"), torch.arange(batch, dtype=torch.int32, device="cuda")
    position = torch.full_like(slots, number % WINDOW)  # 0 in the call that is checked: an empty cache
    call = partial(
        decode, packed, inputs.a[:, 0], inputs.b[:, 0], inputs.A_log, inputs.dt_bias, SCALE, state, deltas, keys, gates,
        inputs.out, slots, position,
    )  # fmt: skip
    return call, lambda: (inputs.out, None)


PROVIDERS = {
    "ours": ours,
    "ours, in place": ours_in_place,
    f"replay of {WINDOW}": replay,
    "fla": fla,
    "vllm": vllm,
    f"sglang, replay of {WINDOW}": sglang,
}


def stub_vllm(folder: str) -> None:
    """Make the Triton files of an unpacked vllm wheel importable without the rest of vllm."""
    import triton

    root = Path(folder, "vllm")
    linear = root / "third_party" / "flash_linear_attention"
    for name, path in {"": root, ".third_party": root / "third_party", ".third_party.flash_linear_attention": linear,
                       ".third_party.flash_linear_attention.ops": linear / "ops"}.items():  # fmt: skip
        module = types.ModuleType(f"vllm{name}")
        module.__path__ = [str(path)]
        sys.modules[f"vllm{name}"] = module
    platforms, units = types.ModuleType("vllm.platforms"), types.ModuleType("vllm.triton_utils")
    platforms.current_platform = types.SimpleNamespace(is_cuda_alike=lambda: True, is_cuda=lambda: True)
    units.triton, units.tl, units.tldevice = triton, triton.language, None
    sys.modules |= {"vllm.platforms": platforms, "vllm.triton_utils": units}


def load_sglang(path: str) -> None:
    """Import SGLang's file by itself: it needs torch and triton alone."""
    spec = importlib.util.spec_from_file_location("sglang_replay", path)
    module = sys.modules["sglang_replay"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def is_here(provider: str) -> bool:
    """Whether the library of a provider can be imported."""
    names = {"fla": "fla.ops.gated_delta_rule", "vllm": "vllm.third_party.flash_linear_attention.ops.fused_recurrent"}
    names[f"sglang, replay of {WINDOW}"] = "sglang_replay"
    try:
        return provider not in names or bool(importlib.import_module(names[provider]))
    except ImportError:
        return False


def measure(batch: int, dtype: str, providers: list[str], seed: int) -> list[dict]:
    """Check, then time, all on the same inputs in turn; input i of a batch has a seed that follows from `seed`, it and i."""
    state_bytes = batch * HEADS * K * V * DTYPES[dtype].itemsize
    count = max(WINDOW, min(MAX_CALLS, math.ceil(ROTATED_BYTES / state_bytes)) // WINDOW * WINDOW)
    inputs = []
    for number in range(count):
        torch.manual_seed(seed * 1_000_003 + batch * 1_009 + number)
        inputs.append(Inputs(batch, DTYPES[dtype]))
    workloads = CONTEST.get(batch, 1)
    wanted = [reference.gated_delta(*each.tensors, SCALE) for each in inputs[:workloads]]
    rows, chains = [], []
    for name in providers:
        made = [PROVIDERS[name](each, number) for number, each in enumerate(inputs)]
        worst = 0.0
        # A replay is checked in its cycle's first call, which finds nothing to replay.
        for (call, results), (out_wanted, states) in zip(made[: 1 if "replay" in name else workloads], wanted, strict=False):
            call()
            out, state = results()
            worst = max(worst, assert_close(out, out_wanted, dtype="bfloat16", max_error=2e-2, rms_error=4e-3).max)
            if state is not None:
                state_dtype = str(state.dtype).removeprefix("torch.")
                assert_close(state, states[:, -1], dtype=state_dtype, max_error=2e-2, rms_error=4e-3)
        rows.append({"batch": batch, "state": dtype, "case": f"{batch}, {dtype}", "provider": name, "max_error": worst})
        chains.append([call for call, _ in made])
    for row, us in zip(rows, time_cuda_in_turn(chains), strict=True):
        row |= {"us": us, "floor": 2 * state_bytes / 4.25e6, "gbps": 2 * state_bytes / us / 1e3}
    return rows


def mean_of_contest(rows: list[dict]) -> dict[str, float]:
    """Return the mean time over the contest's workloads of each provider that has all of its batches."""
    times = {(row["provider"], row["batch"]): row["us"] for row in rows if row["state"] == "float32"}
    return {
        name: sum(times[name, batch] * count for batch, count in CONTEST.items()) / sum(CONTEST.values())
        for name in PROVIDERS
        if all((name, batch) in times for batch in CONTEST)
    }


def main(command_line: list[str] | None = None) -> list[dict]:
    """Run the benchmark; return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, metavar="B")
    parser.add_argument("--state", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--vllm", metavar="DIR", help="where a vllm wheel is unpacked; only its Triton files are used")
    parser.add_argument("--sglang", metavar="FILE", help="where SGLang's fused_recurrent_linear_replayssm.py is")
    parser.add_argument("--csv", metavar="FILE", help="write every figure")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    arguments = parser.parse_args(command_line)
    _, device, reason = find_device("cuda")
    if device != "cuda":
        raise SystemExit(
            f"bench_gated_delta.py: needs an NVIDIA GPU; got none ({reason}); the tests run the kernels without one"
        )
    if arguments.vllm:
        stub_vllm(arguments.vllm)
    if arguments.sglang:
        load_sglang(arguments.sglang)
    providers = [name for name in arguments.providers if is_here(name)]
    cases = [(batch, dtype) for dtype in arguments.state for batch in arguments.batch]
    rows = []
    for batch, dtype in progress(cases, "gated delta"):
        here = [name for name in providers if dtype == "float32" or name not in ("fla", "vllm")]
        rows += measure(batch, dtype, here, arguments.seed)
    notes = [METHOD["cuda"], "floor: the state read and written once at 4.25 TB/s; replay's GB/s count that too."]
    notes += [f"mean over the 54 workloads of the contest: {name} {us:.2f} us" for name, us in mean_of_contest(rows).items()]
    show(f"Gated delta rule, one token, 4 and 8 heads of 128 x 128, {describe(device)}", rows, TIMES, notes)
    if arguments.csv:
        write_csv(arguments.csv, rows)
    return rows


if __name__ == "__main__":
    main()

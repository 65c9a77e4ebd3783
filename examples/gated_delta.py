"""Linear attention with the gated delta rule: a prompt, tokens one by one, a draft of four, and states that are not written.

python examples/gated_delta.py                                    # small, by the reference on the CPU
python examples/gated_delta.py --device cuda --batch 64 --steps 1000
"""

import argparse

import torch

from tilelang_ext import ReplayCache, gated_delta_decode, gated_delta_prefill, gated_delta_replay, reference

QK_HEADS, HEADS, K, V = 2, 4, 64, 64
SCALE = K**-0.5
STATES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def tokens_of(batch: int, tokens: int, device: str) -> dict[str, torch.Tensor]:
    """Return q, k, v, a, b of the next tokens, as a layer's projections give them; keys have a norm near 1."""

    def normal(*shape, scale=1.0):
        return (torch.randn(batch, tokens, *shape) * scale).bfloat16().to(device)

    return {
        "q": normal(QK_HEADS, K),
        "k": normal(QK_HEADS, K, scale=K**-0.5),
        "v": normal(HEADS, V),
        "a": normal(HEADS),
        "b": normal(HEADS),
    }


def worst(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest error over the root mean square of what is wanted."""
    wanted = wanted.cpu()
    return ((got.cpu().double() - wanted).abs().max() / wanted.square().mean().sqrt()).item()


def main(command_line: list[str] | None = None) -> dict[str, float]:
    """Run the example; return the worst error of each part against the rule in float64."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args(command_line)
    torch.manual_seed(0)
    batch, device = arguments.batch, arguments.device
    layer = {"A_log": torch.rand(HEADS, device=device).log(), "dt_bias": torch.rand(HEADS, device=device)}
    start = torch.randn(batch, HEADS, V, K, device=device)
    steps = [tokens_of(batch, 1, device) for _ in range(arguments.steps)]
    errors = {}

    # A prompt of a hundred tokens, from a state of zeros; the tokens after it begin with the state that it leaves.
    prompt, zeros = tokens_of(batch, 100, device), torch.zeros_like(start)
    out, state = gated_delta_prefill(**prompt, **layer)
    wanted, after = reference.gated_delta(**prompt, state=zeros, **layer, scale=SCALE)
    errors["results of a prompt"], errors["state after a prompt"] = worst(out, wanted), worst(state, after[:, -1])

    # Token by token, in place. What the state loses by its type adds up, and decays with it.
    exact = start.double()
    states = {name: start.to(dtype) for name, dtype in STATES.items()}
    for step in steps:
        _, after = reference.gated_delta(**step, state=exact, **layer, scale=SCALE)
        exact = after[:, -1]
        for state in states.values():
            gated_delta_decode(**step, state=state, **layer, new_state=state)
    errors |= {f"{arguments.steps} steps, {name} state": worst(state, exact) for name, state in states.items()}

    # Four tokens of a draft: the results of all, and the state after as many as the model accepts.
    draft, accepted = tokens_of(batch, 4, device), torch.arange(batch, dtype=torch.int32, device=device) % 5
    out, state = gated_delta_decode(**draft, state=start, **layer, num_accepted=accepted)
    wanted, after = reference.gated_delta(**draft, state=start, **layer, scale=SCALE)
    after = torch.cat([start.double()[:, None], after], dim=1)[torch.arange(batch), accepted.long()]
    errors["results of a draft"], errors["state of the accepted"] = worst(out, wanted), worst(state, after)

    # The state is written once in eight tokens; until then it follows from the last tokens.
    state = start.clone()
    cache = ReplayCache.empty(state, entries=9, qk_heads=QK_HEADS, dtype=torch.bfloat16)
    windows, exact, errors["replay"] = torch.zeros(batch, 2, dtype=torch.int32, device=device), start.double(), 0.0
    for step in steps:
        out = gated_delta_replay(**step, state=state, **layer, windows=windows, cache=cache)
        windows = cache.next_windows(windows, tokens=1)
        wanted, after = reference.gated_delta(**step, state=exact, **layer, scale=SCALE)
        exact = after[:, -1]
        errors["replay"] = max(errors["replay"], worst(out, wanted))
    for name, error in errors.items():
        print(f"{name}: worst error {error:.1e} of the root mean square")
    return errors


if __name__ == "__main__":
    main()

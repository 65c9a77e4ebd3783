"""The mixture of experts of `examples/moe.py`, a user's kernels from tile intrinsics, beside `mxfp4_moe` on a Hopper GPU.

    python benchmark/bench_moe_example.py --tokens 64 2048 --tiles 16x192x384 144x192x384

A tile is rows of tokens x rows of weights x threads. Sizes are those of gpt-oss-20b, tokens bfloat16, no bias. The example is
its two kernels and torch's sum over slots, with tokens sorted ahead; mxfp4_moe sorts tokens itself. Their results are compared
first.
"""

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import tilelang
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), str(ROOT / "examples"), str(ROOT / "testing")]

import moe as example  # noqa: E402
from harness import METHOD, Column, describe, find_device, show, time_cuda_in_turn, write_csv  # noqa: E402
from mxfp4_moe_cases import MODELS, Case  # noqa: E402
from mxfp4_moe_grid import compile_ahead  # noqa: E402

from tilelang_ext import Activation, mxfp4_moe, reference, tile_for_hopper  # noqa: E402

MODEL = "gpt-oss-20b"
MAX_DIFFERENCE = 1e-2  # of the norm
COLUMNS = (
    Column("tokens", "tokens"),
    Column("tile", "tile"),
    Column("us", "example us", ",.1f"),
    Column("operator_us", "mxfp4_moe us", ",.1f"),
    Column("speed", "speed / mxfp4_moe's", ".2f"),
    Column("difference", "difference", ".1e"),
)


def tile_of(text: str) -> example.Tile:
    """Return the tile that is written as 144x192x384."""
    return example.Tile(*map(int, text.split("x")))


def measure(tokens: int, tiles: list[example.Tile], seed: int = 0, sets: int = 2) -> list[dict]:
    """Return a row per tile, each timed beside the operator."""
    model = MODELS[MODEL]
    case = Case(model, tokens, "bf16", "cuda", "cuda")
    layers, inputs = [case.layer(seed + i, "cuda") for i in range(sets)], [case.inputs(seed + i, "cuda") for i in range(sets)]
    no_bias = [[torch.zeros_like(weights.bias) for weights in layer] for layer in layers]
    operator, interleaved = [], []
    for layer, (bias13, bias2) in zip(layers, no_bias, strict=True):
        w13, w2 = layer.w13._replace(bias=bias13), layer.w2._replace(bias=bias2)
        operator.append([tile_for_hopper(w13), tile_for_hopper(w2)])
        halves = [torch.stack(each.chunk(2, 1), 2).flatten(1, 2).contiguous() for each in (w13.codes, w13.scale)]
        interleaved.append((*halves, w2.codes, w2.scale))
    outputs = [case.output("cuda") for _ in range(sets)]
    ours = [partial(mxfp4_moe, *inputs[i], *operator[i], activation=Activation(), out=outputs[i]) for i in range(sets)]
    ours[0]()
    chains, rows = [ours], []
    for tile in tiles:
        kernels = _kernels(tokens, tile)
        calls = [_bind(case, tile, kernels, inputs[i], interleaved[i]) for i in range(sets)]
        difference = ((calls[0]().double() - outputs[0].double()).norm() / outputs[0].double().norm()).item()
        if not difference <= MAX_DIFFERENCE:
            raise SystemExit(f"{tokens} tokens, {tile}: must be within {MAX_DIFFERENCE} of mxfp4_moe; got {difference:.1e}")
        chains.append(calls)
        rows.append({"tokens": tokens, "tile": "x".join(map(str, tile)), "difference": difference})
    operator_us, *times = time_cuda_in_turn(chains)
    for row, us in zip(rows, times, strict=True):
        row |= {"us": us, "operator_us": operator_us, "speed": operator_us / us}
    return rows


def _kernels(tokens: int, tile: example.Tile) -> list:
    """Return both kernels of the example, compiled."""
    _, H, I, experts, top_k = MODELS[MODEL]
    blocks = -(-(tokens * top_k + experts * tile.block_M - top_k) // tile.block_M)  # as the sort makes them
    kernels = example.gate_up(tokens, H, I, experts, blocks, *tile), example.down(tokens, top_k, H, I, experts, blocks, *tile)
    return [tilelang.compile(kernel, target={"kind": "cuda", "arch": "sm_90a"}) for kernel in kernels]


def _compile_ahead(case: tuple[int, example.Tile]) -> None:
    tilelang.set_log_level("WARNING")
    _kernels(*case)


def _bind(case: Case, tile: example.Tile, kernels: list, inputs, weights):
    """Return the call of the example's two kernels and the sum over slots."""
    _, H, I, experts, top_k = case.model
    routed = reference.moe_sort(inputs.topk_ids.cpu(), inputs.topk_weights.cpu(), experts, tile.block_M)
    token_ids, slot_weights, expert_ids = (each.cuda() for each in (routed.token_ids, routed.weights, routed.expert_ids))
    w13, scale13, w2, scale2 = weights
    first, second = kernels
    hidden = torch.empty(len(token_ids), I, dtype=torch.bfloat16, device="cuda")
    y = torch.full((case.tokens, top_k, H), torch.nan, device="cuda")
    out = torch.empty(case.tokens, H, device="cuda")

    def call() -> torch.Tensor:
        first(inputs.x, token_ids, expert_ids, w13, scale13, hidden)
        second(hidden, token_ids, expert_ids, slot_weights, w2, scale2, y)
        return torch.sum(y, 1, out=out)

    return call


def main(command_line: list[str] | None = None) -> list[dict]:
    """Run the benchmark and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 2048])
    parser.add_argument("--tiles", nargs="+", type=tile_of, default=[example.FEW, example.MANY], metavar="MxNxTHREADS")
    parser.add_argument("--csv", metavar="FILE", help="write every figure")
    arguments = parser.parse_args(command_line)
    _, device, reason = find_device("cuda")
    if device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        raise SystemExit(f"bench_moe_example: must run on an NVIDIA Hopper GPU; got {reason or 'another GPU'}; rent one")
    tilelang.set_log_level("WARNING")
    processes = os.cpu_count() or 1
    compile_ahead([Case(MODELS[MODEL], tokens, "bf16", "cuda", "cuda") for tokens in arguments.tokens], ["ours"], processes)
    cases = [(tokens, tile) for tokens in arguments.tokens for tile in arguments.tiles]
    with ProcessPoolExecutor(min(len(cases), processes), mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile_ahead, cases))  # what they compile is found on disk afterwards
    rows = []
    for tokens in arguments.tokens:
        rows += measure(tokens, arguments.tiles)
        if arguments.csv:  # a run that is ended keeps what it has
            write_csv(arguments.csv, rows)
    show(f"examples/moe.py, sizes of {MODEL}, {describe('cuda')}", rows, COLUMNS, [METHOD["cuda"]])
    return rows


if __name__ == "__main__":
    main()

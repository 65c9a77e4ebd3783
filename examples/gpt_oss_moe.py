"""The experts of a gpt-oss layer, from the tensors of its checkpoint.

python examples/gpt_oss_moe.py                                      # a small random layer, written and read as a checkpoint is
python examples/gpt_oss_moe.py --a-dtype mxfp8 --tokens 100
python examples/gpt_oss_moe.py --checkpoint gpt-oss-20b/*.safetensors --layer 3 --device cuda
"""

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from tilelang_ext import MXFP4Experts, checkpoints, formats, quantization, reference

MX = formats.BlockScaledLayout.e8m0_k32()


def random_layer(prefix: str, num_experts: int, hidden_size: int, intermediate_size: int) -> dict[str, torch.Tensor]:
    """Return the tensors of one random layer with the names, shapes and dtypes of a gpt-oss checkpoint."""
    tensors = {}
    for name, rows, k in (("gate_up_proj", 2 * intermediate_size, hidden_size), ("down_proj", hidden_size, intermediate_size)):
        codes, scale = quantization.quantize(torch.randn(num_experts, rows, k) / k**0.5, formats.E2M1, MX)
        tensors[f"{prefix}{name}_blocks"], tensors[f"{prefix}{name}_scales"] = checkpoints.to_gpt_oss(codes, scale)
        tensors[f"{prefix}{name}_bias"] = torch.randn(num_experts, rows).bfloat16() / 10
    return tensors


def expected(experts: MXFP4Experts, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """Return the exact result, in float64 with dequantised weights, on the CPU, one used expert at a time."""
    x, topk_ids, topk_weights = x.cpu(), topk_ids.cpu(), topk_weights.cpu()
    state, y = experts.state_dict(), torch.zeros(x.shape, dtype=torch.float64)
    for expert in topk_ids.unique().tolist():
        weights = {}
        for name in ("gate_up_proj", "down_proj"):
            codes, scale = (state[f"{name}_{part}"][expert : expert + 1].cpu() for part in ("blocks", "scales"))
            weights[name] = reference.dequantize(codes.flatten(-2), scale, formats.E2M1, MX)
        bias13, bias2 = (state[f"{name}_bias"][expert : expert + 1].cpu() for name in weights)
        ids = torch.where(topk_ids == expert, 0, -1)
        y += reference.moe(x, ids, topk_weights, *weights.values(), bias13=bias13, bias2=bias2)
    return y


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--num-experts", type=int, default=8, help="of a random layer, as are the two sizes")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=192)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument(
        "--a-dtype", choices=("bfloat16", "fp8", "mxfp8", "mxfp4"), default="bfloat16", help="type of the activations"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", nargs="+", metavar="FILE", help="safetensors files of a gpt-oss model")
    parser.add_argument("--layer", type=int, default=0, help="layer of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(command_line)
    torch.manual_seed(arguments.seed)
    prefix = f"model.layers.{arguments.layer}.mlp.experts."
    a_dtype = None if arguments.a_dtype == "bfloat16" else arguments.a_dtype

    with tempfile.TemporaryDirectory() as directory:
        files = arguments.checkpoint
        if files is None:
            files = [Path(directory) / "model.safetensors"]
            sizes = arguments.num_experts, arguments.hidden_size, arguments.intermediate_size
            save_file(random_layer(prefix, *sizes), files[0])
        experts = MXFP4Experts.from_checkpoint(files, prefix, a_dtype=a_dtype, device=arguments.device)

    x = torch.randn(arguments.tokens, experts.hidden_size, device=arguments.device).bfloat16()
    logits = torch.randn(arguments.tokens, experts.num_experts, device=arguments.device)  # what a router would give
    values, topk_ids = logits.topk(arguments.top_k)
    topk_weights = values.softmax(-1)
    y = experts(x, topk_ids, topk_weights)

    print(experts)
    stored = sum(buffer.numel() * buffer.element_size() for buffer in experts.buffers())
    elements = 3 * experts.num_experts * experts.hidden_size * experts.intermediate_size
    print(f"weights: {stored:,} bytes, {8 * stored / elements:.2f} bits per element with scales and biases")
    how = "torch's float64 (the kernels are for GPUs)" if arguments.device == "cpu" else "the kernels"
    print(
        f"{arguments.tokens} tokens to {arguments.top_k} of {experts.num_experts} experts, {topk_ids.unique().numel()} of them "
        f"in use, on {arguments.device} by {how}"
    )
    want = expected(experts, x, topk_ids, topk_weights)
    error = (y.cpu().double() - want).abs().max() / want.square().mean().sqrt()
    cosine = torch.nn.functional.cosine_similarity(y.cpu().double(), want, dim=-1)
    print(f"against float64: largest error {error:.1e} of the RMS")
    print(f"cosine of rows: mean {cosine.mean():.5f}, at least {cosine.min():.5f}")


if __name__ == "__main__":
    main()

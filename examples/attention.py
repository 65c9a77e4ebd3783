"""Attention of a gpt-oss layer: a prompt, its cache in pages, the next tokens, and a prefix that several prompts share.

python examples/attention.py                                   # small, by the reference on the CPU
python examples/attention.py --device cuda --tokens 4096 --heads 64 --kv-heads 8
"""

import argparse

import torch

from tilelang_ext import attention, attention_decode, merge_attention, reference

PAGE_SIZE = 16


def in_pages(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return (tokens, heads, head_dim) as pages in an order of their own; what no token has is NaN."""
    pages = torch.full((len(order) * PAGE_SIZE, *rows.shape[1:]), torch.nan, dtype=rows.dtype, device=rows.device)
    pages[: len(rows)] = rows
    placed = torch.empty_like(pages.view(len(order), PAGE_SIZE, *rows.shape[1:]))
    placed[order.long()] = pages.view(placed.shape)
    return placed


def worst_error(o: torch.Tensor, expected: torch.Tensor) -> float:
    return (o.double().cpu() - expected).abs().max().item()


def main(command_line: list[str] | None = None) -> dict[str, float]:
    """Run the example; return the worst error of each step against float64."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--window", type=int, default=32)
    arguments = parser.parse_args(command_line)
    torch.manual_seed(0)
    tokens, heads, kv_heads, D = arguments.tokens, arguments.heads, arguments.kv_heads, 64

    def normal(*shape):
        return torch.randn(*shape, device=arguments.device).bfloat16()

    q, k, v = normal(1, tokens, heads, D), normal(1, tokens, kv_heads, D), normal(1, tokens, kv_heads, D)
    sinks = torch.randn(heads, device=arguments.device)
    on_cpu = [x.cpu() for x in (q, k, v)]
    errors = {}

    # The prompt: causal, of the last `window` keys, with a sink of each head.
    o, _ = attention(q, k, v, window=arguments.window, sinks=sinks)
    expected, _ = reference.attention(*on_cpu, D**-0.5, window=arguments.window, sinks=sinks.cpu())
    errors["prompt"] = worst_error(o, expected)

    # The last two tokens again, over a cache in pages.
    pages = -(-tokens // PAGE_SIZE)
    order = torch.randperm(pages, device=arguments.device).int()
    seqlens = torch.tensor([tokens], dtype=torch.int32, device=arguments.device)
    cache_k, cache_v = in_pages(k[0], order), in_pages(v[0], order)
    o, _ = attention_decode(
        q[:, -2:].contiguous(), cache_k, cache_v, seqlens, page_table=order[None], window=arguments.window, sinks=sinks
    )
    errors["decode"] = worst_error(o, expected[:, -2:])

    # A prefix whose keys are elsewhere: both parts by themselves, merged by their log-sum-exp.
    prefix = tokens // 2
    parts = [
        attention(q[:, prefix:].contiguous(), k[:, :prefix].contiguous(), v[:, :prefix].contiguous()),
        attention(*(x[:, prefix:].contiguous() for x in (q, k, v)), causal=True),
    ]
    o, _ = merge_attention(*parts[0], *parts[1])
    expected, _ = reference.attention(on_cpu[0][:, prefix:], *on_cpu[1:], D**-0.5, True)
    errors["merge"] = worst_error(o, expected)
    for name, error in errors.items():
        print(f"{name}: worst error {error:.1e}")
    return errors


if __name__ == "__main__":
    main()

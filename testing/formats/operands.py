"""Bytes and values that the tests of formats share."""

import torch


def random_bytes(seed: int, *shape: int, high: int = 256) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def random_values(seed: int, *shape: int) -> torch.Tensor:
    """Normal values whose rows and groups of 32 differ by powers of two, so that a scale in the wrong place shows."""
    g = torch.Generator().manual_seed(seed)
    *lead, rows, k = shape
    spread = torch.randint(-12, 13, (*lead, rows, -(-k // 32)), generator=g).repeat_interleave(32, -1)[..., :k]
    return torch.randn(shape, generator=g, dtype=torch.float64) * 2.0**spread

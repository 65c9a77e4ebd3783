"""The tile of `sm90_forward` for a problem, by head_dim, window and bits."""

from dataclasses import dataclass

from tilelang_ext.kernels.attention.problem import Problem
from tilelang_ext.kernels.attention.tiles import SHORT_WINDOW

WGMMA_M, WGMMA_K = 64, 16  # of 16 bits


@dataclass(frozen=True)
class Config:
    """Consumers, keys of a block, stages of the pipelines of k and of v, and of q, and whether consumers take turns."""

    num_consumers: int
    block_N: int
    num_stages: int
    q_stages: int
    takes_turns: bool = True

    @property
    def block_M(self) -> int:
        return self.num_consumers * WGMMA_M


def pick_config(problem: Problem) -> Config:
    """Return the tile by head_dim, as large as registers and shared memory allow."""
    if 0 < problem.window <= SHORT_WINDOW and problem.head_dim <= 128 and not problem.is_fp8:
        # One tile's windows in as few blocks of keys as registers and shared memory allow, and these no longer than needed.
        most, consumers = (176, 2) if problem.head_dim <= 64 else (144, 2)
        span = problem.window + consumers * WGMMA_M // problem.pack - 1
        blocks = -(-span // most)
        block_N = -(-span // blocks // WGMMA_K) * WGMMA_K
        return Config(consumers, block_N, 3 if problem.head_dim <= 64 else 2, 2)
    of_codes = [(64, Config(3, 128, 4, 2)), (128, Config(2, 128, 4, 2)), (256, Config(2, 128, 2, 1))]
    if problem.is_fp8:
        return next(config for most, config in of_codes if problem.head_dim <= most)
    table = [
        # (head_dim up to, config if causal, config otherwise)
        (64, Config(3, 128, 4, 2), Config(3, 128, 4, 2)),
        (128, Config(2, 128, 2, 2), Config(2, 128, 2, 2)),
        (192, Config(2, 112, 2, 1), Config(2, 112, 2, 1)),
        (256, Config(2, 80, 2, 1), Config(2, 80, 2, 1)),
    ]
    return next(causal if problem.is_causal else full for most, causal, full in table if problem.head_dim <= most)

"""How many consumers and stages a block of the scan on Hopper has."""

from dataclasses import dataclass

from tilelang_ext.kernels.gated_delta.prefill_problem import PrefillProblem
from tilelang_ext.kernels.sm90.roles import Roles

WGMMA_M, WGMMA_K = 64, 16
PANEL = 64  # elements of 16 bits in a swizzled row of 128 bytes of shared memory
ROW_BYTES = 128  # of such a row


@dataclass(frozen=True)
class Config:
    """Consumers of a block, and stages of the pipeline."""

    num_consumers: int
    num_stages: int = 3

    @property
    def roles(self) -> Roles:
        return Roles(self.num_consumers, 24, 240)


def pick_config(problem: PrefillProblem, sequences: int) -> Config:
    """Return two consumers where blocks of one would not all run at once: they share the loads of q, k, T and A."""
    return Config(1 if sequences <= sequences_of_one_wave(problem) or problem.V % (2 * WGMMA_M) else 2)


def sequences_of_one_wave(problem: PrefillProblem) -> int:
    """Return the most sequences whose blocks of one consumer are no more than the SMs."""
    return problem.num_sms // (problem.heads * (problem.V // WGMMA_M))

"""What the kernels of `gated_delta_prefill` are compiled for, how they divide the work, and where a chunk of tokens lies.

Of one head of a chunk of C tokens, with G_t = log g_1 + ... + log g_t and the state S before the chunk, the rule's

    r_t = beta_t (v_t - g_t S_(t-1) k_t);  S_t = g_t S_(t-1) + r_t k_t^T;  o_t = scale S_t q_t

are linear in all r of the chunk. With L[t, i] = beta_t exp(G_t - G_i) k_t . k_i for i < t, and T = (I + L)^-1 diag(beta):

    R = T (V - diag(exp(G)) K S^T)                                                         (C, V)
    O = scale diag(exp(G)) Q S^T + A R,  A[t, i] = scale exp(G_t - G_i) q_t . k_i, i <= t  (C, V)
    S' = exp(G_C) S + R^T diag(exp(G_C - G)) K                                             (V, K)

T and A depend on no state: `solve_chunks` computes them for all chunks at once. `scan_chunks` then goes from chunk to chunk,
one block per sequence, head and slice of V. Exponents are never positive. Norms of q and k are factors of tokens, as the decays
are, and so are not multiplied into q and k.

| argument | shape | dtype |
| --- | --- | --- |
| q, k | (batch, tokens, qk_heads, K) | `dtype` |
| v, out | (batch, tokens, heads, V) | `dtype` |
| A_log, dt_bias | (heads,) | float32 |
| a, b | (batch, tokens, heads) | `dtype` |
| cu_seqlens | (sequences + 1,) with `has_lengths`, where batch is 1 | int32 |
| initial, final | (sequences, heads, V, K) | `state_dtype` |
| solution, scores: T and A | (slots * heads, C, C) | `dtype` |
| factors: of K S^T, of R for S', of Q S^T, and of S | (slots * heads, 4, C) | float32 |

All are contiguous. A chunk's slot is its sequence's first one plus its number: with `has_lengths` a sequence that begins at
token b is given the slots from b // C + its number on, of which one may stay unused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from tilelang_ext import language as T

HOPPER = "sm_90a"
MAX_SEQUENCES = 2**31 - 1
FACTORS = 4  # of a token: of K S^T, of R where it is added to S, of Q S^T; and of S


@dataclass(frozen=True)
class PrefillProblem:
    """Everything that a kernel may depend on. Numbers of sequences and tokens are no constants of kernels."""

    target_kind: str  # "cuda", "hip" or "metal"
    arch: str  # as "sm_90a" or "gfx942"; "" on Metal
    num_sms: int  # streaming multiprocessors of the device, on AMD compute units; 0 on Metal
    qk_heads: int
    heads: int  # of v, the states and out
    K: int
    V: int
    dtype: str  # "bfloat16" or "float16"
    state_dtype: str  # "float32" or "bfloat16"
    scale: float = 1.0
    l2_norm: bool = False  # whether q and k are divided by their norms first
    has_initial: bool = False
    has_lengths: bool = False

    def without_states(self) -> PrefillProblem:
        """Return all that what is computed without states depends on."""
        return replace(self, num_sms=0, V=0, state_dtype="float32", has_initial=False)

    @property
    def chunk(self) -> int:
        """Tokens of a chunk: where the memory of a block is small, 32 of them."""
        return 64 if self.arch == HOPPER else 32

    @property
    def uses_pdl(self) -> bool:
        """Whether a launch may begin before the one ahead of it has ended."""
        return self.arch == HOPPER

    def slots(self, batch, tokens, sequences):
        """Return how many slots chunks have, those that stay unused included."""
        if self.has_lengths:
            return T.truncdiv(tokens, self.chunk) + sequences
        return batch * T.ceildiv(tokens, self.chunk)

    def types(self) -> SimpleNamespace:
        """Return the types of the parameters of all kernels, by name."""
        batch, tokens, num_cu, sequences, tiles = (
            T.dynamic(name) for name in ("batch", "tokens", "num_cu", "sequences", "tiles")
        )
        qk, v = (batch, tokens, self.qk_heads, self.K), (batch, tokens, self.heads, self.V)
        initial = T.dynamic("num_initial") if not self.has_initial else sequences
        return SimpleNamespace(
            q=T.Tensor(qk, self.dtype),
            k=T.Tensor(qk, self.dtype),
            v=T.Tensor(v, self.dtype),
            A_log=T.Tensor((self.heads,), "float32"),
            dt_bias=T.Tensor((self.heads,), "float32"),
            a=T.Tensor(v[:3], self.dtype),
            b=T.Tensor(v[:3], self.dtype),
            cu_seqlens=T.Tensor((num_cu,), "int32"),
            initial=T.Tensor((initial, self.heads, self.V, self.K), self.state_dtype),
            final=T.Tensor((sequences, self.heads, self.V, self.K), self.state_dtype),
            out=T.Tensor(v, self.dtype),
            solution=T.Tensor((tiles, self.chunk, self.chunk), self.dtype),
            scores=T.Tensor((tiles, self.chunk, self.chunk), self.dtype),
            factors=T.Tensor((tiles, FACTORS, self.chunk), "float32"),
        )


@dataclass(frozen=True, eq=False)
class Span:
    """Where a sequence or a chunk lies, in int32 variables."""

    registers: Any

    @property
    def batch(self):
        """The first index of q, k, v and out."""
        return self.registers[0]

    @property
    def first(self):
        """The first token."""
        return self.registers[1]

    @property
    def tokens(self):
        return self.registers[2]

    @property
    def slot(self):
        """The slot of the first chunk."""
        return self.registers[3]


def alloc_span() -> Span:
    return Span(T.alloc_local((4,), "int32"))


def find_sequence(problem: PrefillProblem, q, cu_seqlens, sequence, span: Span) -> None:
    """Write where a sequence lies."""
    C, of = problem.chunk, span.registers

    @T.macro
    def emit(sequence):
        if problem.has_lengths:
            of[0], of[1] = 0, cu_seqlens[sequence]
            of[2], of[3] = cu_seqlens[sequence + 1] - of[1], T.truncdiv(of[1], C) + sequence
        else:
            of[0], of[1], of[2], of[3] = sequence, 0, q.shape[1], sequence * T.ceildiv(q.shape[1], C)

    emit(sequence)


def find_chunk(problem: PrefillProblem, q, cu_seqlens, slot, span: Span) -> None:
    """Write where the chunk of a slot lies; one that stays unused has no tokens."""
    C, of = problem.chunk, span.registers

    @T.macro
    def emit(slot):
        of[3] = slot
        if problem.has_lengths:
            of[0], of[1], of[2] = 0, 0, 0
            for sequence in T.serial(cu_seqlens.shape[0] - 1):
                begin, end = cu_seqlens[sequence], cu_seqlens[sequence + 1]
                first = begin + (slot - T.truncdiv(begin, C) - sequence) * C
                if (first >= begin) and (first < end):
                    of[1], of[2] = first, T.min(end - first, C)
        else:
            of[0] = T.truncdiv(slot, T.ceildiv(q.shape[1], C))
            of[1] = (slot - of[0] * T.ceildiv(q.shape[1], C)) * C
            of[2] = T.min(q.shape[1] - of[1], C)

    emit(slot)

"""What the kernels of `gated_delta_decode` are compiled for, and the promises that hold for their arguments.

    x = a + dt_bias;  g = exp(-exp(A_log) * softplus(x));  beta = sigmoid(b)          for each token
    S' = g S;  r = beta (v - S' k);  S = S' + r k^T;  o = scale * S q

| argument | shape | dtype | memory |
| --- | --- | --- | --- |
| q, k | (batch, tokens, qk_heads, K) | `dtype` | heads and K contiguous; a token starts at a multiple of 8 bytes |
| v | (batch, tokens, heads, V) | `dtype` | the same |
| state, new_state | (slots, heads, V, K) | `state_dtype` | a slot is contiguous, and starts at a multiple of 16 bytes |
| A_log | (heads,) | float32 | contiguous |
| dt_bias | (heads,), per channel (heads, K) | float32 | contiguous |
| a | (batch, tokens, heads), per channel (batch, tokens, heads, K) | `dtype` | heads and K contiguous |
| b | (batch, tokens, heads) | `dtype` | heads contiguous |
| indices | (batch,): slot of a sequence, below 0 for none | int32 | contiguous |
| accepted | (batch,): tokens after which the state is kept | int32 | contiguous |
| out | (batch, tokens, heads, V) | `dtype` | contiguous |

Value head h reads q and k of head h // (heads // qk_heads). Only on CUDA may tokens and slots lie further apart than they are
long. With `in_place` the state is written where it was read, and new_state is not touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from tilelang_ext import language as T

STRIDE_UNIT = 8  # elements: of the widest load of 16-bit types
V_UNIT = 4  # rows: V is a multiple
WARP = 32  # of T.warp_reduce_sum: on AMD's waves of 64, each half by itself


@dataclass(frozen=True)
class Problem:
    """Everything that a kernel may depend on, except the batch; dtypes by TileLang's names."""

    target_kind: str  # "cuda", "hip" or "metal"
    num_sms: int  # streaming multiprocessors of the device, on AMD compute units; 0 on Metal
    tokens: int  # of each sequence in one call
    qk_heads: int
    heads: int  # of v, state and out
    K: int
    V: int
    dtype: str  # "bfloat16" or "float16"
    state_dtype: str  # "float32" or "bfloat16"
    per_channel: bool = False  # whether each channel of K has a gate of its own (KDA)
    scale: float = 1.0
    l2_norm: bool = False  # whether q and k are divided by their norms first
    in_place: bool = False
    each_token: bool = False  # whether new_state has a slot for each token: sequence * tokens + token
    has_indices: bool = False
    has_accepted: bool = False

    limit: int = 0  # of replay: the most tokens in a window

    @property
    def ring(self) -> int:
        """Entries of a slot's ring: those that may be read and those that may be written in one call."""
        return self.limit + self.tokens

    @property
    def gates_per_lane(self) -> int:
        return self.K // WARP if self.per_channel else 1

    @property
    def uses_pdl(self) -> bool:
        """Whether a launch begins before the one ahead of it has ended."""
        return self.target_kind == "cuda"

    def types(self) -> SimpleNamespace:
        """Return the types of the parameters that all kernels have, by name."""
        batch = T.dynamic("batch")
        qk_shape, v_shape = (batch, self.tokens, self.qk_heads, self.K), (batch, self.tokens, self.heads, self.V)
        of_gates = (self.heads, self.K) if self.per_channel else (self.heads,)
        return SimpleNamespace(
            q=self._tensor("q", qk_shape, self.dtype, 2),
            k=self._tensor("k", qk_shape, self.dtype, 2),
            v=self._tensor("v", v_shape, self.dtype, 2),
            state=self.state_type("state"),
            A_log=T.Tensor((self.heads,), "float32"),
            dt_bias=T.Tensor(of_gates, "float32"),
            a=self._tensor("a", (batch, self.tokens, *of_gates), self.dtype, 2),
            b=self._tensor("b", (batch, self.tokens, self.heads), self.dtype, 2),
            indices=T.Tensor((T.dynamic("num_indices"),), "int32"),
            out=T.Tensor(v_shape, self.dtype),
        )

    def state_type(self, name: str):
        """Return the type of a pool of states."""
        return self._tensor(name, (T.dynamic(f"{name}_slots"), self.heads, self.V, self.K), self.state_dtype, 1)

    def _tensor(self, name: str, shape: tuple, dtype: str, free: int):
        """Return the type of a parameter; on CUDA its first `free` dimensions may have any stride."""
        if self.target_kind != "cuda":
            return T.Tensor(shape, dtype)
        strides = [1] * len(shape)
        for axis in reversed(range(free, len(shape) - 1)):
            strides[axis] = strides[axis + 1] * shape[axis + 1]
        for axis in range(free):
            strides[axis] = T.dynamic(f"{name}_stride_{axis}")
        return T.StridedTensor(shape, tuple(strides), dtype)

"""What the kernels of `attention` are compiled for, and the promises that hold for their arguments.

    s = softmax_scale * q . k + mask;  lse = ln(sum of e^s);  o = sum of e^(s - lse) v          for each query and head

| argument | shape | memory |
| --- | --- | --- |
| q, out | (batch, S_q, heads, head_dim) of `dtype` | contiguous, first byte at a multiple of 16 |
| k, v | (batch, S_k, kv_heads, head_dim) of `dtype` | the same |
| sinks | (heads,) float32, the logit of a key without a value | contiguous |
| cu_q, cu_k | (sequences + 1,) int32, with `has_lengths` | contiguous |
| lse | (batch, heads, queries) float32, natural logarithm | contiguous |

Query head h reads key and value head h // (heads // kv_heads). With `has_lengths` batch is 1, and sequence i has the queries
cu_q[i] to cu_q[i + 1] and the keys cu_k[i] to cu_k[i + 1]. Query i of a sequence stands at the position i + (keys - queries) of
its keys, so that the last of both lie at the same position; `causal` hides keys after that position, and `window` all but the
`window` keys up to it. A query that sees no key gives 0, and lse is -infinity, or its sink. What the problem lacks is any
tensor of its dtype. head_dim is a multiple of 8 up to 512.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tilelang_ext import language as T

HEAD_DIM_UNIT = 8  # elements of 16 bits: 16 bytes, as TMA demands
MAX_HEAD_DIM = 512
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Problem:
    """Everything that a kernel may depend on. Numbers of sequences, tokens and heads are no constants of kernels."""

    target_kind: str  # "cuda", "hip" or "metal"
    arch: str  # as "sm_90a" or "gfx942"; "" on Metal
    num_sms: int  # streaming multiprocessors of the device, on AMD compute units; 0 on Metal
    head_dim: int
    dtype: str  # "bfloat16" or "float16"
    scale: float  # softmax_scale
    causal: bool = False
    window: int = 0  # keys that a query sees, up to its own position; 0: all
    has_sinks: bool = False
    has_lengths: bool = False

    @property
    def is_causal(self) -> bool:
        """Whether keys after a query's position are hidden, as a window hides them too."""
        return self.causal or self.window > 0

    @property
    def scale_log2(self) -> float:
        """The scale of scores whose powers are of two."""
        return self.scale * LOG2_E

    def types(self) -> SimpleNamespace:
        """Return the types of a prim_func's parameters."""
        names = "batch", "queries", "keys", "heads", "kv_heads", "num_cu_q", "num_cu_k"
        batch, queries, keys, heads, kv_heads, num_cu_q, num_cu_k = (T.dynamic(name) for name in names)
        return SimpleNamespace(
            q=T.Tensor((batch, queries, heads, self.head_dim), self.dtype),
            k=T.Tensor((batch, keys, kv_heads, self.head_dim), self.dtype),
            v=T.Tensor((batch, keys, kv_heads, self.head_dim), self.dtype),
            sinks=T.Tensor((T.dynamic("num_sinks"),), "float32"),
            cu_q=T.Tensor((num_cu_q,), "int32"),
            cu_k=T.Tensor((num_cu_k,), "int32"),
            out=T.Tensor((batch, queries, heads, self.head_dim), self.dtype),
            lse=T.Tensor((batch, heads, queries), "float32"),
        )


@dataclass(frozen=True, eq=False)
class Operands:
    """The parameters of a prim_func, in order."""

    q: Any
    k: Any
    v: Any
    sinks: Any
    cu_q: Any
    cu_k: Any
    out: Any
    lse: Any

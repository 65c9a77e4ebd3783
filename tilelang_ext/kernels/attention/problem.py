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
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from tilelang_ext import language as T

HEAD_DIM_UNIT = 8  # elements of 16 bits: 16 bytes, as TMA demands
MAX_HEAD_DIM = 512
LOG2_E = math.log2(math.e)
FP8 = "float8_e4m3fn"
MANY = 128  # about the SMs of a GPU


@dataclass(frozen=True)
class Problem:
    """Everything that a kernel may depend on. Numbers of sequences, tokens and heads are no constants of kernels."""

    target_kind: str  # "cuda", "hip" or "metal"
    arch: str  # as "sm_90a" or "gfx942"; "" on Metal
    num_sms: int  # streaming multiprocessors of the device, on AMD compute units; 0 on Metal
    head_dim: int
    dtype: str  # of q, k and v: "bfloat16", "float16" or "float8_e4m3fn"
    scale: float  # softmax_scale
    causal: bool = False
    window: int = 0  # keys that a query sees, up to its own position; 0: all
    has_sinks: bool = False
    has_lengths: bool = False
    out_dtype: str = ""  # by default dtype
    pack: int = 1  # heads of q in a tile, which share a head of k and v

    @property
    def is_causal(self) -> bool:
        """Whether keys after a query's position are hidden, as a window hides them too."""
        return self.causal or self.window > 0

    @property
    def is_fp8(self) -> bool:
        return self.dtype == FP8

    @property
    def result(self) -> str:
        """The dtype of out, in which codes of 8 bits are multiplied where there is no instruction for them."""
        return self.out_dtype or self.dtype

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
            v_transposed=T.Tensor((batch, kv_heads, self.head_dim, T.dynamic("padded_keys")), self.dtype),
            q_scale=T.Tensor((T.dynamic("q_scales"),), "float32"),
            k_scale=T.Tensor((T.dynamic("k_scales"),), "float32"),
            v_scale=T.Tensor((T.dynamic("v_scales"),), "float32"),
            out=T.Tensor((batch, queries, heads, self.head_dim), self.result),
            lse=T.Tensor((batch, heads, queries), "float32"),
        )


@dataclass(frozen=True, eq=False)
class Operands:
    """The parameters of a prim_func, in order; the last two are results for parts of the keys, where there are such.

    Scales are one for all heads, or one for each.
    """

    q: Any
    k: Any
    v: Any
    sinks: Any
    cu_q: Any
    cu_k: Any
    q_scale: Any
    k_scale: Any
    v_scale: Any
    out: Any
    lse: Any
    partial: Any = None  # (parts, rows of a tile, channels)
    partial_lse: Any = None  # (parts, rows of a tile), of base 2


@dataclass(frozen=True, eq=False)
class DecodeOperands:
    """What a kernel of `attention_decode` reads, but for where the keys of a sequence lie."""

    q: Any
    cache_k: Any
    cache_v: Any
    k_scale: Any
    v_scale: Any


@dataclass(frozen=True, eq=False)
class DecodeResults:
    """What a kernel of `attention_decode` writes; `given` and those after it where it also adds its ranges."""

    partial: Any
    partial_lse: Any
    given: Any = None
    sinks: Any = None
    out: Any = None
    lse: Any = None


@dataclass(frozen=True)
class DecodeProblem:
    """Everything that a kernel of `attention_decode` may depend on. Numbers of sequences, tokens, heads and pages are no
    constants of kernels.

    | argument | shape | memory |
    | --- | --- | --- |
    | q, out | (batch, tokens, heads, head_dim) of `dtype` | contiguous, first byte at a multiple of 16 |
    | cache_k, cache_v | (pages, page_size, kv_heads, head_dim) of `cache_dtype`; without pages (batch, keys, ...) | the same |
    | seqlens | (batch,) int32: keys of each sequence, those of its tokens included | contiguous |
    | page_table | (batch, pages of a sequence) int32, with pages | the same |
    | k_scale, v_scale | (kv_heads,) or (pages, kv_heads) float32, by `scales` | the same |
    | sinks | (heads,) float32 | the same |
    | partial | (results, batch, tokens, heads, head_dim) float32 | the same |
    | partial_lse | (results, batch, heads, tokens) float32, logarithm of base 2 | the same |
    | given | (batch, kv_heads, splits, words) int64, where a kernel adds its ranges: see `sm90_sum` | the same |
    | lse | (batch, heads, tokens) float32, natural logarithm | the same |

    Token t of a sequence stands at position seqlens - tokens + t, and sees the keys up to it, of a window the last `window`.
    """

    target_kind: str  # "cuda", "hip" or "metal"
    arch: str
    num_sms: int
    head_dim: int
    dtype: str
    cache_dtype: str
    scale: float
    window: int = 0
    page_size: int = 0  # 0: no pages
    scales: str = ""  # "head" or "page": what has a scale of its own
    has_sinks: bool = False
    has_few_rows: bool = False  # whether tokens times heads of q that share one of k and v are at most 8
    has_many: bool = False  # whether, of few rows, sequences times heads of k and v are at least MANY

    def of_sum(self) -> DecodeProblem:
        """Return all that the sum over ranges depends on."""
        return replace(
            self,
            num_sms=0,
            cache_dtype=self.dtype,
            scale=1.0,
            window=0,
            page_size=0,
            scales="",
            has_few_rows=False,
            has_many=False,
        )

    @property
    def is_fp8(self) -> bool:
        return self.cache_dtype != self.dtype

    @property
    def scale_log2(self) -> float:
        return self.scale * LOG2_E

    def types(self) -> SimpleNamespace:
        """Return the types of the parameters of all prim_funcs."""
        names = "batch", "tokens", "heads", "kv_heads", "results", "num_seqlens", "table_rows", "table_pages", "scale_rows"
        batch, tokens, heads, kv_heads, results, num_seqlens, table_rows, table_pages, scale_rows = map(T.dynamic, names)
        pages = T.dynamic("pages")
        cache = (pages, self.page_size or T.dynamic("keys"), kv_heads, self.head_dim)
        scale = {"": (scale_rows,), "head": (kv_heads,), "page": (pages, kv_heads)}[self.scales]
        return SimpleNamespace(
            q=T.Tensor((batch, tokens, heads, self.head_dim), self.dtype),
            cache_k=T.Tensor(cache, self.cache_dtype),
            cache_v=T.Tensor(cache, self.cache_dtype),
            seqlens=T.Tensor((num_seqlens,), "int32"),
            page_table=T.Tensor((table_rows, table_pages), "int32"),
            k_scale=T.Tensor(scale, "float32"),
            v_scale=T.Tensor(scale, "float32"),
            sinks=T.Tensor((T.dynamic("num_sinks"),), "float32"),
            partial=T.Tensor((results, batch, tokens, heads, self.head_dim), "float32"),
            partial_lse=T.Tensor((results, batch, heads, tokens), "float32"),
            given=T.Tensor((batch, kv_heads, T.dynamic("splits"), T.dynamic("words")), "int64"),
            out=T.Tensor((batch, tokens, heads, self.head_dim), self.dtype),
            lse=T.Tensor((batch, heads, tokens), "float32"),
        )

"""`T.swiglu` and `T.silu_mul`: the activations between the two GEMMs of an expert.

    swiglu:   out = g * sigmoid(alpha * g) * (u + 1),  g = min(gate, limit),  u = clamp(up, -limit, limit)
    silu_mul: out = gate * sigmoid(gate) * up

| operand | shape | dtype | scope |
| --- | --- | --- | --- |
| gate_up | (M, 2 I): columns 2 i and 2 i + 1 (interleaved), or i and I + i (separated) | float32, float16, bfloat16 | any |
| out | (M, I) | float32, float16, bfloat16 | fragment, shared, global |

Each may be a buffer or a region of one. The result is computed in float32 and rounded once. A gate_up in a fragment is copied
through shared memory (M * 2 I elements), since its columns lie in other threads than those of out; not so the interleaved
result of T.mxfp4_scaled_matmul on Hopper, of which a thread has both columns.
"""

from __future__ import annotations

from collections.abc import Callable

import tilelang.language as T
from tilelang.utils.language import to_buffer_region
from tvm import tirx

from tilelang_ext.language.tile import Tile, readable, tile
from tilelang_ext.marks import COLUMN_PAIRS

_DTYPES = ("float32", "float16", "bfloat16")


def swiglu(gate_up, out, alpha: float = 1.702, limit: float = 7.0, gate: str = "interleaved") -> None:
    """Write gpt-oss's activation of `gate_up` to `out`.

    Raises TypeError for dtypes and scopes, ValueError for shapes and `gate`.
    """
    _activate("T.swiglu", gate_up, out, gate, lambda g, u: swiglu_of(g, u, alpha, limit))


def silu_mul(gate_up, out, gate: str = "separated") -> None:
    """Write silu(gate) * up of `gate_up` to `out`.

    Raises TypeError for dtypes and scopes, ValueError for shapes and `gate`.
    """
    _activate("T.silu_mul", gate_up, out, gate, silu_of)


def sigmoid_of(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return the logistic function of a float32."""
    return T.float32(1) / (T.float32(1) + T.exp(-x))


def swiglu_of(g: tirx.PrimExpr, u: tirx.PrimExpr, alpha: float, limit: float, sigmoid=sigmoid_of) -> tirx.PrimExpr:
    """Return gpt-oss's activation of one float32 gate and up."""
    g, u = _at_most(g, limit), -_at_most(-_at_most(u, limit), limit)
    return g * sigmoid(g * T.float32(alpha)) * (u + T.float32(1))


def silu_of(g: tirx.PrimExpr, u: tirx.PrimExpr, sigmoid=sigmoid_of) -> tirx.PrimExpr:
    """Return silu(g) * u of one float32 gate and up."""
    return g * sigmoid(g) * u


def clamped_silu_of(g: tirx.PrimExpr, u: tirx.PrimExpr, limit: float, sigmoid=sigmoid_of) -> tirx.PrimExpr:
    """Return silu(min(g, limit)) * clamp(u, -limit, limit) of one float32 gate and up, as DeepSeek-V4 has it."""
    return silu_of(_at_most(g, limit), -_at_most(-_at_most(u, limit), limit), sigmoid)


def _at_most(x: tirx.PrimExpr, limit: float) -> tirx.PrimExpr:
    """Return min(x, limit) that keeps NaN; the `min` of some targets drops it."""
    return T.Select(x > T.float32(limit), T.float32(limit), x)


def _activate(name: str, gate_up, out, gate: str, activation: Callable) -> None:
    if gate not in ("interleaved", "separated"):
        raise ValueError(f"{name}: gate must be 'interleaved' or 'separated'; got {gate!r}; gpt-oss is interleaved")
    x, o = tile(name, "gate_up", gate_up), tile(name, "out", out)
    for each in (x, o):
        each.check_dtype(*_DTYPES, hint="cast it")
    o.check_scope("fragment", "shared", "global")
    o.check_constant()
    M, I = o.shape
    x.check_shape(M, 2 * I, hint="gate and up together have twice the columns of out")

    def columns(i) -> tuple:
        return (2 * i, 2 * i + 1) if gate == "interleaved" else (i, I + i)

    @T.macro
    def activate():
        source = readable(x)
        for m, i in T.Parallel(M, I, annotations=_pairs(x, source, gate)):
            g, u = (T.cast(source[m, at], "float32") for at in columns(i))
            o.buffer[o.index(m, i)] = T.cast(activation(g, u), o.dtype)

    activate()


def _pairs(x: Tile, source: Tile, gate: str) -> dict | None:
    """Return the mark of a loop that reads neighbouring columns of a fragment from its copy."""
    if source is x or gate != "interleaved":
        return None
    return {COLUMN_PAIRS: [to_buffer_region(each.columns(0, each.shape[1])) for each in (x, source)]}

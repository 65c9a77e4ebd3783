"""`T.mxfp4_scaled_matmul`: GEMM of activations in 16, 8 or 4 bits with MXFP4 weights.

    C[i, j] += sum over k of (scale_a A)[i, k] * (scale_w W)[j, k]

| operand | shape | dtype | scope |
| --- | --- | --- | --- |
| A | (M, K); packed (M, K / 2) | bfloat16, float16 (a16w4); fp8 (a8w4); packed uint8 (a4w4) | shared, global, fragment |
| scale_a | a16w4: None; fp8: (M,), (M, 1) or (M, K / 32); a4w4: (M, K / 32) | float32 per row; uint8 or e8m0 per 32 | any |
| W_packed | (N, K / 2), low nibble = even k | uint8 | any |
| scale_w | (N, K / 32) | uint8 or e8m0 | any |
| C | (M, N) | float32, float16, bfloat16 | fragment, shared, global |

Each may be a buffer or a region of one. Operands become tiles of one 16-bit type in shared memory: A's own type, else bfloat16,
which holds every scaled E2M1 and fp8 value exactly to the ends of its range. Per-row scales multiply the accumulator. The
accumulator is float32 and C is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tilelang.language as T
from tilelang.utils.language import to_buffer_region
from tvm import tirx

from tilelang_ext.codes import decode
from tilelang_ext.formats import CODES_PER_BYTE, FP8_OPERANDS, MX_GROUP, format_of
from tilelang_ext.language.block_scaled import block_scaled
from tilelang_ext.language.e8m0 import e8m0_to_float
from tilelang_ext.language.mxfp4_dequant import SCALE_DTYPES, mxfp4_value, scale_tile
from tilelang_ext.language.tile import Tile, equal, readable, tile
from tilelang_ext.marks import ADDS_TOTAL, READ_ONCE

_NAME = "T.mxfp4_scaled_matmul"
_WIDE = ("bfloat16", "float16")
_FP8 = tuple(format.dtype for format in FP8_OPERANDS)
_ACCUMULATOR_DTYPES = ("float32", "float16", "bfloat16")
_STEPS = (128, 64, MX_GROUP)  # K elements that are decoded at a time
_DECODED_BYTES = 16 * 1024  # for decoded tiles: half of what the smallest target has


def mxfp4_scaled_matmul(A, scale_a, W_packed, scale_w, C, *, clear_accum: bool = False) -> None:
    """Add the product of activations and MXFP4 weights to C; with `clear_accum` overwrite C.

    What C held is never scaled. M and N are constants; K is a multiple of 32, and may be symbolic if A and W_packed are global.
    With a float16 A the weights are rounded to float16, which is exact for scale bytes 104 to 140.

    Raises TypeError for dtypes and scopes, ValueError for shapes.
    """
    a, w, c = tile(_NAME, "A", A), tile(_NAME, "W_packed", W_packed), tile(_NAME, "C", C)
    a.check_dtype(*_WIDE, *_FP8, "uint8", hint="cast A, or quantise it with T.mx_quantize")
    w.check_dtype("uint8", hint="pack two codes per byte, low nibble first")
    c.check_dtype(*_ACCUMULATOR_DTYPES, hint="cast after the product")
    for each in (a, c):
        each.check_scope("fragment", "shared", "global")
    c.check_constant()
    M, N = c.shape
    K = w.shape[1] * CODES_PER_BYTE
    if not equal(K % MX_GROUP, 0):
        raise ValueError(f"{_NAME}: K must be a multiple of {MX_GROUP}, which share a scale; got {K}; pad K with zeros")
    w.check_shape(N, w.shape[1], hint="its rows are the columns of C")
    a.check_shape(M, w.shape[1] if a.dtype == "uint8" else K, hint="its rows are those of C and its K that of W_packed")
    s_w = scale_tile(_NAME, "scale_w", scale_w, N, K)
    s_a, factor = _activation_scale(scale_a, a, M, K)
    if not isinstance(K, int) and not a.scope == w.scope == "global":
        raise ValueError(f"{_NAME}: K must be a constant but for global A and W_packed; got {K}; tile K")

    step = K if a.scope == "fragment" and a.dtype in _WIDE else _step(M, N, K)
    dtype = a.dtype if a.dtype in _WIDE else "bfloat16"
    as_it_is = a.dtype in _WIDE and a.scope != "global"
    adds = factor is None and not clear_accum and c.scope == "fragment" and c.dtype == "float32"
    adds_total = {ADDS_TOTAL: [to_buffer_region(c.columns(0, N))]} if adds else None

    # Constants reach macros as closures: a macro turns the numbers it is given into variables.
    @T.macro
    def scaled_matmul():
        a_read = a if as_it_is else readable(a)
        s_a_read = None if s_a is None else readable(s_a)
        w_read, s_w_read = readable(w), readable(s_w)
        total = T.alloc_fragment((M, N), "float32")
        W_s = T.alloc_shared((N, step), dtype)
        if not as_it_is:
            A_s = T.alloc_shared((M, step), dtype)
        T.clear(total)
        for t in T.serial(K // step, annotations=_mark(total, a_read, s_a_read, w_read, s_w_read, K)):
            for j, k in T.Parallel(N, step, annotations={READ_ONCE: 1}):
                W_s[j, k] = mxfp4_value(w_read, s_w_read, j, t * step + k, dtype)
            if as_it_is:
                T.gemm(_columns(a, t, step, K), W_s, total, transpose_B=True)
            else:
                for i, k in T.Parallel(M, step, annotations={READ_ONCE: 1}):
                    A_s[i, k] = _activation(a_read, s_a_read, i, t * step + k, dtype)
                T.gemm(A_s, W_s, total, transpose_B=True)
        for i, j in T.Parallel(M, N, annotations=adds_total):
            value = total[i, j] if factor is None else total[i, j] * factor(i)
            if clear_accum:
                c.buffer[c.index(i, j)] = T.cast(value, c.dtype)
            else:
                c.buffer[c.index(i, j)] = T.cast(T.cast(c.buffer[c.index(i, j)], "float32") + value, c.dtype)

    scaled_matmul()


def _columns(a: Tile, t, step: int, K):
    """Return the operand of T.gemm for step t: a fragment is used whole."""
    return a.buffer if a.scope == "fragment" else a.columns(0 if equal(step, K) else t * step, step)


def _mark(total, a: Tile, s_a: Tile | None, w: Tile, s_w: Tile, K) -> dict:
    """Return the annotation for targets that compute the whole product in another way."""
    A, scale_a, W, scale_w = (None if each is None else each.columns(0, each.shape[1]) for each in (a, s_a, w, s_w))
    return block_scaled(total, A, scale_a, W, scale_w, K)


def _activation(a: Tile, s: Tile | None, i, k, dtype: str) -> tirx.PrimExpr:
    """Return element (i, k) of A, times its scale if there is one per 32, as an expression of `dtype`."""
    if a.dtype == "uint8":
        return mxfp4_value(a, s, i, k, dtype)
    if a.dtype in _WIDE:
        return a[i, k]
    value = decode(T.reinterpret(a[i, k], "uint8"), format_of(a.dtype))
    return T.cast(value if s is None else value * e8m0_to_float(s[i, k // MX_GROUP]), dtype)


def _activation_scale(scale_a, a: Tile, M: int, K) -> tuple[Tile | None, Callable | None]:
    """Return (scales per 32, i -> scale of row i), with None for the kind that A does not have."""
    if a.dtype in _WIDE:
        if scale_a is not None:
            raise ValueError(f"{_NAME}: scale_a must be None for A in {a.dtype}; got {scale_a}; scale the result")
        return None, None
    if scale_a is None:
        raise ValueError(f"{_NAME}: scale_a must be given for A in {a.dtype}; got None; pass the scales of A")
    ndim = min(2, len(to_buffer_region(scale_a).region))
    s = tile(_NAME, "scale_a", scale_a, ndim)
    if a.dtype == "uint8" or s.dtype in SCALE_DTYPES:
        return scale_tile(_NAME, "scale_a", scale_a, M, K), None
    s.check_dtype("float32", *SCALE_DTYPES, hint="convert the scales")
    s.check_shape(*(M, 1)[:ndim], hint="one scale per row, sliced as A is")
    return None, lambda i: s[(i, 0)[:ndim]]


def _step(M: int, N: int, K) -> Any:
    """Return how many elements of K are decoded at a time: a divisor of K, since there is no partial step."""
    for step in _STEPS[:-1]:
        if isinstance(K, int) and K % step == 0 and (M + N) * step * 2 <= _DECODED_BYTES:
            return step
    return _STEPS[-1]

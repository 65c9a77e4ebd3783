"""The probabilities' way from the accumulator of one MMA to the left operand of the next, for any prim_func of tiles.

    T.gemm(q_s, k_s, S, transpose_B=True, policy=T.GemmWarpPolicy.FullRow)
    round_to_fragment(S, P)        or        round_to_shared(S, P_s)
    T.gemm(P, v_s, O, policy=T.GemmWarpPolicy.FullRow)

| way | P | targets | what it costs |
| --- | --- | --- | --- |
| `round_to_fragment` | T.alloc_fragment | tensor cores in 16 bits, Apple GPUs, CDNA | the rounding alone |
| `round_to_shared` | T.alloc_shared | all; other warps may multiply P | a store and a load per element, a barrier |

Both round to the nearest even, so that they give the same bits. Pictures of the layouts: docs/guide/attention.md.
"""

from tilelang_ext import language as T

_DTYPES = ("float16", "bfloat16", "float8_e4m3fn")
KEY_UNIT = 16  # columns of P of 8 bits that are reordered among themselves


def round_to_fragment(S, P) -> None:
    """P = S, rounded, in the registers that hold S. Each warp must have whole rows (T.GemmWarpPolicy.FullRow).

    S is a float32 fragment (rows, columns), P a fragment of the same shape, of 16 bits. TypeError for the dtype, ValueError for
    shapes and scopes.
    """
    _check("round_to_fragment", S, P, "local.fragment", "T.alloc_fragment")
    T.evaluate(T.copy(S, P))


def round_to_shared(S, P_s) -> None:
    """P_s = S, rounded, in shared memory in the swizzle that the next MMA reads.

    S is a float32 fragment (rows, columns), P_s a shared buffer of the same shape, of 16 bits or float8_e4m3fn. TypeError for
    the dtype, ValueError for shapes and scopes.
    """
    _check("round_to_shared", S, P_s, "shared", "T.alloc_shared")
    T.evaluate(T.copy(S, P_s))


def _check(name: str, S, P, scope: str, alloc: str) -> None:
    if str(S.dtype) != "float32" or str(P.dtype) not in _DTYPES:
        raise TypeError(f"{name}: S must be float32 and P one of {', '.join(_DTYPES)}; got {S.dtype} and {P.dtype}; cast S")
    if tuple(map(int, S.shape)) != tuple(map(int, P.shape)):
        raise ValueError(f"{name}: P must have the shape of S; got {list(P.shape)} and {list(S.shape)}; allocate it so")
    if S.scope() != "local.fragment" or not P.scope().startswith(scope):
        raise ValueError(
            f"{name}: S must be a fragment and P made by {alloc}; got {S.scope()} and {P.scope()}; use the other function"
        )


def key_of(column):
    """Return the column of S that is column `column` of a left operand of 8 bits, where P stays in its thread's registers.

    Of each 16, column 4 t + 2 h + i of the operand is column 8 h + 2 t + i of the accumulator, both of which thread t of four
    has. The right operand's rows are in the same order then.
    """
    return column // KEY_UNIT * KEY_UNIT + column % 4 // 2 * 8 + column % KEY_UNIT // 4 * 2 + column % 2

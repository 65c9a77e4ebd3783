"""The mark on statements that add a product times its scales to an accumulator: a backend may keep the sum across a loop.

The statements compute one step, which every target can do. In a loop over K, what does not depend on the step can wait for the
loop's end, and the next step's product need not wait for this one's additions.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx

from tilelang_ext.marks import SCALED_PRODUCT


def scaled_product(
    A, B, C, of_step: tuple[Callable, Callable], of_all_k: tuple[Callable, Callable], *, fast: bool
) -> dict[str, list]:
    """Return the annotation of the T.gemm that begins

        C[i, j] += (A[i, :] . B[j, :]) * of_step[0](i) * of_step[1](j) * of_all_k[0](i) * of_all_k[1](j)

    | operand | what |
    | --- | --- |
    | A, B | regions (M, K), (N, K) of an fp8 type in shared memory |
    | C | region (M, N) of a fragment |
    | of_step | factors of A's rows and B's rows that belong to these elements of K alone |
    | of_all_k | factors that are the same for all of K |
    | fast | whether a sum over many steps may stay in the matrix unit |

    The statements behind it that do nothing else have the annotation with an empty list: the T.gemm stands for them all.
    """
    i, j = tirx.Var("i", "int32"), tirx.Var("j", "int32")
    factors = [factor(var) for factor, var in zip((*of_step, *of_all_k), (i, j, i, j), strict=True)]
    return {SCALED_PRODUCT: [A, B, C, i, j, *factors, int(fast)]}

"""Copies and atomics between tiles of unlike shapes are one error that says the rule, in our language and in upstream's."""

import pytest
import tilelang
import tilelang.language as upstream
from tvm.target import Target

from tilelang_ext import language, metal
from tilelang_ext.rocm import program as rocm

RULE = r"^T\.{}: both tiles must have the same extents, but for axes of 1; got {}; index or slice the larger one, or take"


def kernel(use, T=language):
    """A kernel that calls use(T, tensors, shared tiles)."""

    def emit(*operands):
        return use(T, *operands)

    @language.prim_func
    def unlike(
        A: language.Tensor((64, 64), "float32"), C: language.Tensor((64,), "float32"), D: language.Tensor((2, 4, 64), "float32")
    ):  # fmt: skip
        with language.Kernel(1, threads=128):
            S = language.alloc_shared((4, 64), "float32")
            s = language.alloc_shared((64,), "float32")
            emit(A, C, D, S, s)

    return unlike


def lower(func, target):
    if target == "metal":
        return metal.lower(func)
    if target.startswith("hip"):
        return rocm.lower(func, target)
    described = Target({"kind": "cuda", "arch": "sm_80"} if target == "cuda" else target)
    with described:
        return tilelang.lower(func, target=described)


ATOMICS = ("atomic_add", "atomic_max", "atomic_min")


@pytest.mark.parametrize("name", ATOMICS)
@pytest.mark.parametrize(
    ("use", "got"),
    [
        (lambda f, A, C, D, S, s: f(C, S), r"S \(4, 64\) for C \(64\)"),
        (lambda f, A, C, D, S, s: f(C[0:64], S), r"S \(4, 64\) for C \(64\)"),
        (lambda f, A, C, D, S, s: f(C[0], S), r"S \(4, 64\) for an element of C \(64\)"),
        (lambda f, A, C, D, S, s: f(A, S), r"S \(4, 64\) for A \(64, 64\)"),
        (lambda f, A, C, D, S, s: f(D[0, :, :], s), r"s \(64\) for D \(1, 4, 64\)"),
        (lambda f, A, C, D, S, s: f(D[0:2, :, :], S), r"S \(4, 64\) for D \(2, 4, 64\)"),
    ],
)
def test_atomics(name, use, got):
    with pytest.raises(ValueError, match=RULE.format(name, got)):
        kernel(lambda T, *operands: use(getattr(T, name), *operands))


@pytest.mark.parametrize(
    ("use", "got"),
    [
        (lambda T, A, C, D, S, s: T.copy(S, C), r"S \(4, 64\) for C \(64\)"),
        (lambda T, A, C, D, S, s: T.copy(A, S), r"A \(64, 64\) for S \(4, 64\)"),
        (lambda T, A, C, D, S, s: T.copy(s, D[0, :, :]), r"s \(64\) for D \(1, 4, 64\)"),
        (lambda T, A, C, D, S, s: T.copy(C[0], S), r"an element of C \(64\) for S \(4, 64\)"),
    ],
)
def test_copies(use, got):
    with pytest.raises(ValueError, match=RULE.format("copy", got)):
        kernel(use)


@pytest.mark.parametrize("target", ["metal", "hip -mcpu=gfx942", "cuda", "c"])
def test_in_upstreams_language(target):
    """What upstream lets pass when it traces; the last was taken, and added to elements beside the tile."""
    for name, use, got in [
        ("copy", lambda T, A, C, D, S, s: T.copy(s, D[0, :, :]), r"s \(64\) for D \(1, 4, 64\)"),
        ("copy", lambda T, A, C, D, S, s: T.copy(A[0:8, :], S), r"A \(8, 64\) for S \(4, 64\)"),
        ("copy", lambda T, A, C, D, S, s: T.copy(S, A[0:2, 0:64]), r"S \(4, 64\) for A \(2, 64\)"),
        ("atomic_add", lambda T, A, C, D, S, s: T.atomic_add(D[0, :, :], s), r"s \(64\) for D \(1, 4, 64\)"),
        ("atomic_max", lambda T, A, C, D, S, s: T.atomic_max(A[0:8, 0:8], S), r"S \(4, 64\) for A \(8, 8\)"),
    ]:
        with pytest.raises(ValueError, match=RULE.format(name, f"({got})")):
            lower(kernel(use, upstream), target)


def test_what_matches_is_taken():
    @language.macro
    def matching(A, C, D, S, s):
        T = language
        T.copy(D[1, :, :], S)
        T.copy(C[0:32], s)  # the rest is upstream's to refuse
        T.copy(s, D[0, 0, 0])
        T.atomic_add(D[1, :, :], S)
        T.atomic_max(C, S[1, :])
        T.atomic_min(D[0, 0, 0], s)
        T.atomic_add(C[3], 1.0)

    for target in ("metal", "c"):
        lower(kernel(lambda T, *operands: matching(*operands)), target)

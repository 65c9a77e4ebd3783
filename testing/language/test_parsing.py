"""A source is parsed once, and what it meets the second time, values, names and kinds of statements, is what counts then."""

from types import SimpleNamespace

import pytest
from tilelang.language.eager import ast as upstream
from tilelang.language.eager import builder
from tvm import ir

from tilelang_ext import language as T


@pytest.fixture
def parsed(monkeypatch):
    """The names of the functions whose source is parsed."""
    names, get_ast = [], upstream.utils.get_ast
    monkeypatch.setattr(upstream.utils, "get_ast", lambda func: names.append(func.__name__) or get_ast(func))
    return names


def scaled_copy(size, dtype, factor, is_negative=False):
    @T.macro
    def store(A, C, i):
        if is_negative:
            C[i] = -A[i] * factor
        else:
            C[i] = A[i] * factor

    @T.prim_func
    def kernel(A: T.Tensor((size,), dtype), C: T.Tensor((size,), dtype)):
        with T.Kernel(1, threads=32):
            for i in T.Parallel(size):
                store(A, C, i)

    return kernel


CASES = [(64, "float32", 2.0), (32, "float16", 3.0), (64, "float32", 2.0, True)]


def test_kernels_of_one_source(parsed, monkeypatch):
    """Shapes, dtypes, constants and branches of Python are those of each call."""
    first, *others = [scaled_copy(*case) for case in CASES]
    assert sorted(parsed) in ([], ["kernel", "store"])  # the second time in one process: none
    monkeypatch.setattr(builder, "mutate", builder.mutate.__wrapped__)
    for kernel, case in zip((first, *others), CASES, strict=True):
        ir.assert_structural_equal(kernel, scaled_copy(*case))
    assert not ir.structural_equal(first, others[1])


def scope(space):
    def body(A):
        with space.Kernel(1):
            A[0] = 1

    return body


def test_a_context_may_begin_a_kernel(parsed):
    """Upstream asks what the name stands for, and writes other statements for `T.Kernel`."""
    spaces = [SimpleNamespace(Kernel=context) for context in (T.Kernel, T.attr, T.Kernel)]
    assert ["skip_kernel_ctx" in builder.mutate(scope(space)).source for space in spaces] == [True, False, True]
    assert parsed == ["body"] * 3


def test_a_variable_that_has_no_value_yet():
    """Upstream looks such a name up among the globals."""

    def function(is_early):
        value = None
        del value

        def body():
            return value

        made = builder.mutate(body) if is_early else None
        value = 3
        return made or builder.mutate(body)

    assert function(is_early=True).gen.__code__.co_freevars == ()
    assert function(is_early=False).gen.__code__.co_freevars == ("value",)

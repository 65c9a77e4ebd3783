"""Recipes of plans and their expressions: JSON, folded, and evaluated as the native launcher does."""

import ctypes
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launch.fakes import FakeCuda, launch, tensor
from launch.plan_parts import of_x, one_kernel, with_descriptor

from tilelang_ext.launch import expression
from tilelang_ext.launch.expression import OPERATORS, ceildiv, evaluate, shape


def test_recipes_are_json(cuda):
    """What is exported is what is read back."""
    given = torch.randn(20, 128)
    plan = with_descriptor(cuda)
    assert json.loads(json.dumps(plan.recipe)) == plan.recipe
    plan(given)


FACTS = {"a": 5, "b": -3, "c": 0}
leaves = st.integers(-(2**20), 2**20) | st.sampled_from([["value", name] for name in FACTS])


def operations(operands):
    by_count = {count: sorted(name for name in OPERATORS if OPERATORS_TAKE[name] == count) for count in (1, 2, 3)}
    return st.one_of(*(st.tuples(st.sampled_from(names), *[operands] * count).map(list) for count, names in by_count.items()))


OPERATORS_TAKE = {name: 3 if name == "select" else 1 if name in ("not", "power_of_two") else 2 for name in OPERATORS}


@settings(max_examples=300)
@given(st.recursive(leaves, operations, max_leaves=12), st.integers(-(2**20), 2**20))
def test_expressions_mean_the_same_natively(written, b):
    facts = {**FACTS, "b": b}
    cuda = FakeCuda()
    arguments = {"x": "tensor", **dict.fromkeys(FACTS, "int")}
    variant = {"tensors": [tensor("x", [None])], "steps": [launch("one_kernel", [["int64", written]])]}
    plan = cuda.plan("x", arguments, variant)
    try:
        wanted = evaluate(written, lambda kind, name: facts[name])
    except ZeroDivisionError:
        with pytest.raises(ValueError, match="a divisor must not be 0"):
            plan(torch.randn(1), *facts.values())
        return
    if not -(2**62) < wanted < 2**62:
        return
    plan(torch.randn(1), *facts.values())
    assert ctypes.c_int64(cuda.launches()[0].parameters[0]).value == wanted


def test_expressions_fold():
    n = shape("x", 0)
    assert ceildiv(100, 8) == 13
    assert (n * 1 + 0).recipe == ["shape", "x", 0]
    assert (2 * (n - 1)).recipe == ["*", ["-", ["shape", "x", 0], 1], 2]
    assert expression.substitute(ceildiv(n, 8), lambda fact: 100) == 13
    with pytest.raises(TypeError, match="must not be a condition of Python's"):
        bool(n == 3)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (["~", 1], "must be an operator with its operands"),
        (["+", 1], "got . of 1"),
        (["shape", "z", 0], "must name an argument; got z"),
    ],
)
def test_expressions_that_are_none(cuda, written, message):
    with pytest.raises(ValueError, match=message):
        of_x(cuda, [one_kernel(["int64", written])])

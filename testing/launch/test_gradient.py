"""Operators have no gradient: a backward pass that reaches one raises, whatever else it goes through."""

import pytest
import torch
from kernels.scaled_mm.operands import ROW, ROW_BLOCK, SQUARE_BLOCK, TENSOR, case

from tilelang_ext import scaled_mm

MESSAGE = "scaled_mm: has no gradient; got a backward pass through its result; call it under torch.no_grad"


@pytest.mark.parametrize("recipes", [(ROW, ROW), (TENSOR, TENSOR), (ROW_BLOCK, SQUARE_BLOCK)], ids=["row", "tensor", "block"])
@pytest.mark.parametrize("required", ["scale_a", "scale_b", "bias"])
@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
def test_backward_raises(recipes, required, given):
    (a, b, scale_a, recipe_a, scale_b, recipe_b), _ = case(5, 64, 256, recipes)
    inputs = {"scale_a": scale_a.clone(), "scale_b": scale_b.clone(), "bias": torch.zeros(64)}
    inputs[required].requires_grad_()
    out = torch.empty(5, 64) if given else None
    y = scaled_mm(
        a, b, inputs["scale_a"], recipe_a, inputs["scale_b"], recipe_b, bias=inputs["bias"], output_dtype=torch.float32, out=out
    )
    assert y.requires_grad
    other = torch.ones(5, 64, requires_grad=True)
    with pytest.raises(NotImplementedError, match=MESSAGE):
        (y * other).sum().backward()


def test_what_needs_no_gradient_costs_none():
    arguments, _ = case(5, 64, 256, (ROW, ROW))
    assert not scaled_mm(*arguments).requires_grad
    arguments[2].requires_grad_()
    with torch.no_grad():
        assert not scaled_mm(*arguments).requires_grad
    with torch.inference_mode():
        assert not scaled_mm(*arguments).requires_grad


def test_traced():
    """A compiled graph raises too."""
    (a, b, scale_a, recipe_a, scale_b, recipe_b), _ = case(5, 64, 256, (ROW, ROW))
    scale_a.requires_grad_()
    traced = torch.compile(lambda scale: scaled_mm(a, b, scale, recipe_a, scale_b, recipe_b), backend="aot_eager")
    with pytest.raises((NotImplementedError, RuntimeError), match="has no gradient"):
        traced(scale_a).sum().backward()

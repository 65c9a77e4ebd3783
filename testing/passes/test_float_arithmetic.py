"""Which expressions of floats a simplifier would change, and that they come through it as they were."""

import pytest
import tilelang  # noqa: F401  its TVM is found once it is imported
from tvm import IRModule, arith, ir, tirx

import tilelang_ext  # noqa: F401  whose library has the operator that hides
from tilelang_ext.passes.float_arithmetic import KeepFloatArithmetic, ReleaseFloatArithmetic

X, Y, B = tirx.Var("x", "float32"), tirx.Var("y", "float32"), tirx.decl_buffer((4,), "float16", "b")
I, J = tirx.Var("i", "int32"), tirx.Var("j", "int32")
C = tirx.const(1e8, "float32")


def kept(expr: tirx.PrimExpr) -> tirx.PrimExpr:
    return through(KeepFloatArithmetic, expr)


def through(transform, expr: tirx.PrimExpr) -> tirx.PrimExpr:
    func = tirx.PrimFunc([X, Y, B.data, I, J], tirx.Evaluate(expr))
    return transform(IRModule({"main": func}))["main"].body.value


@pytest.mark.parametrize(
    "expr",
    [
        X - X,
        (X + Y) - Y,
        (X + C) - C,
        X * Y - X * Y,
        B[0] - B[0],
        tirx.NE(X, X),
        tirx.EQ(X + Y, X + Y),
        tirx.Not(X < Y),
        tirx.Not(tirx.NE(X, Y)),
    ],
    ids=str,
)
def test_what_a_simplifier_would_change(expr):
    hidden = kept(expr)
    assert "keep" in str(hidden)
    simplified = arith.Analyzer().simplify(hidden)
    ir.assert_structural_equal(through(ReleaseFloatArithmetic, simplified), expr)


@pytest.mark.parametrize("expr", [X - Y, (X - Y) * (X + Y), X < Y, tirx.EQ(X, Y), I - I, tirx.Not(I < J), B[I] - B[J]], ids=str)
def test_what_stays(expr):
    ir.assert_structural_equal(kept(expr), expr)


def test_values_that_bindings_hide():
    """y = x + 1e8; y - 1e8: the simplifier sees through the name."""
    name = tirx.Var("name", "float32")
    body = tirx.SeqStmt([tirx.Bind(name, X + C), tirx.Evaluate(name - C)])
    assert "keep" in KeepFloatArithmetic(IRModule({"main": tirx.PrimFunc([X], body)})).script()


def test_products_with_zero_are_folded_when_they_are_written():
    """TVM's operators do it, before there is a program. When this fails, its row in docs/guide/language_support.md can go."""
    assert isinstance(X * 0.0, tirx.FloatImm)
    assert (X + 0.0).same_as(X)

"""Where conditions of a vectorised loop with a conversion go."""

import pytest
import tilelang  # noqa: F401  its TVM is found once it is imported
from tvm import IRModule, ir, tirx

from tilelang_ext.passes.guarded_casts import MoveGuardsOfCasts


def moved(func) -> list[str]:
    """Return the lines of the first loop and what is around it, after the pass."""
    text = MoveGuardsOfCasts(IRModule({"main": func}))["main"].script().splitlines()
    first = next(i for i, line in enumerate(text) if line.strip().startswith(("if ", "for ")))
    return [line.strip().replace("_1[", "[") for line in text[first:]]


def loop(body):
    """A loop of four lanes over `body(v, a)`, which is a statement; C, x and p are arrays, a a number."""
    C, x = (tirx.decl_buffer((4,), dtype, name) for name, dtype in (("C", "float16"), ("x", "float32")))
    p, a, v = tirx.decl_buffer((4,), "int32", "p"), tirx.Var("a", "int32"), tirx.Var("v", "int32")
    stmt = tirx.For(v, 0, 4, tirx.ForKind.VECTORIZED, body(C, x, p, a, v))
    return tirx.PrimFunc([C.data, x.data, p.data, a], tirx.SeqStmt([*map(tirx.DeclBuffer, (C, x, p)), stmt]))


def store(C, x, v, sign=1.0):
    return tirx.BufferStore(C, tirx.Cast("float16", tirx.BufferLoad(x, [v]) * sign), [v])


def if_(condition, then, otherwise=None):
    return tirx.IfThenElse(condition, then, otherwise)


def test_a_condition_of_all_lanes_goes_around():
    lines = moved(loop(lambda C, x, p, a, v: if_(a > 0, if_(p[v] > 0, store(C, x, v)))))
    assert lines[:3] == ["if a > 0:", "for v in T.vectorized(4):", "if p[v] > 0:"]


def test_conditions_of_lanes_become_one():
    lines = moved(loop(lambda C, x, p, a, v: if_(p[v] > 0, if_(p[v] > a, if_(a < 9, store(C, x, v))))))
    assert lines[:2] == ["for v in T.vectorized(4):", "if p[v] > 0 and p[v] > a and a < 9:"]


def test_two_branches_of_all_lanes():
    lines = moved(loop(lambda C, x, p, a, v: if_(a > 0, store(C, x, v), store(C, x, v, -1.0))))
    assert [line.split(" = ")[0] for line in lines] == [
        "if a > 0:",
        "for v in T.vectorized(4):",
        "C[v]",
        "else:",
        lines[1],
        "C[v]",
    ]


def test_two_branches_of_lanes_are_not_vectorised():
    lines = moved(loop(lambda C, x, p, a, v: if_(p[v] > 0, if_(a > 0, store(C, x, v), store(C, x, v, -1.0)))))
    assert lines[0] == "for v in range(4):"


def test_a_binding_before_the_conditions():
    def body(C, x, p, a, v):
        y = tirx.Var("y", "int32")
        return tirx.SeqStmt([tirx.Bind(y, p[v]), if_(y > 0, if_(y > 1, store(C, x, v)))])

    assert moved(loop(body))[:2] == ["for v in T.vectorized(4):", "if p[v] > 0 and p[v] > 1:"]


@pytest.mark.parametrize("case", ["one condition of lanes", "no cast", "no condition"])
def test_what_upstream_sees_stays(case):
    def body(C, x, p, a, v):
        if case == "no cast":
            return if_(a > 0, if_(p[v] > 0, tirx.BufferStore(p, a, [v])))
        return store(C, x, v) if case == "no condition" else if_(p[v] > 0, store(C, x, v))

    func = loop(body)
    ir.assert_structural_equal(MoveGuardsOfCasts(IRModule({"main": func}))["main"], func)

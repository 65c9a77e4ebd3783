"""What is drawn: every kind of mutant of Python and of C++, and nothing of words."""

from pathlib import Path

import pytest
from mutation import which_tests
from mutation.draw import draw, mutants_of

PYTHON = '''"""Docstring: 1 < 2."""
import os

def f(a: int = 3, *, b="1 + 1") -> "1":
    """a < 1"""
    x: int = a
    g(a, b, 4)
    x += a if not (a) <= x else (a) + b
    if a in b and x:
        raise ValueError(f"a: must be 1 + 1; got {a + 1}")
    return "é", a is True
'''
OF_PYTHON = [
    ("constant", "3", "4"),
    ("dropped statement", "g(a, b, 4)", "pass"),
    ("swapped arguments", "a, b", "b, a"),
    ("constant", "4", "5"),
    ("dropped statement", "x += a if not (a) <= x else (a) + b", "pass"),
    ("not", "not ", ""),
    ("comparison", "<=", "<"),
    ("operator", "+", "-"),
    ("comparison", "in", "not in"),
    ("and, or", "and", "or"),
    ("dropped statement", 'raise ValueError(f"a: must be 1 + 1; got {a + 1}")', "pass"),
    ("comparison", "is", "is not"),
    ("constant", "True", "False"),
]
CPP = """#include "a1.h"  // 1 < 2
static table = {
    {"abs", {}, R"(
  return x < 1;  // one < two
)"},
    {"exp", 7},
};
template <int N = 2>
void f(int a) {
  if (!a && a >= b) g(a, b);
  a = "4 + 4";
  b += a * 5;
}
"""
OF_CPP = [
    ("comparison", "<", "<="),
    ("constant", "1", "2"),
    ("dropped table row", '{"exp", 7},', ""),
    ("constant", "7", "8"),
    ("not", "!", ""),
    ("and, or", "&&", "||"),
    ("comparison", ">=", ">"),
    ("swapped arguments", "a, b", "b, a"),
    ("dropped statement", 'a = "4 + 4";', ""),
    ("dropped statement", "b += a * 5;", ""),
    ("operator", "+=", "-="),
    ("operator", "*", "/"),
    ("constant", "5", "6"),
]


@pytest.mark.parametrize(("path", "text", "expected"), [("a.py", PYTHON, OF_PYTHON), ("a.cc", CPP, OF_CPP)])
def test_mutants(path, text, expected):
    found = mutants_of(path, text)
    assert sorted((m.kind, text[m.start : m.end], m.replacement) for m in found) == sorted(expected)


def test_lines_and_order(tmp_path):
    (tmp_path / "a.py").write_text(PYTHON)
    mutants = list(draw(tmp_path, ["a.py"], seed=1))
    assert mutants == list(draw(tmp_path, ["a.py"], seed=1)) != list(draw(tmp_path, ["a.py"], seed=2))
    swapped = next(m for m in mutants if m.kind == "swapped arguments")
    assert swapped.lines(PYTHON) == (7, "g(a, b, 4)", "g(b, a, 4)")
    assert swapped.apply(PYTHON) == PYTHON.replace("g(a, b, 4)", "g(b, a, 4)")


def test_every_file_has_tests():
    for folder in ("tilelang_ext", "src"):
        for path in (which_tests.ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cc", ".h"):
                name = str(Path(path).relative_to(which_tests.ROOT))
                assert which_tests.tests_of(name), name

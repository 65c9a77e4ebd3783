"""docs/api/index.md has the signatures and docstrings of today, of every public name."""

import runpy
from pathlib import Path

import pytest

import tilelang_ext

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "docs" / "generate_api.py"))


@pytest.fixture(scope="module")
def page(script):
    return script["generate"]()


def test_page_is_up_to_date(page):
    assert (ROOT / "docs" / "api" / "index.md").read_text() == page, "out of date: run python docs/generate_api.py"


def test_every_public_name_has_a_section(script, page):
    names = [name for name in tilelang_ext.__all__ if callable(getattr(tilelang_ext, name))]
    names += [f"T.{name}" for name in script["language_names"]()]
    assert "simulate" in names
    assert "T.fp8_scaled_matmul" in names
    assert [name for name in names if f"\n### {name}\n" not in page] == []


def test_signature(script):
    def long(first: int, *rest, keyword_only_with_a_long_name: str = "a", another_keyword_only: dict | None = None) -> list:
        """Has too many characters for a line."""

    def bare_star(first, *, second="b"):
        pass

    assert script["signature"]("f", bare_star) == '```python\nf(first, *, second="b")\n```\n'
    many = script["signature"]("a_long_name_of_a_function", long).splitlines()
    assert many[1:-1] == [
        "a_long_name_of_a_function(",
        "    first: int,",
        "    *rest,",
        '    keyword_only_with_a_long_name: str = "a",',
        "    another_keyword_only: dict | None = None,",
        ") -> list",
    ]


def test_a_name_without_docstring_is_an_error(script):
    with pytest.raises(SystemExit, match="undocumented: a public name must have a docstring"):
        script["documentation"](type("undocumented", (), {}))

"""docs/design/architecture.md shows what the program prints today, on every supported tilelang."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "docs" / "update_architecture.py"))


def test_document_is_up_to_date(script):
    document = (ROOT / "docs" / "design" / "architecture.md").read_text()
    for name, text in script["generate"]().items():
        assert text in document, f"block {name!r} is out of date: run python docs/update_architecture.py\n{text}"


def test_a_missing_block_is_named(script):
    with pytest.raises(SystemExit, match="generated: metal"):
        script["update"]("no blocks here", {"metal": "text"})

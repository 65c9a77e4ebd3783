"""Every relative link of a page leads to a file of the checkout, every anchor to a heading; pages that sources name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmark").rglob("*.md")])


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    assert not broken_links(page)


def test_pages_that_sources_name():
    folders = ("tilelang_ext", "tilelang_ext_cli", "testing", "benchmark", "examples", "src")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".h", ".cc")]
    named = {(page, path.name) for path in sources for page in re.findall(r"\bdocs/[\w/]+\.md\b", path.read_text())}
    assert ("docs/design/performance.md", "sm90_persistent.py") in named
    assert [(page, name) for page, name in sorted(named) if not (ROOT / page).exists()] == []


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One heading\n[a](#one-heading) [b](page.md) [c](#two) [d](other.md) [e](https://nowhere)\n")
    assert broken_links(page) == ["#two", "other.md"]

"""The documents' links lead somewhere, the files that they name exist, and README and decisions list what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import alfb_dist

PACKAGE = Path(alfb_dist.__file__).parent
ROOT = PACKAGE.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "launch" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
whole_package = pytest.mark.skipif(not (PACKAGE / "cpu").is_dir(), reason="the pages describe the package with cpu")


def headings(page: Path) -> list[str]:
    """A page's headings below the title, without code blocks."""
    return re.findall(r"^##+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)


def anchor(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, fragment = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not fragment or fragment in map(anchor, headings(there)), target


@whole_package
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page: Path) -> None:
    """In code style: a path in the repository, or in the package."""
    for name in re.findall(r"`((?:[\w-]+/)+[\w.-]*)[:`]", page.read_text()):
        if name.split("/")[0] in {p.name for p in (*ROOT.iterdir(), *PACKAGE.iterdir())} - {"runs"}:
            assert (ROOT / name).exists() or (PACKAGE / name).exists(), name


@whole_package
def test_readme_has_a_line_for_each_package() -> None:
    listed = re.findall(r"^  (\w+)/ ", (ROOT / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def test_decisions_have_an_index_in_their_order() -> None:
    page = ROOT / "docs" / "decisions.md"
    entries = re.findall(r"^### (.+)$", page.read_text(), re.M)
    assert re.findall(r"^  \[(.+)\]\(#", page.read_text(), re.M) == entries
    assert len(re.findall(r"^### .+\n2026-\d\d-\d\d[.,]", page.read_text(), re.M)) == len(entries)

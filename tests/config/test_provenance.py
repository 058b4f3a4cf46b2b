"""Facts that ranks and hosts compare before a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from alfb_dist.config import provenance
from alfb_dist.config.provenance import facts

PACKAGE = Path(provenance.__file__).parents[1]
COMPARED = (".py", ".c", ".h")


@pytest.fixture
def copied_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the package, which `facts` then reads."""
    copy = tmp_path / "alfb_dist"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "__file__", str(copy / "config" / "provenance.py"))
    return copy


@pytest.mark.parametrize("suffix", COMPARED)
def test_hash_changes_with_the_content_and_the_name_of_a_file(copied_package: Path, suffix: str) -> None:
    file = copied_package / "data" / f"new{suffix}"
    found = [facts()]
    file.write_text("a")
    found.append(facts())
    file.write_text("b")
    found.append(facts())
    file.rename(file.with_stem("renamed"))
    found.append(facts())
    assert len({known.pop("hash of alfb_dist's files") for known in found}) == 4
    assert all(known == found[0] for known in found)


def test_facts_hold_versions() -> None:
    assert {"python", "torch", "deepspeed", "transformers", "alfb_dist"} <= facts().keys()


def test_every_kind_of_source_file_is_hashed() -> None:
    suffixes = {path.suffix for path in PACKAGE.rglob("*") if path.is_file() and path.parent.name != "__pycache__"}
    assert suffixes - {".typed"} <= set(COMPARED)


def test_hash_ignores_byte_code(copied_package: Path) -> None:
    before = facts()
    (copied_package / "__pycache__").mkdir()
    (copied_package / "__pycache__" / "x.cpython-311.pyc").write_bytes(b"x")
    assert facts() == before

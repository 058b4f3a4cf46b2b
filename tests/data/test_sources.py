"""Sources: which files are documents, under which names, in which order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alfb_dist.data import PYTHON_STDLIB
from alfb_dist.data.sources import Document, find_documents, read_text


def plant(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def names(documents: list[Document]) -> list[str]:
    return [document.name for document in documents]


def test_a_directory_gives_its_files_sorted_by_relative_path(tmp_path: Path) -> None:
    plant(tmp_path / "in", b_txt="1", a__z_txt="2", a__b__c_txt="3", a_txt="4")
    found = find_documents([tmp_path / "in"])
    assert names(found) == ["a.txt", "a/b/c.txt", "a/z.txt", "b.txt"]
    assert [read_text(d) for d in found] == ["4", "3", "2", "1"]
    assert [d.num_bytes for d in found] == [1] * 4


def test_hidden_files_caches_and_the_excluded_directory_are_not_documents(tmp_path: Path) -> None:
    plant(tmp_path, a_txt="1", out__b_txt="2", c__out__d_txt="3")
    for hidden in (".git/x", ".hidden", "c/__pycache__/y.pyc"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_text("no")
    assert names(find_documents([tmp_path], without=tmp_path / "out")) == ["a.txt", "c/out/d.txt"]
    assert names(find_documents([tmp_path])) == ["a.txt", "c/out/d.txt", "out/b.txt"]


def test_sources_keep_their_order_and_a_file_reached_twice_counts_once(tmp_path: Path) -> None:
    plant(tmp_path, one__b_txt="1", one__c__a_txt="2", two__a_txt="3")
    (tmp_path / "two/link.txt").symlink_to(tmp_path / "one/b.txt")
    sources = [tmp_path / "two", tmp_path / "one/c/a.txt", tmp_path / "one", tmp_path / "two/a.txt"]
    assert names(find_documents(sources)) == ["a.txt", "link.txt", "a.txt"]


def test_a_relative_path_names_the_same_documents_as_an_absolute_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, in__a_txt="1", in__b__c_txt="2")
    monkeypatch.chdir(tmp_path)
    assert find_documents(["in"]) == find_documents([tmp_path / "in"])
    assert names(find_documents(["."])) == ["in/a.txt", "in/b/c.txt"]


def test_a_missing_source_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/absent does not exist"):
        find_documents([tmp_path / "absent"])


def test_text_is_read_unchanged_and_is_none_if_not_utf8(tmp_path: Path) -> None:
    contents = ["line\r\nend\n\ufeffé".encode(), b"\xff\xfe\x00", "é".encode("latin-1")]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}").write_bytes(content)
    assert [read_text(d) for d in find_documents([tmp_path])] == ["line\r\nend\n\ufeffé", None, None]


def test_the_standard_library_is_its_sources_without_tests_and_packages() -> None:
    found = find_documents([PYTHON_STDLIB])
    assert names(found) == sorted(names(found))
    assert {"os.py", "json/decoder.py", "asyncio/base_events.py", "typing.py"} <= set(names(found))
    assert all(name.endswith(".py") for name in names(found))
    directories = {directory for name in names(found) for directory in name.split("/")[:-1]}
    assert not directories & {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    assert not [name for name in names(found) if name.startswith("_sysconfigdata")]
    assert sum(d.num_bytes for d in found) > 5_000_000
    assert (found[0].path.parent / "os.py").samefile(os.__file__)

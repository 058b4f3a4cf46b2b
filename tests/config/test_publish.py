"""A published file is the old one or the new one, never a part of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alfb_dist.config.publish import publish


def test_the_old_file_stands_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with publish(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), publish(path) as temporary:
        temporary.write_text("né", encoding="ascii")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with publish(path) as first, publish(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # whose block ends last
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "file", []

    def fsync(fd: int) -> None:
        seen.append((Path(os.readlink(f"/proc/self/fd/{fd}")), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with publish(path, sync_to_disk=True) as temporary:
        temporary.write_text("new")
    assert seen == [(temporary, False), (tmp_path, True)]
    with publish(path) as temporary:
        temporary.write_text("newer")
    assert len(seen) == 2

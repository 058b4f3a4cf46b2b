"""The newest good save is found, old ones are removed, and a save that is being replaced is never missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoint_saves import fabricate, flip_some_bit

from alfb_dist import checkpoint
from alfb_dist.checkpoint import files, folder, manifest


def _names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir() if path.is_dir())


def test_the_newest_good_save_is_found_by_step_not_by_name_or_time(tmp_path: Path) -> None:
    for step in (900, 123456789, 1000):
        fabricate(tmp_path, step)
    assert checkpoint.newest_good(tmp_path) == (tmp_path / "step-123456789", [])


def test_an_empty_or_missing_directory_has_no_save(tmp_path: Path) -> None:
    assert checkpoint.newest_good(tmp_path) == (None, [])
    assert checkpoint.newest_good(tmp_path / "none") == (None, [])


def test_damaged_and_unfinished_saves_are_passed_over_and_named(tmp_path: Path) -> None:
    good = fabricate(tmp_path, 1)
    flip_some_bit(fabricate(tmp_path, 2) / "tensors-00000-000.safetensors", 0)
    (fabricate(tmp_path, 3) / "manifest.json").unlink()
    folder.start(tmp_path / "step-00000004")
    (tmp_path / "latest").write_text("step-00000003\n")
    path, skipped = checkpoint.newest_good(tmp_path)
    assert path == good
    assert [line.split(":")[0] for line in skipped] == ["step-00000003", "step-00000002"]
    assert "manifest.json cannot be read" in skipped[0]
    assert "tensors-00000-000.safetensors is damaged" in skipped[1]


def test_latest_names_the_save_last_made(tmp_path: Path) -> None:
    fabricate(tmp_path, 2)
    fabricate(tmp_path, 1)
    assert (tmp_path / "latest").read_text() == "step-00000001\n"


def test_a_save_replaces_one_of_the_same_step(tmp_path: Path) -> None:
    first = manifest.read(fabricate(tmp_path, 5))
    (tmp_path / "step-00000005/first").write_text("")
    assert manifest.read(fabricate(tmp_path, 5)) == first
    assert _names(tmp_path) == ["step-00000005"]
    assert not (tmp_path / "step-00000005/first").exists()


def test_a_save_being_replaced_is_found_until_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fabricate(tmp_path, 4)
    fabricate(tmp_path, 5)
    rename, calls = files.rename, []

    def fail_second(old: Path, new: Path) -> None:
        calls.append(new)
        if len(calls) == 2:
            raise OSError("power cut")
        rename(old, new)

    monkeypatch.setattr(files, "rename", fail_second)
    with pytest.raises(OSError, match="power cut"):
        fabricate(tmp_path, 5)
    monkeypatch.undo()
    assert checkpoint.newest_good(tmp_path) == (tmp_path / "step-00000005.old", [])
    assert fabricate(tmp_path, 5) == checkpoint.newest_good(tmp_path)[0]
    assert _names(tmp_path) == ["step-00000004", "step-00000005"]


def test_prune_keeps_the_newest_and_removes_what_is_unfinished(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        fabricate(tmp_path, step)
    folder.start(tmp_path / "step-00000007")
    assert checkpoint.prune(tmp_path, 2) == [tmp_path / "step-00000002", tmp_path / "step-00000001"]
    assert _names(tmp_path) == ["step-00000003", "step-00000004"]


def test_prune_never_removes_the_newest_good_save(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        fabricate(tmp_path, step)
    flip_some_bit(tmp_path / "step-00000003/state.json", 1)
    (tmp_path / "step-00000002/manifest.json").unlink()
    assert checkpoint.prune(tmp_path, 1) == []
    assert checkpoint.newest_good(tmp_path)[0] == tmp_path / "step-00000001"
    assert checkpoint.prune(tmp_path, 1, known_good=tmp_path / "step-00000003") == [tmp_path / "step-00000001"]


def test_prune_keeps_a_save_made_after_a_return_to_an_earlier_step(tmp_path: Path) -> None:
    for step in (1, 7, 8, 9, 2):
        fabricate(tmp_path, step)
    checkpoint.prune(tmp_path, 2, known_good=tmp_path / "step-00000002")
    assert _names(tmp_path) == ["step-00000002", "step-00000008", "step-00000009"]


def test_prune_to_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        checkpoint.prune(tmp_path, 0)

"""Preparation: every document goes to one side, once, however often and by however many processes it is prepared."""

from __future__ import annotations

import multiprocessing as mp
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from alfb_dist.data import PreparedData, TokenFile, TokenFileError, prepare
from alfb_dist.data.preparation import split_by_name


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Sixty text files in nested directories."""
    chance = random.Random(0)
    for i in range(60):
        path = tmp_path / "texts" / f"part{i % 4}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{i}: é\r\n".encode() + "".join(chance.choices("abc \n", k=chance.randint(1, 80))).encode())
    return tmp_path / "texts"


def documents(path: Path) -> list[bytes]:
    """The documents of a token file of bytes."""
    with TokenFile(path) as file:
        rows = [file.document(i).tolist() for i in range(file.num_documents)]
    assert all(row[-1] == 256 for row in rows)
    return [bytes(row[:-1]) for row in rows]


def contents(data: PreparedData) -> tuple[bytes, bytes]:
    return data.train.read_bytes(), data.validation.read_bytes()


def test_every_file_is_a_document_of_one_side_byte_by_byte(texts: Path, tmp_path: Path) -> None:
    data = prepare([texts], tmp_path / "cache", validation_fraction=0.3, block_bytes=256)
    sides = documents(data.train), documents(data.validation)
    assert sorted(sides[0] + sides[1]) == sorted(path.read_bytes() for path in texts.rglob("*.txt"))
    assert 8 < len(sides[1]) < 30
    order = sorted(texts.rglob("*.txt"), key=lambda path: path.relative_to(texts).as_posix())
    for side in sides:
        assert side == [content for content in (path.read_bytes() for path in order) if content in side]


def test_a_document_keeps_its_side_when_moved_and_when_others_are_added(texts: Path, tmp_path: Path) -> None:
    first = prepare([texts], tmp_path / "cache", validation_fraction=0.3)
    moved = tmp_path / "elsewhere" / "deep"
    shutil.copytree(texts, moved)
    for i in range(40):
        (moved / f"new{i}.txt").write_text(f"new {i}")
    second = prepare([moved], tmp_path / "cache", validation_fraction=0.3)
    assert set(documents(first.train)) < set(documents(second.train))
    assert set(documents(first.validation)) < set(documents(second.validation))


def test_the_split_of_these_names_never_changes() -> None:
    names = ["a.txt", "b.txt", "part/c.txt", "é.txt", "d/e/f.py", "os.py", "json/decoder.py", "x"]
    assert [n for n, held_out in zip(names, split_by_name(names, 0.4)) if held_out] == [
        "b.txt",
        "é.txt",
        "os.py",
        "json/decoder.py",
    ]


def test_no_side_is_ever_empty() -> None:
    for count in (2, 3, 10):
        for fraction in (1e-9, 0.5, 1 - 1e-9):
            for trial in range(20):
                chosen = split_by_name([f"{trial}-{i}" for i in range(count)], fraction)
                assert 0 < sum(chosen) < count


def test_preparing_again_writes_nothing_and_changes_nothing(texts: Path, tmp_path: Path) -> None:
    first = prepare([texts], tmp_path / "cache")
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in (first.train, first.validation)]
    assert prepare(texts, str(tmp_path / "cache")) == first
    assert [(path.stat().st_ino, path.stat().st_mtime_ns) for path in (first.train, first.validation)] == before


def test_equal_text_gives_equal_bytes_in_another_cache(texts: Path, tmp_path: Path) -> None:
    assert contents(prepare([texts], tmp_path / "one")) == contents(prepare([texts], tmp_path / "two"))


def test_a_changed_source_or_setting_is_prepared_again(texts: Path, tmp_path: Path) -> None:
    kept = [prepare([texts], tmp_path / "cache")]
    kept.append(prepare([texts], tmp_path / "cache", validation_fraction=0.2))
    (texts / "part0" / "0.txt").write_text("changed")
    kept.append(prepare([texts], tmp_path / "cache"))
    (texts / "part0" / "0.txt").rename(texts / "part0" / "renamed.txt")
    kept.append(prepare([texts], tmp_path / "cache"))
    os.utime(texts / "part1" / "1.txt", ns=(1, 1))
    kept.append(prepare([texts], tmp_path / "cache"))
    assert len({data.train for data in kept}) == 5
    assert b"changed" in documents(kept[2].train) + documents(kept[2].validation)


def test_a_cache_among_its_own_sources_is_not_a_source(texts: Path) -> None:
    first = prepare([texts], texts / "cache")
    assert prepare([texts], texts / "cache") == first
    assert first.num_undecodable == 0


def test_empty_and_undecodable_files_are_left_out_and_counted(texts: Path, tmp_path: Path) -> None:
    for i in range(3):
        (texts / f"empty{i}").touch()
    for i in range(2):
        (texts / f"binary{i}").write_bytes(b"\xff\x00\xfe")
    for _ in range(2):  # made, then found in the cache
        data = prepare([texts], tmp_path / "cache")
        assert (data.num_empty, data.num_undecodable) == (3, 2)
    assert len(documents(data.train) + documents(data.validation)) == 60


def test_too_few_documents_are_refused_with_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="0 of the 0 files found"):
        prepare([tmp_path / "in"], tmp_path / "cache")
    (tmp_path / "in" / "a").write_text("text")
    (tmp_path / "in" / "b").write_bytes(b"\xff")
    (tmp_path / "in" / "c").touch()
    with pytest.raises(ValueError, match=r"1 of the 3 files found are text \(1 empty, 1 not UTF-8\).*at least 2 text"):
        prepare([tmp_path / "in"], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_a_fraction_that_leaves_no_split_is_refused(texts: Path, tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ValueError, match="validation_fraction"):
        prepare([texts], tmp_path / "cache", validation_fraction=fraction)


def test_documents_without_tokens_are_counted_as_empty(texts: Path, tmp_path: Path) -> None:
    import tokenizers

    vocabulary = {"[UNK]": 0, "[EOS]": 1, "a": 2, "b": 3, "c": 4}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    (texts / "blank.txt").write_text(" \n ")
    (texts / "known.txt").write_text("c a b b")
    data = prepare([texts], tmp_path / "cache", tokenizer=tmp_path / "tokenizer.json")
    assert (data.num_empty, data.num_undecodable) == (1, 0)
    with TokenFile(data.train) as train, TokenFile(data.validation) as validation:
        assert (train.vocab_size, train.end_id, train.index.dtype) == (5, 1, "uint16")
        rows = [file.document(i).tolist() for file in (train, validation) for i in range(file.num_documents)]
    assert len(rows) == 61
    assert [4, 2, 3, 3, 1] in rows


def test_damage_to_the_cached_files_is_named(texts: Path, tmp_path: Path) -> None:
    data = prepare([texts], tmp_path / "cache")
    os.truncate(data.validation, 200)
    with pytest.raises(TokenFileError, match=f"{data.validation}.*at byte 200"):
        prepare([texts], tmp_path / "cache")


def test_a_failed_preparation_leaves_no_files(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        prepare([texts], tmp_path / "cache")
    monkeypatch.undo()
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(documents(prepare([texts], tmp_path / "cache").train)) > 40


def test_the_second_process_to_finish_uses_the_files_of_the_first(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one finishes between this one's last write and its rename."""
    rename = Path.rename
    others: list[PreparedData] = []

    def late(temporary: Path, directory: Path) -> Any:
        monkeypatch.setattr(Path, "rename", rename)
        others.append(prepare([texts], tmp_path / "cache"))
        return rename(temporary, directory)

    monkeypatch.setattr(Path, "rename", late)
    assert prepare([texts], tmp_path / "cache") == others[0]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [others[0].train.parent.name]
    assert len(documents(others[0].train) + documents(others[0].validation)) == 60


@pytest.mark.parametrize("progress", [False, True])
def test_progress_is_shown_on_standard_error_on_request(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], progress: bool
) -> None:
    prepare([texts], tmp_path / "cache", progress=progress)
    shown = capsys.readouterr()
    assert ("tokenising" in shown.err) == progress
    assert shown.out == ""


def test_validation_sources_hold_out_exactly_their_own_text(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.txt").write_text(f"train {i}")
    (tmp_path / "b" / "0.txt").write_text("held out")
    prepared = prepare([tmp_path / "a"], tmp_path / "cache", validation_sources=[tmp_path / "b"])
    with TokenFile(prepared.train) as train, TokenFile(prepared.validation) as validation:
        assert train.num_documents == 3
        assert bytes(validation.document(0)[:-1].tolist()) == b"held out"


def test_a_pair_of_token_files_is_used_directly_and_a_single_one_refused(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    made = prepare([tmp_path], tmp_path / "cache")
    given = prepare([made.train], tmp_path / "other", validation_sources=[made.validation])
    assert (given.train, given.validation) == (made.train, made.validation)
    with pytest.raises(ValueError, match="come in pairs"):
        prepare([made.train], tmp_path / "other")


def _prepare_at_once(start: Any, texts: Path, cache: Path, results: Any) -> None:
    start.wait()
    results.put(prepare([texts], cache))


def test_processes_that_race_end_up_with_one_set_of_files(texts: Path, tmp_path: Path) -> None:
    context = mp.get_context("forkserver")
    start, results = context.Barrier(2), context.SimpleQueue()
    racers = [
        context.Process(target=_prepare_at_once, args=(start, texts, tmp_path / "cache", results)) for _ in range(2)
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    first, second = results.get(), results.get()
    assert first == second
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.train.parent.name]
    assert contents(first) == contents(prepare([texts], tmp_path / "alone"))

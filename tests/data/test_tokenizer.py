"""Tokenizers: the ids are the tokenizer's own, with nothing cut or added."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from alfb_dist.data.tokenizer import load_tokenizer

TEXTS = ["the cat sat on the mat", "a cat and a hat", "é ü 猫"]


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
    """A byte-level BPE that cuts and pads, as files saved after training often do."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(TEXTS * 5, trainer)
    model.enable_truncation(3)
    model.enable_padding(length=8, pad_token="<pad>", pad_id=0)
    return model


@pytest.fixture
def saved(trained: tokenizers.Tokenizer, tmp_path: Path) -> Path:
    trained.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_bytes_are_the_utf8_bytes_and_256_ends() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.end_id) == (257, 256)
    assert [row.tolist() for row in tokenizer.encode(["aé", "\n"])] == [[97, 195, 169], [10]]


@pytest.mark.parametrize("form", ["file", "directory"])
def test_ids_decode_to_the_whole_text_without_padding_or_additions(
    saved: Path, trained: tokenizers.Tokenizer, form: str
) -> None:
    tokenizer = load_tokenizer(saved / "tokenizer.json" if form == "file" else saved)
    encoded = [row.tolist() for row in tokenizer.encode(TEXTS)]
    assert [trained.decode(row, skip_special_tokens=False) for row in encoded] == TEXTS
    assert len(encoded[0]) > 3
    assert tokenizer.end_id == trained.token_to_id("</s>")
    assert tokenizer.vocab_size == trained.get_vocab_size()


def test_fingerprint_depends_on_content_and_end_token(saved: Path) -> None:
    path = saved / "tokenizer.json"
    first = load_tokenizer(path).fingerprint
    assert load_tokenizer(path).fingerprint == first
    assert load_tokenizer(path, end_token="<pad>").fingerprint != first
    path.write_text(path.read_text() + "\n")
    assert load_tokenizer(path).fingerprint != first


def test_a_missing_end_token_is_refused(saved: Path) -> None:
    for path in (saved, saved / "tokenizer.json"):
        assert load_tokenizer(path, end_token="<pad>").end_id == 0
        with pytest.raises(ValueError, match=r"tried <end>"):
            load_tokenizer(path, end_token="<end>")
    (saved / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match="no end-of-document token"):
        load_tokenizer(saved)


def test_a_path_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/absent does not exist"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=f"{tmp_path}/bad.json cannot be read"):
        load_tokenizer(tmp_path / "bad.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}/empty cannot be read"):
        load_tokenizer(tmp_path / "empty")

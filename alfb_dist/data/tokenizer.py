"""Text to token ids: by bytes, by a `tokenizers` file, or by a transformers tokenizer directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

BYTES = "bytes"
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")
_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "config.json")


@dataclass(frozen=True)
class Tokenizer:
    """Encodes texts; ids are below vocab_size, end_id is the end-of-document token.

    encode: a list of texts to a list of (N,) integer arrays, without special tokens, truncation or padding.
    fingerprint: differs between tokenizers that may encode differently.
    """

    vocab_size: int
    end_id: int
    fingerprint: str
    encode: Callable[[list[str]], list[NDArray[Any]]]


def load_tokenizer(tokenizer: str | Path, end_token: str | None = None) -> Tokenizer:
    """Load a tokenizer by name or path, from local files only.

    tokenizer: "bytes" (ids 0..255 are the bytes of the UTF-8 text, 256 ends a document), a tokenizer.json, or a
    directory that transformers' AutoTokenizer loads. end_token: the token that ends a document; by default the
    directory's end-of-sequence token, or the first of END_TOKENS that the file has.
    Raises ValueError if the path does not exist, cannot be read or has no end token.
    """
    if tokenizer == BYTES:
        return Tokenizer(257, 256, "bytes-1", _encode_bytes)
    path = Path(tokenizer)
    if path.is_dir():
        return _from_directory(path, end_token)
    if path.is_file():
        return _from_file(path, end_token)
    raise ValueError(f'tokenizer {tokenizer} does not exist: give "{BYTES}", a tokenizer.json or a tokenizer directory')


def _encode_bytes(texts: list[str]) -> list[NDArray[Any]]:
    return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]


def _from_file(path: Path, end_token: str | None) -> Tokenizer:
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer {path} cannot be read: {error}") from error
    model.no_truncation()  # both may be set in the file
    model.no_padding()
    vocabulary = model.get_vocab(with_added_tokens=True)
    candidates = END_TOKENS if end_token is None else (end_token,)
    end_id = next((vocabulary[token] for token in candidates if token in vocabulary), None)

    def encode(texts: list[str]) -> list[NDArray[Any]]:
        return [np.asarray(e.ids, np.int64) for e in model.encode_batch(texts, add_special_tokens=False)]

    return _checked(path, [path], vocabulary, end_id, candidates, encode)


def _from_directory(path: Path, end_token: str | None) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        model = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {path} cannot be read: {error}") from error
    vocabulary = model.get_vocab()
    candidates = (model.eos_token,) if end_token is None else (end_token,)
    files = sorted({file for pattern in _TOKENIZER_FILES for file in path.glob(pattern) if file.is_file()})

    def encode(texts: list[str]) -> list[NDArray[Any]]:
        rows = model(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)["input_ids"]
        return [np.asarray(row, np.int64) for row in rows]

    return _checked(path, files, vocabulary, vocabulary.get(candidates[0]), candidates, encode)


def _checked(
    path: Path,
    files: list[Path],
    vocabulary: dict[str, int],
    end_id: int | None,
    candidates: tuple[str | None, ...],
    encode: Callable[[list[str]], list[NDArray[Any]]],
) -> Tokenizer:
    """Return the tokenizer with its fingerprint. Raises ValueError if no end token was found."""
    if end_id is None:
        tried = ", ".join(str(token) for token in candidates)
        raise ValueError(
            f"tokenizer {path} has no end-of-document token (tried {tried}): give one of its tokens as end_token"
        )
    digest = xxhash.xxh3_128(str(end_id).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return Tokenizer(max(vocabulary.values()) + 1, end_id, digest.hexdigest(), encode)

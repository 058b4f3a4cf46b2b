"""From text to a pair of token files, train and validation, made once and kept in a cache folder."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import xxhash
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from alfb_dist.data.sources import Document, find_documents, read_text
from alfb_dist.data.token_file import BLOCK_BYTES, VERSION, TokenFile
from alfb_dist.data.token_writer import TokenWriter, sync_folder
from alfb_dist.data.tokenizer import BYTES, Tokenizer, load_tokenizer

_BATCH_BYTES = 4 << 20  # text that is encoded at once


@dataclass(frozen=True)
class PreparedData:
    """The two token files, and how many files were left out of them."""

    train: Path
    validation: Path
    num_empty: int
    num_undecodable: int


def prepare(
    sources: Sequence[str | Path] | str | Path,
    cache: str | Path,
    *,
    tokenizer: str | Path = BYTES,
    end_token: str | None = None,
    validation_fraction: float = 0.05,
    progress: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> PreparedData:
    """The sources' token files are in the cache folder: as found there, or made now.

    sources: see `find_documents`; one file is one document. tokenizer, end_token: see `load_tokenizer`.
    validation_fraction: the share of documents, between 0 and 1, that goes to validation, chosen by document name.
    progress: show a progress bar on standard error. block_bytes: bytes per hash in the token files.
    What is found in the cache depends on the sources' names, sizes and times of change, the tokenizer and the
    fraction. Files that are empty or not UTF-8 are left out and counted. No collective: call it on one rank, or on any number
    of processes at once, which end up with the same files. Raises ValueError if a source is missing or there are not
    at least two documents, TokenFileError if the cached files are damaged.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction ({validation_fraction}) must be between 0 and 1")
    sources = [sources] if isinstance(sources, str | Path) else sources
    encoder = load_tokenizer(tokenizer, end_token)
    documents = find_documents(sources, without=Path(cache))
    key = _key(documents, encoder, f"{VERSION} {validation_fraction!r} {block_bytes}")
    folder = Path(cache, key)
    if not folder.is_dir():
        build = _Build(documents, encoder, validation_fraction, block_bytes, progress)
        _make_folder(folder, build)
    train, validation = folder / "train.tokens", folder / "validation.tokens"
    with TokenFile(train) as file, TokenFile(validation):
        notes = file.index.notes
    return PreparedData(train, validation, notes["num_empty"], notes["num_undecodable"])


def split_by_name(names: Sequence[str], validation_fraction: float) -> list[bool]:
    """Whether each document belongs to validation: a matter of its own name, whatever else there is.

    Only where that leaves a side empty is the document nearest to it moved. Raises ValueError for fewer than 2 names.
    """
    if len(names) < 2:
        raise ValueError(
            f"{len(names)} documents cannot be split by file into train and validation: give at least 2 text files"
        )
    hashes = [xxhash.xxh3_64_intdigest(os.fsencode(name)) for name in names]
    chosen = [value < validation_fraction * 2**64 for value in hashes]
    if not any(chosen):
        chosen[hashes.index(min(hashes))] = True
    elif all(chosen):
        chosen[hashes.index(max(hashes))] = False
    return chosen


def _key(documents: Sequence[Document], encoder: Tokenizer, settings: str) -> str:
    digest = xxhash.xxh3_128(f"{settings} {encoder.fingerprint} {encoder.end_id}\0".encode())
    for d in documents:
        digest.update(os.fsencode(f"{d.path}\0{d.name}\0{d.num_bytes}\0{d.mtime_ns}\0"))
    return digest.hexdigest()


@dataclass(frozen=True)
class _Build:
    documents: Sequence[Document]
    encoder: Tokenizer
    validation_fraction: float
    block_bytes: int
    progress: bool

"""Preparation of text: token files for training and validation, made once and kept in a cache directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from alfb_dist.config.publish import sync_path, temporary_path
from alfb_dist.data.sources import Document, find_documents, read_text
from alfb_dist.data.token_file import BLOCK_BYTES, VERSION, TokenFile
from alfb_dist.data.token_writer import TokenWriter
from alfb_dist.data.tokenizer import BYTES, Tokenizer, load_tokenizer

_BATCH_BYTES = 4 << 20  # of text that is encoded at a time


@dataclass(frozen=True)
class PreparedData:
    """The two token files, and the numbers of source files left out of them."""

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
    validation_sources: Sequence[str | Path] = (),
    progress: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> PreparedData:
    """Return the sources' token files, from the cache directory if they are there already.

    sources: see `find_documents`; one file is one document. tokenizer, end_token: see `load_tokenizer`.
    validation_fraction: the share of documents, between 0 and 1, held out for validation, chosen by document name.
    validation_sources: the validation text; if given, all of `sources` is for training.
    A pair of token files (NAME.tokens), one as the source and one as the validation source, is used directly.
    progress: show a progress bar on standard error. block_bytes: bytes per hash in the token files.
    The cache is keyed by the sources' names, sizes and modification times, the tokenizer and the fraction.
    Files that are empty or not UTF-8 are left out and counted. Not collective: call it on one rank, or in several
    processes at the same time, which get the same files. Raises ValueError if a source is missing or there are fewer
    than two documents, TokenFileError if the cached files are damaged.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction ({validation_fraction}) must be between 0 and 1")
    sources = [sources] if isinstance(sources, str | Path) else sources
    encoder = load_tokenizer(tokenizer, end_token)
    given = [Path(source) for source in (*sources, *validation_sources)]
    if any(path.suffix == ".tokens" for path in given):
        return _given_pair(given, len(sources))
    documents = find_documents([*sources, *validation_sources], without=Path(cache))
    num_train = len(find_documents(sources, without=Path(cache))) if validation_sources else None
    key = _key(documents, encoder, f"{VERSION} {validation_fraction!r} {block_bytes} {num_train}")
    directory = Path(cache, key)
    if not directory.is_dir():
        with _publish_first(directory) as temporary:
            _write(temporary, documents, num_train, encoder, validation_fraction, block_bytes, progress)
    train, validation = directory / "train.tokens", directory / "validation.tokens"
    with TokenFile(train) as file, TokenFile(validation):
        notes = file.index.notes
    return PreparedData(train, validation, int(notes["num_empty"]), int(notes["num_undecodable"]))


def _given_pair(given: list[Path], num_sources: int) -> PreparedData:
    if len(given) != 2 or num_sources != 1 or any(path.suffix != ".tokens" for path in given):
        raise ValueError(
            f"token files come in pairs, one as the source and one as the validation source, not mixed with text: got "
            f"{', '.join(map(str, given))}; give two token files, or text only"
        )
    for path in given:
        with TokenFile(path) as file:
            notes = file.index.notes
    return PreparedData(given[0], given[1], int(notes.get("num_empty", 0)), int(notes.get("num_undecodable", 0)))


def split_by_name(names: Sequence[str], validation_fraction: float) -> list[bool]:
    """Return for each document whether it belongs to validation, which its own name decides.

    Only if that left a side empty, the document nearest to it is moved there. names: at least 2.
    """
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


@contextmanager
def _publish_first(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory to fill, and rename it to `directory` unless another process has done so first."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(directory)
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(directory)  # the system refuses to replace a directory that is not empty
        except OSError:
            if not directory.is_dir():
                raise
        sync_path(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    directory: Path,
    documents: Sequence[Document],
    num_train: int | None,
    encoder: Tokenizer,
    validation_fraction: float,
    block_bytes: int,
    progress: bool,
) -> None:
    """Write train.tokens and validation.tokens of all documents that are text to `directory`."""
    texts, num_empty, num_undecodable = _readable(documents)
    if num_train is None:
        held_out = dict(zip(texts, split_by_name([d.name for d in texts], validation_fraction)))
    else:
        held_out = {d: i >= num_train for i, d in enumerate(documents)}
    with ExitStack() as stack:
        train, validation = (
            stack.enter_context(
                TokenWriter(
                    directory / f"{name}.tokens",
                    vocab_size=encoder.vocab_size,
                    end_id=encoder.end_id,
                    tokenizer=encoder.fingerprint,
                    block_bytes=block_bytes,
                )
            )
            for name in ("train", "validation")
        )
        for document, ids in _encoded(texts, encoder, progress):
            if len(ids) == 0:  # a tokenizer may drop white space
                num_empty += 1
            else:
                (validation if held_out[document] else train).add(ids)
        for writer in (train, validation):
            writer.notes = {"num_empty": num_empty, "num_undecodable": num_undecodable}
            if writer.num_documents == 0:
                raise ValueError(
                    f"no token is left for {writer.path.stem} after tokenising {len(texts)} files: give more text"
                )


def _readable(documents: Sequence[Document]) -> tuple[list[Document], int, int]:
    """Return (documents that are text, number of empty files, number of files that are not UTF-8)."""
    filled = [d for d in documents if d.num_bytes > 0]
    texts = [d for d in filled if read_text(d) is not None]
    num_empty, num_undecodable = len(documents) - len(filled), len(filled) - len(texts)
    if len(texts) < 2:
        raise ValueError(
            f"{len(texts)} of the {len(documents)} files found are text ({num_empty} empty, {num_undecodable} not "
            "UTF-8): train and validation are split by file, give at least 2 text files"
        )
    return texts, num_empty, num_undecodable


def _encoded(
    documents: Sequence[Document], encoder: Tokenizer, progress: bool
) -> Iterator[tuple[Document, NDArray[Any]]]:
    """Yield each document with its token ids, in order, and show the progress in bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("tokenising", total=sum(d.num_bytes for d in documents))
        for group in _groups(documents):
            yield from zip(group, encoder.encode([_text(d) for d in group]))
            bar.advance(task, sum(d.num_bytes for d in group))


def _groups(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Yield the documents in order, in lists of about _BATCH_BYTES."""
    group: list[Document] = []
    num_bytes = 0
    for document in documents:
        group.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= _BATCH_BYTES:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _text(document: Document) -> str:
    text = read_text(document)
    if text is None:
        raise ValueError(f"{document.path} was changed while it was being prepared: prepare the data again")
    return text

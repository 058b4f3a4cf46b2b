"""Where text comes from: files, folders, and the sources of Python's own standard library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PYTHON_STDLIB = "python-stdlib"
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "testmock", "idle_test"}


@dataclass(frozen=True)
class Document:
    """A text file. name: its path relative to its source, with slashes; it decides order and split."""

    path: Path
    name: str
    num_bytes: int
    mtime_ns: int


def find_documents(sources: Sequence[str | Path], *, without: Path | None = None) -> list[Document]:
    """The files of all sources, each once: sources in the order given, each source's files sorted by name.

    sources: a file; a folder, with all in it that is not hidden (no name beginning with a dot); or "python-stdlib", the
    .py files of the running Python's standard library less its tests and what differs between machines.
    without: a folder to leave out. A file reached twice, by whatever path, counts where it is reached first.
    Raises ValueError if a source does not exist.
    """
    documents: list[Document] = []
    seen: set[tuple[int, int]] = set()
    for source in sources:
        for path, name in sorted(_files(source, without), key=lambda found: found[1]):
            status = path.stat()
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                documents.append(Document(path, name, status.st_size, status.st_mtime_ns))
    return documents


def read_text(document: Document) -> str | None:
    """The document's text exactly as in the file, line ends too; None if it is not UTF-8."""
    try:
        return document.path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def _files(source: str | Path, without: Path | None) -> Iterator[tuple[Path, str]]:
    """Path and name of each file of one source, in no particular order."""
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        for path, name in _walk(root, without):
            if _is_library(name):
                yield path, name
        return
    root = Path(os.path.abspath(source))
    if root.is_dir():
        yield from _walk(root, without)
    elif root.is_file():
        yield root, root.name
    else:
        raise ValueError(f'data source {source} does not exist: give a file, a folder or "{PYTHON_STDLIB}"')


def _walk(root: Path, without: Path | None) -> Iterator[tuple[Path, str]]:
    excluded = None if without is None else os.path.realpath(without)
    for folder, subfolders, files in os.walk(root, onerror=_raise):
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and os.path.realpath(os.path.join(folder, name)) != excluded
        ]
        for file in files:
            path = Path(folder, file)
            if not file.startswith(".") and path.is_file():
                yield path, path.relative_to(root).as_posix()


def _raise(error: OSError) -> None:
    raise error


def _is_library(name: str) -> bool:
    """Whether a file of the standard library's folder is a source that every machine with this Python has."""
    *folders, file = name.split("/")
    if not file.endswith(".py") or file.startswith("_sysconfigdata"):
        return False
    return not any(folder in _NOT_LIBRARY or folder.startswith("config-") for folder in folders)

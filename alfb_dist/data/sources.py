"""Where text comes from: files, directories, and the sources of Python's standard library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PYTHON_STDLIB = "python-stdlib"
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Document:
    """A text file. name: its path relative to its source, with slashes; it decides order and split."""

    path: Path
    name: str
    num_bytes: int
    mtime_ns: int


def find_documents(sources: Sequence[str | Path], *, without: Path | None = None) -> list[Document]:
    """Return the files of all sources, each once: sources in the order given, each source's files sorted by name.

    sources: files; directories, read recursively without hidden files and __pycache__; or "python-stdlib", the
    .py files of the running Python's standard library without its tests and without those generated for the machine.
    without: a directory to leave out. A file reached twice counts where it is reached first.
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
    """Return the document's text exactly as in the file, line ends included; None if it is not UTF-8."""
    try:
        return document.path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None


def _files(source: str | Path, without: Path | None) -> Iterator[tuple[Path, str]]:
    """Yield path and name of each file of one source, in no particular order."""
    root = Path(os.path.abspath(source))
    if source == PYTHON_STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        yield from ((path, name) for path, name in _walk(root, without, _NOT_LIBRARY) if _is_library(name))
    elif root.is_dir():
        yield from _walk(root, without, frozenset())
    elif root.is_file():
        yield root, root.name
    else:
        raise ValueError(f'data source {source} does not exist: give a file, a directory or "{PYTHON_STDLIB}"')


def _walk(root: Path, without: Path | None, skipped: frozenset[str]) -> Iterator[tuple[Path, str]]:
    """Yield path and name of each file below root, in no particular order."""
    excluded = None if without is None else os.path.realpath(without)
    for directory, subdirectories, files in os.walk(root, onerror=_raise):
        wanted = [name for name in subdirectories if name[0] != "." and name != "__pycache__" and name not in skipped]
        subdirectories[:] = [name for name in wanted if os.path.realpath(os.path.join(directory, name)) != excluded]
        for file in files:
            path = Path(directory, file)
            if file[0] != "." and path.is_file():
                yield path, path.relative_to(root).as_posix()


def _raise(error: OSError) -> None:
    raise error


def _is_library(name: str) -> bool:
    """Return whether a file of the standard library is source code that was not generated for this machine."""
    return name.endswith(".py") and not name.startswith(("_sysconfigdata", "config-"))

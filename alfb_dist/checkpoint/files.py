"""The few disk operations that a save is made of. Each raises OSError; tests inject faults here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from alfb_dist.config.publish import publish, sync_path


def make_folder(path: Path) -> None:
    """Make a new directory, and its parents on the disk."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True)
        sync_folder(path.parent.parent)
    path.mkdir()


def create(path: Path) -> BinaryIO:
    """Open a new, unbuffered file for writing. Raises FileExistsError if it exists."""
    return open(path, "xb", buffering=0)


def write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Hand all of the data to the operating system."""
    rest = memoryview(data)
    rest = rest.cast("B") if rest.nbytes else rest
    while rest.nbytes:
        rest = rest[os.write(file.fileno(), rest[: 1 << 30]) :]


def sync(file: BinaryIO) -> None:
    """Wait until the file's content is on the disk."""
    os.fsync(file.fileno())


sync_folder = sync_path


def rename(old: Path, new: Path) -> None:
    """Rename `old` to `new` in one step."""
    os.rename(old, new)


def replace(path: Path, data: bytes) -> None:
    """Write a file; a reader sees the old or the new content, never a part."""
    with publish(path) as temporary, create(temporary) as file:
        write(file, data)
        sync(file)


def remove(path: Path) -> None:
    """Remove the directory, or as much of it as can be removed."""
    shutil.rmtree(path, ignore_errors=True)


def start_folder(temporary: Path) -> Path:
    """Make an empty directory in the place of what an earlier attempt left, and return it."""
    if temporary.exists():
        remove(temporary)
    make_folder(temporary)
    return temporary


def publish_folder(temporary: Path, path: Path, replaced: Path) -> None:
    """Rename a directory to `path`, in the place of what is there. Whenever this stops, the old or the new one exists.

    replaced: where the old one waits until the new one has its name.
    """
    sync_folder(temporary)
    if path.exists():
        remove(replaced)
        rename(path, replaced)
    rename(temporary, path)
    sync_folder(path.parent)
    remove(replaced)


class HashedFile:
    """A new file that is hashed while it is written from front to back.

    An OSError of the disk names the path, the byte that was reached and the size.
    """

    def __init__(self, path: Path, *, size: int) -> None:
        """size: the number of bytes that will be written."""
        self.path, self.size, self.written = path, size, 0
        self._hash = xxhash.xxh3_128()
        self._file: BinaryIO | None = None
        self._file = self._with_path(create, path)

    def write(self, data: bytes | memoryview) -> None:
        """Append the data."""
        self._with_path(write, self._file, data)
        self._hash.update(data)
        self.written += memoryview(data).nbytes

    def finish(self) -> dict[str, int | str]:
        """Close the file when it is on the disk; return its manifest entry. Raises OSError if bytes are missing."""
        self._with_path(sync, self._file)
        self.close()
        if self.written != self.size:
            raise OSError(f"{self.path} must have {self.size:,} bytes, but {self.written:,} were written")
        return {"bytes": self.written, "xxh3_128": self._hash.hexdigest()}

    def close(self) -> None:
        """Close the file, complete or not. A second call changes nothing."""
        if self._file is not None:
            self._file.close()

    def _with_path(self, operation: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return operation(*arguments)
        except OSError as e:
            self.close()
            where = f"at byte {self.written:,} of {self.size:,}"
            raise OSError(e.errno, f"cannot write {self.path} ({where}): {e.strerror or e}") from e


def write_file(path: Path, data: bytes) -> dict[str, int | str]:
    """Write a new file to the disk; return its manifest entry."""
    file = HashedFile(path, size=len(data))
    file.write(data)
    return file.finish()

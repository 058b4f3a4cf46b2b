"""Files that are written whole or not at all: to a temporary path first, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def publish(path: Path, *, sync_to_disk: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write a file to, and rename the file to `path` when the block ends without an error.

    Until then, and after an error, `path` is what it was before. Readers and other writers never see a part.
    sync_to_disk: whether the file, and then its name, are on the disk when the block has ended.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        if sync_to_disk:
            sync_path(temporary)
        temporary.replace(path)
        if sync_to_disk:
            sync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Return an unused name in the same directory, from which a rename to `path` is one step."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def sync_path(path: Path) -> None:
    """Wait until the file's content, or the directory's list of entries, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""A file that grows only by whole pieces."""

from __future__ import annotations

import os
from pathlib import Path


class AppendFile:
    """A file that always ends with a whole piece, even on a full disk."""

    def __init__(self, path: Path, *, size: int) -> None:
        """Open `path` for appending and keep only its first `size` bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by close()
        self._file.truncate(size)
        self._size = size

    def append(self, piece: bytes) -> None:
        """Write the whole piece, or raise OSError and leave the file as it was."""
        written = 0
        try:
            while written < len(piece):
                written += os.write(self._file.fileno(), memoryview(piece)[written:])
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(piece)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

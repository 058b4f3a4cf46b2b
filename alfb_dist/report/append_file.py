"""A file that grows by whole pieces only."""

from __future__ import annotations

import os
from pathlib import Path


class AppendFile:
    """A file whose end is always the end of a whole piece, even on a full disk."""

    def __init__(self, path: Path, *, size: int) -> None:
        """Open `path` for appending, with only its first `size` bytes kept."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by close()
        self._file.truncate(size)
        self._size = size

    def append(self, piece: bytes) -> None:
        """The piece is handed to the operating system as a whole, or the file is as it was and OSError is raised."""
        written = 0
        try:
            while written < len(piece):
                written += os.write(self._file.fileno(), memoryview(piece)[written:])
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(piece)

    def close(self) -> None:
        """The file is closed; a second call changes nothing."""
        self._file.close()

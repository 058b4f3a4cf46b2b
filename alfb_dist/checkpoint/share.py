"""One rank's share of a save: its tensor files, its random state and, on rank 0, what is equal on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from alfb_dist.checkpoint import files, manifest, rng
from alfb_dist.checkpoint.safetensors_file import Entry, SafetensorsWriter, write_tensors

MAX_FILE_BYTES = 1 << 30
"""The largest size of a tensor file, unless a single tensor is larger."""
STATE, BALANCE = "state.json", "balance.safetensors"


def tensor_file(rank: int, index: int) -> str:
    """Return the name of a rank's tensor file."""
    return f"tensors-{rank:05d}-{index:03d}.safetensors"


def rng_file(rank: int) -> str:
    """Return the name of the file of a rank's random state."""
    return f"rng-{rank:05d}.json"


class Share:
    """The files that this rank writes of a save. Takes tensors even after a failure, since other ranks wait for it."""

    def __init__(self, folder: Path, rank: int, entries: Sequence[Entry]) -> None:
        self.folder, self.rank = folder, rank
        self.files: dict[str, dict[str, int | str]] = {}
        self.tensors: dict[str, dict[str, Any]] = {}
        self.failure: Exception | None = None
        self._waiting = _cut(entries)
        self._writer: SafetensorsWriter | None = None
        self._num_files = 0

    def add(self, key: str, tensor: Tensor) -> None:
        """Write the rank's next tensor, or set `failure`."""
        if self.failure is not None:
            return
        try:
            self._add(key, tensor)
        except Exception as e:
            self.failure = e
            if self._writer is not None:
                self._writer.close()

    def _add(self, key: str, tensor: Tensor) -> None:
        if self._writer is None:
            path = self.folder / tensor_file(self.rank, self._num_files)
            self._writer = SafetensorsWriter(path, self._waiting[self._num_files])
            self._num_files += 1
        self._writer.add(key, tensor)
        if self._writer.full:
            self.files[self._writer.path.name] = self._writer.finish()
            self.tensors |= self._writer.tensors
            self._writer = None

    def finish(self, state: dict[str, Any], balance: dict[str, Tensor]) -> None:
        """Write the small files, rank 0 `state` and `balance` too, and return when all is on the disk.

        Raises the first failure.
        """
        if self.failure is not None:
            raise self.failure
        assert self._num_files == len(self._waiting) and self._writer is None
        self._json(rng_file(self.rank), rng.capture())
        if self.rank == 0:
            self._json(STATE, state)
            wide_first = dict(sorted(balance.items(), key=lambda item: -item[1].element_size()))
            self.files[BALANCE], tensors = write_tensors(self.folder / BALANCE, wide_first)
            self.tensors |= tensors

    def _json(self, name: str, value: Any) -> None:
        self.files[name] = files.write_file(self.folder / name, manifest.to_json(value).encode())


def _cut(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Divide the entries into files: at MAX_FILE_BYTES, and where the type changes, so that all are aligned."""
    cut: list[list[Entry]] = []
    room, dtype = 0, ""
    for entry in entries:
        if entry.bytes > room or entry.dtype != dtype:
            cut.append([])
            room, dtype = MAX_FILE_BYTES, entry.dtype
        cut[-1].append(entry)
        room -= entry.bytes
    return cut

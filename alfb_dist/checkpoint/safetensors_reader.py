"""Safetensors files read row by row into memory of their own.

Files are not mapped: mapped pages count as memory of the process, and would hide how much a rank needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alfb_dist.checkpoint.safetensors_file import DTYPES, read_header, torch_dtype

_DTYPES = {name: torch_dtype(name) for name in DTYPES} | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
BLOCK_BYTES = 4 << 20
"""Bytes of a tensor that are read at once where they have to be cast; a single row may be larger."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor is stored: its file, torch type and shape, and its first byte in the file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """The bytes of one row, a step in the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """The bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsReader:
    """The tensors of some safetensors files by name. `bytes_read` counts the bytes of tensors read so far."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read the headers. Raises ValueError naming the file if one is damaged or repeats a tensor of another."""
        self.tensors: dict[str, Stored] = {}
        self.bytes_read = 0
        for path in paths:
            found = _read_stored(path)
            if repeated := sorted(found.keys() & self.tensors.keys()):
                raise ValueError(f"{repeated[0]} is in {self.tensors[repeated[0]].path.name} and again in {path.name}")
            self.tensors |= found

    def read_into(self, destination: Tensor, name: str, first: int = 0) -> None:
        """Fill the destination (contiguous, of the file's type) with the rows of a tensor from `first` on.

        Raises ValueError if the file ends early.
        """
        stored = self.tensors[name]
        memory: Any = destination.view(-1).view(torch.uint8).numpy()
        with open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.start + first * stored.row_bytes)
            view, done = memoryview(memory), 0
            while done < view.nbytes:
                count = file.readinto(view[done : done + (1 << 30)])
                if not count:
                    raise ValueError(f"{stored.path} ends within {name}")
                done += count
        self.bytes_read += done

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start to stop of a tensor in the file's type. Raises ValueError if the file ends early."""
        stored = self.tensors[name]
        read = torch.empty(stop - start, *stored.shape[1:], dtype=stored.dtype)
        self.read_into(read, name, start)
        return read

    def read(self, name: str) -> Tensor:
        """Return a whole tensor in the file's type. Raises ValueError if the file ends early."""
        shape = self.tensors[name].shape
        return self.rows(name, 0, shape[0] if shape else 1).view(shape)

    def copy_rows(self, destination: Tensor, name: str, first: int = 0) -> None:
        """Fill the destination (contiguous) with the rows of a tensor from `first` on, cast to its type."""
        stored = self.tensors[name]
        if destination.dtype == stored.dtype:
            self.read_into(destination, name, first)
            return
        rows = destination if destination.dim() else destination.view(1)
        step = rows_at_once(stored)
        for start in range(0, len(rows), step):
            stop = min(start + step, len(rows))
            rows[start:stop].copy_(self.rows(name, first + start, first + stop))


def rows_at_once(stored: Stored) -> int:
    """Return how many rows of a tensor are read at once where they have to be cast."""
    return max(1, BLOCK_BYTES // max(1, stored.row_bytes))


def _read_stored(path: Path) -> dict[str, Stored]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start, records = read_header(file, size)
        return {name: _stored(path, name, record, len(start), size) for name, record in records.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged or not a safetensors file: {e}") from e


def _stored(path: Path, name: str, record: Mapping[str, Any], first: int, size: int) -> Stored:
    if record["dtype"] not in _DTYPES:
        raise ValueError(f"{name} has the type {record['dtype']}; supported: {', '.join(_DTYPES)}")
    start, end = record["data_offsets"]
    stored = Stored(path, _DTYPES[record["dtype"]], tuple(record["shape"]), first + start)
    if min(stored.shape, default=0) < 0 or start < 0 or end - start != stored.bytes or first + end > size:
        raise ValueError(f"{name} of shape {stored.shape} is not within the file at the offset in the header")
    return stored

"""The tensors of safetensors files, read row by row into memory of their own.

Files are not mapped: mapped pages count as memory of the process, and then nobody can say what a rank needs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alfb_dist.checkpoint.safetensors_file import DTYPES

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    name: (getattr(torch, torch_name.removeprefix("torch.")), width) for name, (torch_name, width) in DTYPES.items()
}
_DTYPES |= {"F8_E4M3": (torch.float8_e4m3fn, 1), "F8_E8M0": (torch.float8_e8m0fnu, 1)}
BLOCK_BYTES = 4 << 20
"""How much of a tensor is read at once where it has to be cast; one row may be more."""
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, its torch type, its shape and its first byte in the file."""

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


class Source:
    """The tensors of some safetensors files by name.

    `bytes_read` counts what was read of tensors so far.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Reads the headers. ValueError naming the file if one is not whole, or holds a tensor that another has too."""
        self.tensors: dict[str, Stored] = {}
        self.bytes_read = 0
        for path in paths:
            found = _header(path)
            if twice := sorted(found.keys() & self.tensors.keys()):
                raise ValueError(f"{twice[0]} is in {self.tensors[twice[0]].path.name} and again in {path.name}")
            self.tensors |= found

    def read_into(self, destination: Tensor, name: str, first: int = 0) -> None:
        """The destination (contiguous, of the file's type) holds the rows of a tensor from `first` on.

        ValueError if the file ends early.
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
        """Rows start to stop of a tensor, in the file's type: a new tensor. ValueError if the file ends early."""
        stored = self.tensors[name]
        read = torch.empty(stop - start, *stored.shape[1:], dtype=stored.dtype)
        self.read_into(read, name, start)
        return read

    def read(self, name: str) -> Tensor:
        """A whole tensor, in the file's type."""
        shape = self.tensors[name].shape
        return self.rows(name, 0, shape[0] if shape else 1).view(shape)

    def copy_rows(self, destination: Tensor, name: str, first: int = 0) -> None:
        """The destination, contiguous, holds the rows of a tensor from `first` on, cast to its own type."""
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
    """How many rows of a tensor are read at once where they have to be cast."""
    return max(1, BLOCK_BYTES // max(1, stored.row_bytes))


def _header(path: Path) -> dict[str, Stored]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("its header does not fit into it")
            header: Mapping[str, Any] = json.loads(file.read(length))
        return {
            name: _stored(path, name, record, 8 + length, size)
            for name, record in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged, or no safetensors file: {e}") from e


def _stored(path: Path, name: str, record: Mapping[str, Any], first: int, size: int) -> Stored:
    if record["dtype"] not in _DTYPES:
        raise ValueError(f"{name} has the type {record['dtype']}; supported: {', '.join(_DTYPES)}")
    start, end = record["data_offsets"]
    stored = Stored(path, _DTYPES[record["dtype"]][0], tuple(record["shape"]), first + start)
    if min(stored.shape, default=0) < 0 or start < 0 or end - start != stored.bytes or first + end > size:
        raise ValueError(f"{name} of shape {stored.shape} does not lie within the file as its header says")
    return stored


def open_folder(folder: Path) -> Source:
    """The tensors of a transformers folder, one file or several with an index.

    ValueError, naming files, if there are none, some are missing, or only pickled weights are there.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; models are read from local folders, nothing is fetched")
    if not (folder / INDEX).is_file():
        if (folder / WEIGHTS).is_file():
            return Source([folder / WEIGHTS])
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickled:
            raise ValueError(
                f"{folder} has pickled weights only ({pickled[0]}); unpickling can run code, so they are not read: "
                "convert them to safetensors"
            )
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    places = _weight_map(folder / INDEX)
    missing = sorted(name for name in set(places.values()) if not (folder / name).is_file())
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, named in {INDEX}")
    source = Source(folder / name for name in sorted(set(places.values())))
    wrong = sorted(n for n, file in places.items() if n not in source.tensors or source.tensors[n].path.name != file)
    if wrong:
        raise ValueError(f"{folder}: {wrong[0]} is not in {places[wrong[0]]}, where {INDEX} places it")
    return source


def _weight_map(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_text())["weight_map"]
        outside = [name for name in places.values() if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged: {type(e).__name__}: {e}") from e
    if outside:
        raise ValueError(f"{path} names a file outside its folder: {outside[0]}")
    return dict(places)

"""The weight files of a model, divided by size alone, so that they do not depend on the parallel layout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from alfb_dist.checkpoint import files
from alfb_dist.checkpoint.safetensors_file import ALIGNMENT, Entry, dtype_name, start_file, tensor_bytes
from alfb_dist.pretrained.outputs import Output, Piece
from alfb_dist.pretrained.weight_files import INDEX, WEIGHTS

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Shard:
    """A file and the tensors in it, in the order of its bytes."""

    name: str
    outputs: tuple[tuple[Output, Entry], ...]

    @property
    def pieces(self) -> list[Piece]:
        """The pieces that are written to it, in order."""
        return [piece for output, _ in self.outputs for piece in output.pieces]


def plan_shards(
    outputs: Sequence[Output], dtypes: Mapping[str, torch.dtype], max_bytes: int = MAX_SHARD_BYTES
) -> list[Shard]:
    """Divide the tensors into files, none larger than `max_bytes` unless a single tensor is.

    dtypes: the types in which the model's tensors are written, by name.
    """
    if max_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_bytes}")
    groups: list[list[tuple[Output, Entry]]] = []
    room = 0
    for output in outputs:
        entry = Entry(output.name, dtype_name(dtypes[output.pieces[0].parameter]), output.shape)
        if not groups or entry.bytes > room:
            groups.append([])
            room = max_bytes
        groups[-1].append((output, entry))
        room -= entry.bytes
    count = len(groups)
    names = [WEIGHTS] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    return [
        Shard(name, tuple(sorted(group, key=lambda item: -_divisor(item[1].bytes))))
        for name, group in zip(names, groups)
    ]


def _divisor(size: int) -> int:
    """Return the largest power of two, up to ALIGNMENT, that divides a number of bytes.

    Sorted by it, tensors whose size is a multiple of ALIGNMENT start at a multiple of it, and all others at a multiple
    of their elements' width. The format does not allow padding between tensors.
    """
    return math.gcd(size, ALIGNMENT)


class ShardFile:
    """A file that takes its values in order, in parts of any size. An OSError names the path and the byte."""

    def __init__(self, folder: Path, shard: Shard) -> None:
        entries = [entry for _, entry in shard.outputs]
        self._file = start_file(folder / shard.name, entries, {"format": "pt"})  # transformers asks for the format
        self._finish_if_complete()

    def write(self, values: Tensor) -> bool:
        """Write the next values, contiguous on CPU; return whether they were the last. The file is closed then."""
        self._file.write(tensor_bytes(values))
        return self._finish_if_complete()

    def _finish_if_complete(self) -> bool:
        complete = self._file.written == self._file.size
        if complete:
            self._file.finish()
        return complete

    def close(self) -> None:
        """Close the file, complete or not."""
        self._file.close()


def write_shards(folder: Path, shards: Sequence[Shard], piece: Callable[[Piece], Tensor]) -> None:
    """Write the files. piece: returns the values of a piece, contiguous on CPU."""
    for shard in shards:
        file = ShardFile(folder, shard)
        try:
            for wanted in shard.pieces:
                file.write(piece(wanted))
        finally:
            file.close()


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write an index if there are several files."""
    if len(shards) > 1:
        entries = [(shard.name, entry) for shard in shards for _, entry in shard.outputs]
        total = sum(entry.bytes for _, entry in entries)
        places = {entry.key: name for name, entry in entries}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        files.write_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def temporary_folder(path: Path) -> Path:
    """Return the directory in which the model is written that will be `path`."""
    return path.with_name(f"{path.name}.tmp")


def start_folder(path: Path, *, overwrite: bool) -> Path:
    """Make the temporary directory for `path`. Raises ValueError if `path` must not be replaced."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: give a directory")
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"{path} is not empty: give another path, or overwrite=True to replace it")
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is not empty and has no config.json, so it is not replaced: give another path")
    return files.start_folder(temporary_folder(path))


def publish_folder(path: Path) -> None:
    """Rename the temporary directory to `path`, with all that is in it on the disk."""
    temporary = temporary_folder(path)
    for file in temporary.iterdir():
        if file.is_file():
            with open(file, "rb") as written:
                files.sync(written)
    files.publish_folder(temporary, path, path.with_name(f"{path.name}.old"))

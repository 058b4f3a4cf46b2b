"""Safetensors files, written and scanned from front to back with a hash of each tensor.

The library's own writer needs all tensors of a file at once. The format is 8 bytes of header length, a JSON header with
type, shape and offsets of each tensor, and the tensors' bytes. Scanning does not need torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import xxhash

from alfb_dist.checkpoint.files import HashedFile

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {
    "F64": ("torch.float64", 8),
    "F32": ("torch.float32", 4),
    "F16": ("torch.float16", 2),
    "BF16": ("torch.bfloat16", 2),
    "I64": ("torch.int64", 8),
    "I32": ("torch.int32", 4),
    "I16": ("torch.int16", 2),
    "I8": ("torch.int8", 1),
    "U8": ("torch.uint8", 1),
    "BOOL": ("torch.bool", 1),
}
"""By the format's name of a type: torch's name and the bytes of an element."""
_NAMES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
_BLOCK_BYTES = 4 << 20
ALIGNMENT = 64
"""The first tensor of a file starts at a multiple of this, as torch aligns its own memory: who maps a file computes on
its bytes in place, and products on CPU may differ in the last bit at another alignment."""


def first_keys(keys: Iterable[str]) -> str:
    """Return the first four keys and the number of the others, for a message."""
    keys = list(keys)
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def dtype_name(dtype: Any) -> str:
    """Return the format's name of a torch dtype. Raises ValueError if a checkpoint cannot hold it."""
    if str(dtype) not in _NAMES:
        raise ValueError(f"tensors of type {dtype} cannot be saved; supported: {', '.join(_NAMES)}")
    return _NAMES[str(dtype)]


def torch_dtype(name: str) -> Any:
    """Return the torch dtype of the format's name."""
    import torch

    return getattr(torch, DTYPES[name][0].removeprefix("torch."))


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its key, the format's name of its type, and its shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype][1]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, not copied."""
    import torch

    data: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


def header_bytes(entries: Sequence[Entry], metadata: dict[str, str] | None = None) -> bytes:
    """Return the start of a safetensors file of these entries: the length of its JSON header, and the header."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for entry in entries:
        start, end = end, end + entry.bytes
        header[entry.key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def start_file(path: Path, entries: Sequence[Entry], metadata: dict[str, str] | None = None) -> HashedFile:
    """Create a safetensors file of these entries and write its header; the tensors' bytes follow in their order."""
    header = header_bytes(entries, metadata)
    file = HashedFile(path, size=len(header) + sum(entry.bytes for entry in entries))
    file.write(header)
    return file


def read_header(file: BinaryIO, size: int) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes before the tensors of a file, and each tensor's record in the header by key.

    size: the file's. Raises ValueError if the header is incomplete.
    """
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if size < 8 or length > size - 8:
        raise ValueError("the header is longer than the file")
    start += file.read(length)
    records: dict[str, Any] = json.loads(start[8:])
    records.pop("__metadata__", None)
    return start, records


class SafetensorsWriter:
    """A safetensors file that takes its tensors one by one, in the order of its entries."""

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self.path, self._entries = path, list(entries)
        self._file = start_file(path, entries)
        self.tensors: dict[str, dict[str, Any]] = {}
        """The manifest entries of the tensors written so far, by key."""

    def add(self, key: str, tensor: Tensor) -> None:
        """Write the file's next tensor, contiguous and on CPU. An OSError names path and byte."""
        entry = self._entries[len(self.tensors)]
        data = tensor_bytes(tensor)
        assert (key, data.nbytes) == (entry.key, entry.bytes), f"expected {entry}, got {key} of {data.nbytes} bytes"
        self._file.write(data)
        digest = xxhash.xxh3_128_hexdigest(data)
        self.tensors[key] = {
            "file": self.path.name,
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "xxh3_128": digest,
        }

    @property
    def full(self) -> bool:
        """Whether every tensor has been added."""
        return len(self.tensors) == len(self._entries)

    def finish(self) -> dict[str, int | str]:
        """Close the file when it is on the disk; return its manifest entry."""
        return self._file.finish()

    def close(self) -> None:
        """Close the file, complete or not."""
        self._file.close()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, int | str], dict[str, dict[str, Any]]]:
    """Write a safetensors file; return the manifest's entries of the file and of the tensors by key."""
    entries = [Entry(key, dtype_name(x.dtype), tuple(x.shape)) for key, x in tensors.items()]
    writer = SafetensorsWriter(path, entries)
    for key, tensor in tensors.items():
        writer.add(key, tensor.cpu().contiguous())
    return writer.finish(), writer.tensors


@dataclass(frozen=True)
class Scan:
    """The contents of a file: the hash of the whole, and each tensor's type, shape and hash by key."""

    xxh3_128: str
    tensors: dict[str, dict[str, Any]]


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        block = file.read(min(size, _BLOCK_BYTES))
        if not block:
            raise ValueError(f"the file ends {size:,} bytes early")
        size -= len(block)
        yield block


def scan(path: Path) -> Scan:
    """Return the file's hashes, read once from front to back. Raises ValueError if it is not a complete file."""
    whole, tensors = xxhash.xxh3_128(), {}
    with open(path, "rb") as file:
        start, records = read_header(file, path.stat().st_size)
        whole.update(start)
        end = 0
        for key, found in sorted(records.items(), key=lambda item: item[1]["data_offsets"]):
            entry = Entry(key, found["dtype"], tuple(found["shape"]))
            if min(entry.shape, default=0) < 0 or found["data_offsets"] != [end, end + entry.bytes]:
                raise ValueError(f"{key} is not at the offset in the header")
            end += entry.bytes
            part = xxhash.xxh3_128()
            for block in _blocks(file, entry.bytes):
                whole.update(block)
                part.update(block)
            tensors[key] = {"dtype": entry.dtype, "shape": list(entry.shape), "xxh3_128": part.hexdigest()}
        if file.read(1):
            raise ValueError("the file has bytes after its last tensor")
    return Scan(whole.hexdigest(), tensors)

"""loads.bin: load and bias of every layer and expert, one fixed-size record per logged step.

The file starts with one line of JSON that names the layers, their number L, the number of experts E and the layout
of a record. Records follow without gaps, little-endian: step int64, load int64[L, E], bias float32[L, E]. So a reader
can map the file, and a crash can only truncate the last record, which is then ignored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alfb_dist.report.append_file import AppendFile

_FORMAT = "alfb-loads"
_VERSION = 1
_MAX_HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class Loads:
    """Loads and biases as logged. steps: int64 (N,); load_NLE: int64 and bias_NLE: float32, mapped from the file."""

    layer_names: tuple[str, ...]
    steps: NDArray[np.int64]
    load_NLE: NDArray[np.int64]
    bias_NLE: NDArray[np.float32]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, L, E): logged steps, MoE layers, routed experts."""
        num_records, num_layers, num_experts = self.load_NLE.shape
        return num_records, num_layers, num_experts


@dataclass(frozen=True)
class _Layout:
    layer_names: tuple[str, ...]
    num_experts: int
    header_bytes: int

    @property
    def record(self) -> np.dtype[Any]:
        return _record_dtype(len(self.layer_names), self.num_experts)


class LoadFile:
    """The open loads.bin of a run."""

    def __init__(self, path: Path, *, layer_names: Sequence[str], last_step: int) -> None:
        """Cut an existing file to whole records up to `last_step`; a new one is created by the first append."""
        self._path = path
        self._layer_names = tuple(layer_names)
        self._layout = _read_layout(path)
        self._file: AppendFile | None = None
        if self._layout is not None:
            kept = int(np.searchsorted(_map_records(path, self._layout)["step"], last_step, side="right"))
            self._file = AppendFile(path, size=self._layout.header_bytes + kept * self._layout.record.itemsize)

    def append(self, step: int, load_LE: NDArray[np.int64], bias_LE: NDArray[np.float32]) -> None:
        """Append a record. Raises ValueError if (L, E) is not the file's, OSError if it cannot be written."""
        if self._file is None or self._layout is None:
            self._start(load_LE.shape[1])
        assert self._file is not None and self._layout is not None
        expected = (len(self._layout.layer_names), self._layout.num_experts)
        if load_LE.shape != expected or bias_LE.shape != expected:
            raise ValueError(
                f"load {load_LE.shape} and bias {bias_LE.shape} must both have the (layers, experts) {expected} "
                f"of {self._path.name}"
            )
        record = np.zeros((), dtype=self._layout.record)
        record["step"], record["load"], record["bias"] = step, load_LE, bias_LE
        self._file.append(record.tobytes())

    def _start(self, num_experts: int) -> None:
        header = _header(self._layer_names, num_experts)
        file = AppendFile(self._path, size=0)
        try:
            file.append(header)
        except OSError:
            file.close()
            raise
        self._file, self._layout = file, _Layout(self._layer_names, num_experts, len(header))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_loads(path: Path) -> Loads | None:
    """Map every whole record of a loads.bin, without a copy; None if there is no file with a whole header."""
    layout = _read_layout(path)
    if layout is None:
        return None
    records = _map_records(path, layout)
    return Loads(layout.layer_names, np.array(records["step"]), records["load"], records["bias"])


def _record_dtype(num_layers: int, num_experts: int) -> np.dtype[Any]:
    shape = (num_layers, num_experts)
    return np.dtype([("step", "<i8"), ("load", "<i8", shape), ("bias", "<f4", shape)])


def _header(layer_names: tuple[str, ...], num_experts: int) -> bytes:
    shape = [len(layer_names), num_experts]
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "layers": shape[0],
        "experts": num_experts,
        "record": [["step", "<i8", []], ["load", "<i8", shape], ["bias", "<f4", shape]],
        "layer_names": list(layer_names),
    }
    text = json.dumps(header).encode()
    return text + b" " * (-(len(text) + 1) % 8) + b"\n"  # records start on a multiple of 8 bytes


def _read_layout(path: Path) -> _Layout | None:
    """Read the header; None without a whole one. Raises ValueError if the file is of another kind."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        line = file.readline(_MAX_HEADER_BYTES)
    if not line.endswith(b"\n") and len(line) < _MAX_HEADER_BYTES:
        return None
    try:
        header = json.loads(line)
        known = header["format"] == _FORMAT and header["version"] == _VERSION
        layout = _Layout(tuple(header["layer_names"]), int(header["experts"]), len(line))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not start with the header of an {_FORMAT} file") from error
    if not known:
        raise ValueError(
            f"{path} is {header['format']} version {header['version']}, only {_FORMAT} {_VERSION} can be read"
        )
    return layout


def _map_records(path: Path, layout: _Layout) -> NDArray[Any]:
    count = (path.stat().st_size - layout.header_bytes) // layout.record.itemsize
    if count <= 0:
        return np.empty(0, dtype=layout.record)
    return np.memmap(path, dtype=layout.record, mode="r", offset=layout.header_bytes, shape=(count,))

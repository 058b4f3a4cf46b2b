"""Memory that other processes of this machine read, so that what a rank sends them need not pass the network.

A sender keeps its messages in anonymous memory files (memfd), which a reader opens through /proc. They vanish with the
process, however it ends.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

MIN_BYTES = 1 << 20


def has_shared_memory() -> bool:
    """Return whether the system has such memory and ALFB_SHARED_MEMORY=0 is not set."""
    return (
        os.environ.get("ALFB_SHARED_MEMORY") != "0" and hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir()
    )


def network_namespace() -> int:
    """Return the number of this process's network namespace. Processes in different ones count as different hosts."""
    return os.stat("/proc/self/ns/net").st_ino


def _mapped(file: int, capacity: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(file, capacity), dtype=torch.uint8)


class Outbox:
    """Bytes that this process writes and others read."""

    def __init__(self, num_bytes: int) -> None:
        self.capacity = max(MIN_BYTES, 1 << (num_bytes - 1).bit_length())
        self.file = os.memfd_create("alfb_dist", os.MFD_CLOEXEC)
        os.ftruncate(self.file, self.capacity)
        self.bytes = _mapped(self.file, self.capacity)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)


class Outboxes:
    """Two outboxes used in turn, so that one can be written while the other is read."""

    def __init__(self) -> None:
        self._pair = [Outbox(1), Outbox(1)]

    def next(self, num_bytes: int) -> Outbox:
        """Return an outbox of at least `num_bytes` bytes that is not the last one returned."""
        box = self._pair.pop(0)
        if box.capacity < num_bytes:
            box = Outbox(num_bytes)
        self._pair.append(box)
        return box


class Peer:
    """Another process whose outboxes this one reads."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._boxes: dict[tuple[int, int], Tensor] = {}  # by file and capacity, the latest last

    def _path(self, file: int) -> str:
        return f"/proc/{self.pid}/fd/{file}"

    def has(self, file: int) -> bool:
        """Return whether the process still has the file open; one that has ended has not."""
        return os.path.exists(self._path(file))

    def open(self, file: int, capacity: int) -> Tensor:
        """Map a whole outbox, which shows what its owner writes later too. Raises OSError if it cannot be read."""
        descriptor = os.open(self._path(file), os.O_RDWR | os.O_CLOEXEC)
        try:
            return _mapped(descriptor, capacity)
        finally:
            os.close(descriptor)

    def read(self, file: int, capacity: int, start: int, num_bytes: int) -> Tensor:
        """Return bytes of an outbox, not copied. Raises OSError if it cannot be read."""
        box = self._boxes.pop((file, capacity), None)
        if box is None:
            box = self.open(file, capacity)
        self._boxes[file, capacity] = box
        if len(self._boxes) > 2:  # one that the process has replaced
            del self._boxes[next(iter(self._boxes))]
        return box[start : start + num_bytes]

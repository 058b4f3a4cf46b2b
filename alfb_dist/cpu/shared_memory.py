"""Memory that the other processes of this machine read: what a rank sends them needs no trip through the network.

A sender keeps its messages in anonymous memory files of its own (memfd), which a reader opens through /proc. They
vanish with the process, however it ends.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

SMALLEST = 1 << 20


def available() -> bool:
    """Whether this system has such memory, and it is not turned off (ALFB_SHARED_MEMORY=0)."""
    return (
        os.environ.get("ALFB_SHARED_MEMORY") != "0" and hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir()
    )


def network() -> int:
    """A number for this process's network namespace: those in different ones count as different hosts."""
    return os.stat("/proc/self/ns/net").st_ino


def _mapped(file: int, capacity: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(file, capacity), dtype=torch.uint8)


class Outbox:
    """Bytes that this process writes and others read."""

    def __init__(self, num_bytes: int) -> None:
        self.capacity = max(SMALLEST, 1 << (num_bytes - 1).bit_length())
        self.file = os.memfd_create("alfb_dist", os.MFD_CLOEXEC)
        os.ftruncate(self.file, self.capacity)
        self.bytes = _mapped(self.file, self.capacity)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)


class Outboxes:
    """Two outboxes in turn, so that one can be written while the other is read."""

    def __init__(self) -> None:
        self._pair = [Outbox(1), Outbox(1)]

    def next(self, num_bytes: int) -> Outbox:
        """An outbox of at least that many bytes: not the one of the last call, but maybe the one before."""
        box = self._pair.pop(0)
        if box.capacity < num_bytes:
            box = Outbox(num_bytes)
        self._pair.append(box)
        return box


class Peer:
    """Another process whose outboxes this one reads."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._open: dict[tuple[int, int], Tensor] = {}  # by file and capacity, the latest last

    def _path(self, file: int) -> str:
        return f"/proc/{self.pid}/fd/{file}"

    def has(self, file: int) -> bool:
        """Whether it still has this file open, which a process that has ended has not."""
        return os.path.exists(self._path(file))

    def open(self, file: int, capacity: int) -> Tensor:
        """All of an outbox, as it is now and will be; OSError if it cannot be read."""
        descriptor = os.open(self._path(file), os.O_RDWR | os.O_CLOEXEC)
        try:
            return _mapped(descriptor, capacity)
        finally:
            os.close(descriptor)

    def read(self, file: int, capacity: int, start: int, num_bytes: int) -> Tensor:
        """These bytes of its outbox, as they are now and will be; OSError if it cannot be read."""
        box = self._open.pop((file, capacity), None)
        if box is None:
            box = self.open(file, capacity)
        self._open[file, capacity] = box
        if len(self._open) > 2:  # one that it has replaced
            del self._open[next(iter(self._open))]
        return box[start : start + num_bytes]

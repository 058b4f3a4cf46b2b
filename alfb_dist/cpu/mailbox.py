"""Numbers between the ranks of one machine, through memory that they share (mailbox.c): the notes of an exchange.

A note takes a few microseconds where the network's loopback takes some hundred. Each rank writes what it has for the
others on a board of its own, which they read.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from alfb_dist.cpu import shared_memory
from alfb_dist.cpu.build import load
from alfb_dist.cpu.shared_memory import Outbox, Peer

MOST_NUMBERS = 7
SPIN_SECONDS, LOOK_SECONDS = 1e-3, 0.1  # how long a waiting rank keeps its processor; how often it looks for the dead
_SLOT_BYTES = 64


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they or the memory cannot be had."""
    lib = load(Path(__file__).parent / "csrc" / "mailbox.c") if shared_memory.available() else None
    if lib is not None:
        lib.post.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        lib.post.restype = None
        lib.collect.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 4]
        lib.collect.restype = ctypes.c_int64
    return lib


def _library() -> ctypes.CDLL:
    lib = library()
    assert lib is not None
    return lib


def board(num_ranks: int) -> Outbox | None:
    """Where a rank writes its notes for so many; None where there is no `library`."""
    return None if library() is None else Outbox(2 * num_ranks * _SLOT_BYTES)


class Mailbox:
    """The notes of one rank of a group, all of whose ranks read each other's boards.

    peers: by rank, None at this one's place; files: of their boards. seconds: how long to wait for a note.
    """

    def __init__(
        self, rank: int, mine: Outbox, peers: list[Peer | None], files: list[int], seconds: Callable[[], float]
    ) -> None:
        self._rank, self._mine, self._peers, self._files, self._seconds = rank, mine, peers, files, seconds
        self._boards = [None if peer is None else peer.open(file, mine.capacity) for peer, file in zip(peers, files)]
        self._turn = 0

    def post(self, notes: list[list[int]]) -> None:
        """The ranks may read what this one notes for each of them, equally many numbers. `collect` must follow."""
        self._turn += 1
        lib, width = _library(), len(notes[0])
        assert width <= MOST_NUMBERS
        for r, note in enumerate(notes):
            if r != self._rank:
                lib.post(self._slot(self._mine.bytes, r), (ctypes.c_int64 * width)(*note), width, self._turn)

    def collect(self, mine: list[int]) -> list[list[int]]:
        """What each rank has noted for this one, in rank order; of this one itself, `mine`.

        Raises torch.distributed.DistError if a rank has ended, or lets the others wait too long.
        """
        return [
            mine if board is None else self._collect(r, self._slot(board, self._rank), len(mine))
            for r, board in enumerate(self._boards)
        ]

    def _slot(self, board: Tensor, rank: int) -> int:
        """Of the two for a rank, in turn: others may still read the note of the turn before."""
        return board.data_ptr() + (self._turn % 2 * len(self._boards) + rank) * _SLOT_BYTES

    def _collect(self, rank: int, slot: int, width: int) -> list[int]:
        lib, numbers = _library(), (ctypes.c_int64 * width)()
        times = (int(SPIN_SECONDS * 1e9), int(LOOK_SECONDS * 1e9))
        begun = time.monotonic()
        while not lib.collect(slot, numbers, width, self._turn, *times):
            peer = self._peers[rank]
            if (
                peer is not None
                and not peer.has(self._files[rank])
                and not lib.collect(slot, numbers, width, self._turn, 0, 0)
            ):
                raise dist.DistError(f"rank {rank} of the group has ended")
            if (waited := time.monotonic() - begun) > self._seconds():
                raise dist.DistError(f"timed out after {waited:.1f} s of waiting for rank {rank} of the group")
        return list(numbers)

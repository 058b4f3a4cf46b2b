"""A few numbers from each rank of one machine to each other, through shared memory (csrc/mailbox.c).

They take microseconds, where the loopback network takes some hundred. Each rank writes what it has for the others to a
board of its own, which they read.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from alfb_dist.cpu.build import Library
from alfb_dist.cpu.shared_memory import Outbox, Peer, has_shared_memory

MAX_NUMBERS = 7
SPIN_SECONDS = 1e-3  # how long a waiting rank keeps its processor
CHECK_SECONDS = 0.1  # how often it looks for dead ranks
_SLOT_BYTES = 64

MAILBOX = Library("mailbox.c", {"post": (2, 2), "collect": (4, 2)}, returning=("collect",))


def board(num_ranks: int) -> Outbox | None:
    """Return the memory where a rank writes for others, or None without shared memory or a compiler."""
    if not has_shared_memory() or not MAILBOX.available():
        return None
    return Outbox(2 * num_ranks * _SLOT_BYTES)


class Mailbox:
    """One rank's exchange of numbers with all ranks of a group, each of which reads all boards.

    own: this rank's board. peers: by rank, None at this one's place. files: of their boards. seconds: returns how long
    to wait for a rank.
    """

    def __init__(
        self, rank: int, own: Outbox, peers: list[Peer | None], files: list[int], seconds: Callable[[], float]
    ) -> None:
        self._rank, self._own, self._peers, self._files, self._seconds = rank, own, peers, files, seconds
        self._boards = [None if peer is None else peer.open(file, own.capacity) for peer, file in zip(peers, files)]
        self._turn = 0

    def post(self, numbers: list[list[int]]) -> None:
        """Publish a list of numbers for each rank, all of one length. `collect` must follow."""
        self._turn += 1
        width = len(numbers[0])
        assert width <= MAX_NUMBERS
        for r, values in enumerate(numbers):
            if r != self._rank:
                slot = self._slot(self._own.bytes, r)
                MAILBOX.call("post", width, self._turn, slot, (ctypes.c_int64 * width)(*values))

    def collect(self, own: list[int]) -> list[list[int]]:
        """Return the numbers that each rank has for this one, in rank order, and `own` in this rank's place.

        Raises torch.distributed.DistError if a rank has ended or does not post in time.
        """
        return [
            own if board is None else self._collect(r, self._slot(board, self._rank), len(own))
            for r, board in enumerate(self._boards)
        ]

    def _slot(self, board: Tensor, rank: int) -> int:
        """Return the address for a rank on a board. There are two, since others may still read the turn before."""
        return board.data_ptr() + (self._turn % 2 * len(self._boards) + rank) * _SLOT_BYTES

    def _collect(self, rank: int, slot: int, width: int) -> list[int]:
        numbers = (ctypes.c_int64 * width)()
        spin, check = int(SPIN_SECONDS * 1e9), int(CHECK_SECONDS * 1e9)
        start = time.monotonic()
        while not MAILBOX.call("collect", width, self._turn, spin, check, slot, numbers):
            peer = self._peers[rank]
            if (
                peer is not None
                and not peer.has(self._files[rank])
                and not MAILBOX.call("collect", width, self._turn, 0, 0, slot, numbers)
            ):
                raise dist.DistError(f"rank {rank} of the group has ended")
            if (waited := time.monotonic() - start) > self._seconds():
                raise dist.DistError(f"timed out after {waited:.1f} s of waiting for rank {rank} of the group")
        return list(numbers)

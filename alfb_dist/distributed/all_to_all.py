"""Rows to the other ranks of a group and from them, several tensors in one message.

Ranks of one machine read each other's messages from memory; the others get theirs by an all-to-all of bytes. With
messages in memory comes a small exchange of notes: it tells that a message is there, and that the one before has been
read. Notes go by memory too where all ranks of the group can (mailbox.py), else through torch.distributed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from alfb_dist import cpu
from alfb_dist.distributed.collectives import (
    all_gather_numbers,
    check_notes,
    exchange_notes,
    notes_to_send,
    start_all_to_all_bytes,
    timeout_seconds,
)
from alfb_dist.profiling import span

ALIGNMENT = 64  # bytes, of each tensor in a message

Rows = tuple[Tensor, Tensor | None]
"""A tensor and which of its rows are sent (int64), in order of destination; None for all."""


class Layout:
    """Where the tensors of a message lie, for a number of rows."""

    def __init__(self, like: Sequence[Tensor], num_rows: int) -> None:
        self._num_rows = num_rows
        self._kinds = [(t.dtype, t.shape[1:]) for t in like]
        self._sizes = [num_rows * prod(shape) * dtype.itemsize for dtype, shape in self._kinds]
        *self._starts, self.num_bytes = accumulate((-(-n // ALIGNMENT) * ALIGNMENT for n in self._sizes), initial=0)

    def views(self, message: Tensor) -> list[Tensor]:
        """The tensors in a message of `num_bytes` bytes."""
        return [
            message[start : start + size].view(dtype).view(self._num_rows, *shape)
            for start, size, (dtype, shape) in zip(self._starts, self._sizes, self._kinds)
        ]


@dataclass(frozen=True)
class _Neighbors:
    """How messages and notes go in a group of ranks."""

    peers: list[cpu.Peer | None]  # by rank: whose memory this rank reads, and who reads its
    all_pairs: bool  # every rank reads every other's
    any_pair: bool
    mailbox: cpu.Mailbox | None


def _meet(group: ProcessGroup, device: torch.device) -> _Neighbors:
    """Whether a rank can read another's memory is tried, not assumed; collective."""
    rank, trial, board, card = group.rank(), None, None, [0] * 6
    if device.type == "cpu" and cpu.has_shared_memory():
        trial, secret = cpu.Outbox(8), int.from_bytes(os.urandom(7), "little")
        trial.bytes[:8] = torch.tensor([secret]).view(torch.uint8)
        board = cpu.board(group.size())
        files = (trial.file, trial.capacity, 0 if board is None else board.file)
        card = [os.getpid(), cpu.network_namespace(), secret, *files]
    cards = all_gather_numbers(card, group, device)
    reads = [int(trial is not None and r != rank and _reads(*theirs[:5])) for r, theirs in enumerate(cards)]
    table = all_gather_numbers(reads, group, device)
    pairs = {(i, j): bool(table[i][j] and table[j][i]) for i in range(len(table)) for j in range(len(table)) if i != j}
    peers = [cpu.Peer(theirs[0]) if pairs.get((rank, r)) else None for r, theirs in enumerate(cards)]
    boards, box = [theirs[5] for theirs in cards], None
    if board is not None and all(pairs.values()) and all(boards):
        box = cpu.Mailbox(rank, board, peers, boards, lambda: timeout_seconds(group, device))
    return _Neighbors(peers, all(pairs.values()), any(pairs.values()), box)


def _reads(pid: int, network: int, secret: int, file: int, capacity: int) -> bool:
    if not pid or network != cpu.network_namespace():
        return False
    try:
        return int(cpu.Peer(pid).read(file, capacity, 0, 8).view(torch.int64)) == secret
    except (OSError, ValueError):
        return False


def _places(going: list[Layout], peers: list[cpu.Peer | None]) -> tuple[list[int], int]:
    """(where each rank's message starts, bytes in all): first those that go through the network, in rank order."""
    starts, total = [0] * len(going), 0
    by_memory = [peer is not None for peer in peers]
    for r in sorted(range(len(going)), key=by_memory.__getitem__):
        starts[r], total = total, total + going[r].num_bytes
    return starts, total


@dataclass
class Underway:
    """An exchange that has been started."""

    like: list[Tensor]  # of no rows: the types and shapes of what is exchanged
    nothing: Tensor
    receive_counts: list[int] | None
    notes: list[list[int]] = field(default_factory=list)  # of each rank for this one, once they are there
    problem: str = ""  # with the rows that this rank was to send
    network: Callable[[], list[Tensor]] | None = None  # gives what comes by it, by rank

    @property
    def counts(self) -> list[int]:
        """The rows that each rank sends to this one."""
        assert self.receive_counts is not None
        return self.receive_counts

    @property
    def numbers(self) -> list[int]:
        """The number that each rank told this one."""
        return [number for *_, number in self.notes]

    def agree(self) -> None:
        """The rows are as many as the notes say; RuntimeError if other numbers were agreed on."""
        told = [count for count, *_ in self.notes]
        if self.receive_counts is not None and told != self.receive_counts:
            raise RuntimeError(f"the ranks of the group send {told} rows, not {self.receive_counts} as was agreed")
        self.receive_counts = told


class Exchange:
    """The exchanges of one group of ranks, all on one kind of device."""

    def __init__(self, group: ProcessGroup) -> None:
        self.rank, self.num_ranks = group.rank(), group.size()
        self._group = group
        self._met: _Neighbors | None = None
        self._underway = False
        self._outboxes: cpu.Outboxes | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        """A copied model lives on the same ranks; process groups cannot be copied."""
        return self

    def tell_all(self, numbers: list[int], device: torch.device) -> list[list[int]]:
        """Each rank's numbers (equally many), in rank order; collective."""
        return all_gather_numbers(numbers, self._group, device)

    def swap(
        self, rows: Sequence[Rows], send_counts: list[int], receive_counts: list[int] | None = None
    ) -> tuple[list[list[Tensor]], list[int]]:
        """What each rank sent to this one, and how many rows; collective. See `start` and `finish`."""
        return self.finish(self.start(rows, send_counts, receive_counts))

    def start(
        self,
        rows: Sequence[Rows],
        send_counts: list[int],
        receive_counts: list[int] | None = None,
        numbers: list[int] | None = None,
    ) -> Underway:
        """Rows are on their way to the other ranks; collective. `finish` must follow before the next start.

        send_counts: rows for each rank, in rank order. This rank's own are counted but go nowhere.
        receive_counts: as an earlier swap told them, or None where they are to be told now.
        numbers: one more for each rank to be told, only where receive_counts is None.
        """
        with span("exchange"):
            return self._start(rows, send_counts, receive_counts, numbers or [0] * len(send_counts))

    def _start(
        self, rows: Sequence[Rows], send_counts: list[int], receive_counts: list[int] | None, numbers: list[int]
    ) -> Underway:
        if self._underway:
            raise RuntimeError("an exchange was started before the one before it was finished")
        like, device = [source for source, _ in rows], rows[0][0].device
        if self._met is None:
            self._met = _meet(self._group, device)
            self._outboxes = cpu.Outboxes() if any(self._met.peers) else None
        met, going = self._met, self._layouts(like, send_counts)
        starts, num_bytes = _places(going, met.peers)
        box = None if self._outboxes is None else self._outboxes.next(num_bytes)
        message = torch.empty(num_bytes, dtype=torch.uint8, device=device) if box is None else box.bytes
        self._pack(message, rows, send_counts, going, starts)

        where, (source, index) = (0, 0) if box is None else (box.file, box.capacity), rows[0]
        notes = [[n, *where, start, number] for n, start, number in zip(send_counts, starts, numbers)]
        num_rows = source.shape[0] if index is None else index.numel()
        under = Underway([t.new_empty(0, *t.shape[1:]) for t in like], message[:0], receive_counts)
        if met.mailbox is not None:
            under.notes, under.problem = notes_to_send(notes, num_rows, self._group)
            met.mailbox.post(under.notes)
        else:
            if receive_counts is None or met.any_pair:
                under.notes = exchange_notes(notes, num_rows, self._group, device)
                under.agree()
            under.network = self._by_network(met, message, going, self._layouts(like, under.counts))
        self._underway = True
        return under

    def finish(self, under: Underway) -> tuple[list[list[Tensor]], list[int]]:
        """What came from each rank, and how many rows; collective.

        By rank a tensor for each of the rows given to `start` (for this one: of no rows), to be read before the next.

        Raises RuntimeError on every rank if one of them has counts that do not add up.
        """
        with span("exchange"):
            self._underway = False
            assert self._met is not None
            if self._met.mailbox is not None:
                under.notes = self._met.mailbox.collect(under.notes[self.rank])
                check_notes(under.notes, self._group, under.problem)
                under.agree()
            coming = self._layouts(under.like, under.counts)
            arrived = [under.nothing] * self.num_ranks if under.network is None else under.network()
            for r, peer in enumerate(self._met.peers):
                if peer is not None:
                    arrived[r] = _read(peer, r, coming[r].num_bytes, *under.notes[r][1:4])
            return [layout.views(part) for layout, part in zip(coming, arrived)], under.counts

    def _layouts(self, like: list[Tensor], counts: list[int]) -> list[Layout]:
        return [Layout(like, 0 if r == self.rank else n) for r, n in enumerate(counts)]

    def _pack(
        self, message: Tensor, rows: Sequence[Rows], counts: list[int], going: list[Layout], starts: list[int]
    ) -> None:
        stops = list(accumulate(counts))
        for r, (layout, start) in enumerate(zip(going, starts)):
            if r == self.rank or not counts[r]:
                continue
            part = slice(stops[r] - counts[r], stops[r])
            for (source, index), view in zip(rows, layout.views(message[start : start + layout.num_bytes])):
                if index is None:
                    view.copy_(source[part])
                else:
                    torch.index_select(source, 0, index[part], out=view)

    def _by_network(
        self, met: _Neighbors, message: Tensor, going: list[Layout], coming: list[Layout]
    ) -> Callable[[], list[Tensor]] | None:
        """What goes to ranks whose memory cannot be read is on its way."""
        if met.all_pairs:
            return None
        sent, received = (
            [0 if peer else layout.num_bytes for peer, layout in zip(met.peers, layouts)] for layouts in (going, coming)
        )
        return start_all_to_all_bytes(message[: sum(sent)], sent, received, self._group)


def _read(peer: cpu.Peer, rank: int, num_bytes: int, file: int, capacity: int, start: int) -> Tensor:
    try:
        return peer.read(file, capacity, start, num_bytes)
    except OSError as error:
        raise dist.DistError(f"rank {rank} of the group ended, its rows unread: {error.strerror}") from error

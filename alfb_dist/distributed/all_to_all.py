"""All-to-all of rows in a group of ranks: several tensors in one message, by the transport that the group has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from alfb_dist.distributed import memory_transport
from alfb_dist.distributed.collectives import all_gather_numbers
from alfb_dist.distributed.network_transport import NetworkTransport
from alfb_dist.distributed.transport import Header, Transport
from alfb_dist.profiling import span

ALIGNMENT = 64  # bytes, of each tensor in a message

Rows = tuple[Tensor, Tensor | None]
"""A tensor and which of its rows are sent (int64), in order of destination; None for all."""


class Layout:
    """How the rows of several tensors lie in a message: one tensor after the other, each aligned."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._kinds = [(t.dtype, t.shape[1:], prod(t.shape[1:]) * t.dtype.itemsize) for t in tensors]

    def sizes(self, counts: list[int], own: int) -> list[int]:
        """Return the bytes of the message of each rank, by its number of rows; 0 for rank `own`, which needs none."""
        return [
            0 if r == own else sum([_aligned(num_rows * width) for _, _, width in self._kinds])
            for r, num_rows in enumerate(counts)
        ]

    def views(self, message: Tensor, num_rows: int) -> list[Tensor]:
        """Return the tensors in a message of that many rows."""
        found, start = [], 0
        for dtype, shape, width in self._kinds:
            size = num_rows * width
            found.append(message[start : start + size].view(dtype).view(num_rows, *shape))
            start += _aligned(size)
        return found


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass
class Handle:
    """An exchange that has been started."""

    layout: Layout
    group: ProcessGroup
    rank: int  # this one, in the group
    receive_counts: list[int] | None
    problem: str  # with the row counts of this rank, '' if they add up
    headers: list[Header] = field(default_factory=list)  # of each rank, once they are here
    wait: Callable[[], list[Tensor]] | None = None

    @property
    def counts(self) -> list[int]:
        """The number of rows from each rank."""
        assert self.receive_counts is not None
        return self.receive_counts

    @property
    def numbers(self) -> list[int]:
        """The number that each rank gave to `start` for this one."""
        return [header.number for header in self.headers]

    def accept(self, headers: list[Header]) -> list[int]:
        """Take the row counts from the headers, and return the bytes of each message.

        Raises RuntimeError if a rank's counts do not add up, or are not those agreed on before.
        """
        wrong = [dist.get_global_rank(self.group, r) for r, header in enumerate(headers) if header.num_rows < 0]
        if wrong:
            raise RuntimeError(f"row counts do not add up to the rows to be sent on rank(s) {wrong}{self.problem}")
        counts = [header.num_rows for header in headers]
        if self.receive_counts is not None and counts != self.receive_counts:
            raise RuntimeError(f"the ranks of the group send {counts} rows, not {self.receive_counts} as was agreed")
        self.headers, self.receive_counts = headers, counts
        return self.layout.sizes(counts, self.rank)


class Exchange:
    """The exchanges of one group of ranks, all on one kind of device."""

    def __init__(self, group: ProcessGroup) -> None:
        self.rank, self.num_ranks = group.rank(), group.size()
        self._group = group
        self._transport: Transport | None = None
        self._started = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        """A copied model lives on the same ranks; process groups cannot be copied."""
        return self

    def all_gather(self, numbers: list[int], device: torch.device) -> list[list[int]]:
        """Return each rank's numbers, as many on every rank, in rank order; collective."""
        return all_gather_numbers(numbers, self._group, device)

    def all_to_all(
        self, rows: Sequence[Rows], send_counts: list[int], receive_counts: list[int] | None = None
    ) -> tuple[list[list[Tensor]], list[int]]:
        """Return the rows that each rank sent to this one, and their number; collective. See `start` and `finish`."""
        return self.finish(self.start(rows, send_counts, receive_counts))

    def start(
        self,
        rows: Sequence[Rows],
        send_counts: list[int],
        receive_counts: list[int] | None = None,
        numbers: list[int] | None = None,
    ) -> Handle:
        """Send rows to the other ranks; collective. `finish` must follow before the next start.

        send_counts: rows for each rank, in rank order. This rank's own are counted but go nowhere.
        receive_counts: rows from each rank, known from an earlier exchange; or None.
        numbers: one for each rank, which finds it in `Handle.numbers`; only where receive_counts is None.
        """
        if self._started:
            raise RuntimeError("an exchange was started before the one before it was finished")
        with span("exchange"):
            tensors = [source for source, _ in rows]
            if self._transport is None:
                self._transport = _connect(self._group, tensors[0].device)
            layout, problem = Layout(tensors), self._problem(rows[0], send_counts)
            handle = Handle(layout, self._group, self.rank, receive_counts, problem)
            known = receive_counts is not None and not self._transport.needs_headers
            if problem and known:  # no header goes to the others
                raise RuntimeError(f"row counts do not add up to the rows to be sent{problem}")
            counts = [0] * self.num_ranks if problem else send_counts
            numbers = numbers or [0] * self.num_ranks
            headers = [Header(-1)] * self.num_ranks if problem else list(map(Header, counts, numbers))
            _pack(self._transport.buffers(layout.sizes(counts, self.rank)), rows, counts, layout, self.rank)
            sizes = layout.sizes(handle.counts, self.rank) if known else None
            handle.wait = self._transport.start(headers, handle.accept, sizes)
            self._started = True
            return handle

    def finish(self, handle: Handle) -> tuple[list[list[Tensor]], list[int]]:
        """Return the rows that each rank sent to this one, and their number; collective.

        By rank a tensor for each of the `rows` given to `start`, without this rank's own; to be read before the next.

        Raises RuntimeError on every rank if the counts of one do not add up, and torch.distributed.DistError if a rank
        has ended or is too late.
        """
        with span("exchange"):
            self._started = False
            wait, handle.wait = handle.wait, None  # it holds the handle
            assert wait is not None
            messages = wait()
            counts = [0 if r == self.rank else n for r, n in enumerate(handle.counts)]
            return [handle.layout.views(m, n) for m, n in zip(messages, counts)], handle.counts

    def _problem(self, first: Rows, counts: list[int]) -> str:
        """Return why the rows cannot be sent by these counts, or ''."""
        source, index = first
        num_rows = source.shape[0] if index is None else index.numel()
        good = len(counts) == self.num_ranks and sum(counts) == num_rows and min(counts) >= 0
        return "" if good else f"; here {counts} for {num_rows} rows"


def _connect(group: ProcessGroup, device: torch.device) -> Transport:
    """Return the memory transport where two ranks of the group share memory, else the network's; collective."""
    return memory_transport.connect(group, device) or NetworkTransport(group, device)


def _pack(buffers: list[Tensor], rows: Sequence[Rows], counts: list[int], layout: Layout, own: int) -> None:
    stop = 0
    for r, (buffer, num_rows) in enumerate(zip(buffers, counts)):
        start, stop = stop, stop + num_rows
        if r == own or not num_rows:
            continue
        for (source, index), view in zip(rows, layout.views(buffer, num_rows)):
            if index is None:
                view.copy_(source[start:stop])
            else:
                torch.index_select(source, 0, index[start:stop], out=view)

"""Messages that the ranks of one machine read from each other's memory; by the network between the others.

A header says where in the sender's memory the message is, and that the message before has been read. Headers go through
shared memory too where all ranks of the group can (Mailbox), else through torch.distributed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from alfb_dist import cpu
from alfb_dist.distributed.collectives import all_gather_numbers, exchange_numbers, timeout_seconds
from alfb_dist.distributed.network_transport import NetworkTransport
from alfb_dist.distributed.transport import Accept, Header


class Endpoint(NamedTuple):
    """Where the others find a rank's memory; of zeros if it shares none."""

    pid: int = 0
    network: int = 0  # its network namespace: another one counts as another machine
    secret: int = 0  # the first eight bytes of the file, by which a reader knows that it has read the right memory
    file: int = 0
    capacity: int = 0
    board: int = 0  # the file of its headers; 0 if it has none

    def is_readable(self) -> bool:
        """Return whether this process can read that rank's memory."""
        if not self.pid or self.network != cpu.network_namespace():
            return False
        try:
            found = cpu.Peer(self.pid).read(self.file, self.capacity, 0, 8)
        except (OSError, ValueError):
            return False
        return int(found.view(torch.int64)) == self.secret


def connect(group: ProcessGroup, device: torch.device) -> MemoryTransport | None:
    """Return the group's transport through memory, None if no two of its ranks share any; collective.

    Whether a rank can read another's memory is tried, not assumed.
    """
    rank, num_ranks = group.rank(), group.size()
    outbox = board = None
    own = Endpoint()
    if device.type == "cpu" and cpu.has_shared_memory():
        outbox, board = cpu.Outbox(8), cpu.board(num_ranks)
        secret = int.from_bytes(os.urandom(7), "little")
        outbox.bytes[:8] = torch.tensor([secret]).view(torch.uint8)
        files = (outbox.file, outbox.capacity, 0 if board is None else board.file)
        own = Endpoint(os.getpid(), cpu.network_namespace(), secret, *files)
    endpoints = [Endpoint(*numbers) for numbers in all_gather_numbers(own, group, device)]
    readable = [int(outbox is not None and r != rank and e.is_readable()) for r, e in enumerate(endpoints)]
    reads = all_gather_numbers(readable, group, device)
    pairs = {(i, j) for i in range(num_ranks) for j in range(num_ranks) if reads[i][j] and reads[j][i]}
    if not pairs:
        return None
    peers = [cpu.Peer(e.pid) if (rank, r) in pairs else None for r, e in enumerate(endpoints)]
    if len(pairs) < num_ranks * (num_ranks - 1):
        return MemoryTransport(group, peers, NetworkTransport(group, device), None)
    boards = [e.board for e in endpoints]
    box = None
    if board is not None and all(boards):
        box = cpu.Mailbox(rank, board, peers, boards, lambda: timeout_seconds(group, device))
    return MemoryTransport(group, peers, None, box)


class MemoryTransport:
    """Reaches the ranks of a group that share memory with this one by it, and the others by the network.

    peers: by rank, None where the network is taken. network: None if every two ranks share memory.
    mailbox: None if headers go by torch.distributed.
    """

    needs_headers = True

    def __init__(
        self,
        group: ProcessGroup,
        peers: list[cpu.Peer | None],
        network: NetworkTransport | None,
        mailbox: cpu.Mailbox | None,
    ) -> None:
        self.peers, self._network, self._mailbox = peers, network, mailbox
        self._group, self._rank = group, group.rank()
        self._outboxes = cpu.Outboxes() if any(peers) else None
        self._nothing = torch.empty(0, dtype=torch.uint8)

    def buffers(self, sizes: list[int]) -> list[Tensor]:
        shared = [0 if peer is None else size for size, peer in zip(sizes, self.peers)]
        *starts, total = accumulate(shared, initial=0)
        self._places = [(0, 0, 0)] * len(sizes)
        buffers = [self._nothing] * len(sizes)
        if self._outboxes is not None:
            box = self._outboxes.next(total)
            self._places = [(box.file, box.capacity, start) for start in starts]
            buffers = [box.bytes[start : start + size] for start, size in zip(starts, shared)]
        if self._network is not None:
            others = self._network.buffers([size if peer is None else 0 for size, peer in zip(sizes, self.peers)])
            buffers = [other if peer is None else own for own, other, peer in zip(buffers, others, self.peers)]
        return buffers

    def start(self, headers: list[Header], accept: Accept, sizes: list[int] | None) -> Callable[[], list[Tensor]]:
        sent = [[*header, *place] for header, place in zip(headers, self._places)]
        if self._mailbox is not None:
            self._mailbox.post(sent)
            return partial(self._collect, self._mailbox, sent[self._rank], accept)
        received = exchange_numbers(sent, self._group, torch.device("cpu"))
        sizes = _accepted(received, accept)
        if self._network is None:
            return partial(self._read, received, sizes, [self._nothing] * len(sizes))
        others = [size if peer is None else 0 for size, peer in zip(sizes, self.peers)]
        wait = self._network.start(headers, accept, others)
        return lambda: self._read(received, sizes, wait())

    def _collect(self, box: cpu.Mailbox, own: list[int], accept: Accept) -> list[Tensor]:
        received = box.collect(own)
        return self._read(received, _accepted(received, accept), [self._nothing] * len(received))

    def _read(self, received: list[list[int]], sizes: list[int], messages: list[Tensor]) -> list[Tensor]:
        """Return the messages, of which those in memory are put in their places."""
        for r, peer in enumerate(self.peers):
            if peer is not None:
                file, capacity, start = received[r][2:]
                try:
                    messages[r] = peer.read(file, capacity, start, sizes[r])
                except OSError as error:
                    raise dist.DistError(f"rank {r} of the group ended, its rows unread: {error.strerror}") from error
        return messages


def _accepted(received: list[list[int]], accept: Accept) -> list[int]:
    return accept([Header(*numbers[:2]) for numbers in received])

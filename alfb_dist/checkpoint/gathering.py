"""Elements of parameters, gathered from the ranks that hold parts of them by the ranks that write them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from alfb_dist.distributed.collectives import Group, all_to_all_bytes, group_rank, share_objects, size


@dataclass(frozen=True)
class Span:
    """Elements start to stop of a rank's flattened parameter."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class Request:
    """Elements start to stop of a flattened parameter that a rank writes."""

    writer: int
    parameter: str
    kind: str
    """The weight itself or a state of the optimizer."""
    position: int | None
    """The expert-parallel position of the ranks that hold the parameter; None if all ranks do."""
    start: int
    stop: int
    element_bytes: int


class Gatherer:
    """Brings elements of parameters from the ranks that hold them to the ranks that write them."""

    def __init__(
        self,
        held: Mapping[str, tuple[int, int]],
        read: Callable[[Request, int, int], Tensor],
        ep_degree: int,
        group: Group,
        device: torch.device,
    ) -> None:
        """Share with all ranks what this one holds; collective.

        held: by parameter, (start, stop) of the elements of the flattened parameter that this rank holds.
        read: returns elements start to stop, of those that this rank holds, flat. device: of the group's backend.
        """
        self._read, self._ep_degree, self._group, self._device = read, ep_degree, group, device
        self._rank = group_rank(group)
        self._held: list[dict[str, tuple[int, int]]] = share_objects(dict(held), group)
        self._holders: dict[tuple[str, int | None], list[Span]] = {}
        for rank, spans in enumerate(self._held):
            for name, (start, stop) in spans.items():
                for position in (None, rank % ep_degree):
                    self._holders.setdefault((name, position), []).append(Span(rank, start, stop))
        self._checked: set[tuple[str, int | None]] = set()

    def _spans(self, request: Request) -> list[Span]:
        """Return the spans that make up a request, each from the holder nearest to the writer.

        Raises RuntimeError if a part of it is held by no rank, or parts of the parameter overlap.
        """
        self._check_overlap(request.parameter, request.position)
        writer, at = request.writer, request.start
        low, high = self._held[writer].get(request.parameter, (0, 0))
        if low <= at and request.stop <= high and request.position in (None, writer % self._ep_degree):
            return [Span(writer, at, request.stop)]
        node = writer // self._ep_degree
        holders = self._holders.get((request.parameter, request.position), [])
        nearest = sorted(holders, key=lambda s: (s.rank != writer, s.rank // self._ep_degree != node, s.rank))
        found = []
        while at < request.stop:
            holder = next((span for span in nearest if span.start <= at < span.stop), None)
            if holder is None:
                raise RuntimeError(f"no rank holds element {at} of {request.parameter} at position {request.position}")
            found.append(Span(holder.rank, at, min(holder.stop, request.stop)))
            at = found[-1].stop
        return found

    def _check_overlap(self, parameter: str, position: int | None) -> None:
        """Raise RuntimeError if ranks hold parts that overlap and are not the same: it is not known which is right."""
        if (parameter, position) in self._checked:
            return
        self._checked.add((parameter, position))
        parts = sorted({(span.start, span.stop) for span in self._holders.get((parameter, position), [])})
        for (_, stop), (start, next_stop) in pairwise(parts):
            if start < stop:
                raise RuntimeError(
                    f"{parameter} is held in parts that overlap: elements up to {stop} by one rank and {start} to "
                    f"{next_stop} by another"
                )

    def _bytes(self, request: Request, span: Span) -> Tensor:
        return self._read(request, span.start, span.stop).contiguous().view(torch.uint8)

    @torch.no_grad()
    def gather(self, requests: Sequence[Request]) -> list[Tensor]:
        """Return the bytes of the requests that this rank writes, in order, on CPU; collective.

        requests: the same on every rank. What is returned may share memory with the parameters.
        """
        outgoing: list[list[Tensor]] = [[] for _ in range(size(self._group))]
        found: list[Tensor] = []
        incoming: list[tuple[int, Tensor]] = []
        exchanged = False
        for request in requests:
            spans = self._spans(request)
            is_mine = request.writer == self._rank
            if [span.rank for span in spans] == [request.writer]:  # neither sent nor copied
                found += [self._bytes(request, spans[0]).cpu()] if is_mine else []
                continue
            exchanged = True
            if is_mine:
                found.append(torch.empty((request.stop - request.start) * request.element_bytes, dtype=torch.uint8))
                parts = found[-1].split([(span.stop - span.start) * request.element_bytes for span in spans])
                incoming += [(span.rank, part) for span, part in zip(spans, parts)]
            outgoing[request.writer] += [self._bytes(request, span) for span in spans if span.rank == self._rank]
        if exchanged:
            self._exchange(outgoing, incoming)
        return found

    def _exchange(self, outgoing: list[list[Tensor]], incoming: list[tuple[int, Tensor]]) -> None:
        """Send each rank its bytes and fill each of the incoming tensors, (rank, bytes), with what its rank sent."""
        assert self._group is not None
        counts = [sum(x.numel() for rank, x in incoming if rank == r) for r in range(len(outgoing))]
        received = all_to_all_bytes(outgoing, counts, self._group, self._device)
        for rank, x in incoming:
            x.copy_(received[rank][: x.numel()])
            received[rank] = received[rank][x.numel() :]

"""Pieces of a model's tensors, brought from the ranks that hold them to those that write them, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alfb_dist.collectives import (
    Group,
    all_to_all_rows,
    broadcast_object,
    exchange_row_counts,
    gather_objects,
    group_rank,
    size,
)
from alfb_dist.moe import sharded_experts
from alfb_dist.pretrained.names import Piece

BATCH_BYTES = 32 << 20
"""How much a writer is sent at a time; one piece may be more."""


@dataclass(frozen=True)
class Part:
    """This rank's part of a tensor: elements start, start + 1, ... of the tensor flattened, as this rank has it."""

    flat: Tensor
    start: int = 0


@dataclass(frozen=True)
class _Experts:
    """How a tensor is cut over ranks: experts on each, elements of an expert."""

    num_local: int
    size: int


def batches(waiting: list[list[tuple[Piece, int]]]) -> Iterator[list[tuple[int, Piece]]]:
    """(writer, piece) of every writer's pieces with their bytes, in order: about BATCH_BYTES for each at a time."""
    queues = [list(reversed(queue)) for queue in waiting]
    while any(queues):
        batch = []
        for writer, queue in enumerate(queues):
            taken = 0
            while queue and (taken == 0 or taken + queue[-1][1] <= BATCH_BYTES):
                piece, count = queue.pop()
                taken += max(count, 1)
                batch.append((writer, piece))
        yield batch


class Gatherer:
    """Brings pieces to their writers. Making one is collective."""

    def __init__(self, model: Any, parts: Mapping[str, Part], group: Group, device: torch.device) -> None:
        """parts: what this rank holds, by the names of the model's tensors."""
        self._parts, self._group, self._device = parts, group, device
        self._rank, self._ep = group_rank(group), 1
        self._experts: dict[str, _Experts] = {}
        for name, module in sharded_experts(model):
            self._ep = module.ep_size
            for parameter, p in module.named_parameters():
                self._experts[f"{name}.{parameter}"] = _Experts(module.num_local_experts, p[0].numel())
        self._sizes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        mine = {name: (part.start, part.start + part.flat.numel()) for name, part in parts.items()}
        self._spans: list[dict[str, tuple[int, int]]] = broadcast_object(gather_objects(mine, group), group)

    def _place(self, piece: Piece) -> tuple[int | None, int, int]:
        """(position in the expert-parallel group, first, end) of a piece in its holders' flattened tensors."""
        if piece.expert is None:
            return None, piece.start, piece.stop
        experts = self._experts.get(piece.parameter)
        if experts is None:
            first = piece.expert * (torch.Size(self._sizes[piece.parameter][1:]).numel())
            return None, first + piece.start, first + piece.stop
        position, local = divmod(piece.expert, experts.num_local)
        return position, local * experts.size + piece.start, local * experts.size + piece.stop

    def _sources(self, writer: int, piece: Piece) -> list[tuple[int, int, int]]:
        """(rank, first, end) of the stretches that make up the piece, each from the holder nearest to the writer."""
        position, at, end = self._place(piece)
        ranks = [r for r in range(len(self._spans)) if position is None or r % self._ep == position]
        ranks.sort(key=lambda r: (r != writer, r // self._ep != writer // self._ep, r))
        found = []
        while at < end:
            spans = ((r, *self._spans[r].get(piece.parameter, (0, 0))) for r in ranks)
            rank, stop = next(((r, high) for r, low, high in spans if low <= at < high), (None, 0))
            if rank is None:
                raise RuntimeError(f"no rank holds element {at} of {piece.parameter} (expert {piece.expert})")
            found.append((rank, at, min(stop, end)))
            at = found[-1][2]
        return found

    def _own(self, piece: Piece, first: int, end: int) -> Tensor:
        part = self._parts[piece.parameter]
        return part.flat[first - part.start : end - part.start].contiguous().view(torch.uint8)

    @torch.no_grad()
    def gather(self, batch: Sequence[tuple[int, Piece]]) -> list[Tensor]:
        """The bytes of those pieces that this rank writes, in order, on CPU; collective."""
        outgoing: list[list[Tensor]] = [[] for _ in range(size(self._group))]
        plan: list[list[tuple[int, int]]] = []
        incoming = [0] * size(self._group)
        for writer, piece in batch:
            width = self._parts[piece.parameter].flat.element_size()
            sources = self._sources(writer, piece)
            if writer == self._rank:
                plan.append([(rank, (end - first) * width) for rank, first, end in sources])
                for rank, count in plan[-1]:
                    incoming[rank] += count
            for rank, first, end in sources:
                if rank == self._rank:
                    outgoing[writer].append(self._own(piece, first, end))
        received = self._exchange(outgoing, incoming)
        found = []
        for stretches in plan:
            taken = []
            for rank, count in stretches:
                taken.append(received[rank][:count])
                received[rank] = received[rank][count:]
            found.append(torch.cat(taken) if len(taken) != 1 else taken[0].contiguous())
        return found

    def _exchange(self, outgoing: list[list[Tensor]], incoming: list[int]) -> list[Tensor]:
        """By rank, the bytes that it sent to this one, on CPU."""
        nothing = torch.empty(0, dtype=torch.uint8, device=self._device)
        if self._group is None:
            return [torch.cat([nothing, *outgoing[0]]).cpu()]
        kept = torch.cat([nothing, *outgoing[self._rank]]).cpu()  # what stays here is not sent
        outgoing[self._rank] = []
        sizes = [sum(x.numel() for x in parts) for parts in outgoing]
        sent = torch.cat([nothing, *(x.to(self._device) for parts in outgoing for x in parts)])
        promised = exchange_row_counts(sizes, sent.numel(), self._group, self._device)
        expected = [0 if rank == self._rank else count for rank, count in enumerate(incoming)]
        if promised != expected:
            raise RuntimeError(f"ranks send {promised} bytes of weights, expected {expected}")
        received = list(all_to_all_rows(sent, sizes, promised, self._group).cpu().split(promised))
        received[self._rank] = kept
        return received

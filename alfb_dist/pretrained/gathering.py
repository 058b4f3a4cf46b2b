"""Pieces of a model's tensors, brought from the ranks that hold them to those that write them, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alfb_dist.distributed.collectives import (
    Group,
    all_to_all_bytes,
    broadcast_object,
    gather_objects,
    group_rank,
    size,
)
from alfb_dist.moe.sharded_experts import sharded_experts
from alfb_dist.pretrained.outputs import Piece

BATCH_BYTES, LEAST_BYTES = 4 << 20, 1 << 20
"""How much all writers together are sent at a time, and the least that each of them is sent."""


@dataclass(frozen=True)
class Part:
    """This rank's part of a tensor: elements start, start + 1, ... of the tensor flattened, as this rank has it."""

    flat: Tensor
    start: int = 0


@dataclass(frozen=True)
class _Experts:
    """How a tensor is cut over ranks: experts in all and on each, elements of an expert."""

    num_experts: int
    num_local: int
    size: int


def batches(waiting: list[list[Piece]], widths: Mapping[str, int]) -> Iterator[list[tuple[int, Piece]]]:
    """(writer, piece) of every writer's pieces in order, a few at a time, large ones cut.

    widths: bytes of an element, by the names of tensors.
    """
    queues, room = [list(reversed(queue)) for queue in waiting], max(LEAST_BYTES, BATCH_BYTES // len(waiting))
    while any(queues):
        batch = []
        for writer, queue in enumerate(queues):
            left = room
            while queue and left > 0:
                piece = queue.pop()
                end = min(piece.stop, piece.start + -(-left // widths[piece.parameter]))
                if end < piece.stop:
                    queue.append(replace(piece, start=end))
                batch.append((writer, replace(piece, stop=end)))
                left -= max(1, (end - piece.start) * widths[piece.parameter])
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
                self._experts[f"{name}.{parameter}"] = _Experts(
                    module.num_experts, module.num_local_experts, p[0].numel()
                )
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
        """(rank, first, end) of the stretches that make up the piece, each from the holder nearest to the writer.

        None of a piece that belongs to no expert (LongCat): it is never read, and written as 0.
        """
        experts = self._experts.get(piece.parameter)
        if experts is not None and piece.expert is not None and piece.expert >= experts.num_experts:
            return []
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
        """The bytes of those pieces that this rank writes, in order, on CPU; collective. Valid until the next call."""
        outgoing: list[list[Tensor]] = [[] for _ in range(size(self._group))]
        found: list[Tensor] = []
        expected: list[tuple[int, Tensor]] = []
        for writer, piece in batch:
            width = self._parts[piece.parameter].flat.element_size()
            sources = self._sources(writer, piece)
            if writer == self._rank and [rank for rank, _, _ in sources] == [writer]:
                found.append(self._own(piece, *sources[0][1:]).cpu())  # what stays here is neither sent nor copied
                continue
            if writer == self._rank:
                found.append(torch.zeros((piece.stop - piece.start) * width, dtype=torch.uint8))
                sizes = [(end - first) * width for _, first, end in sources]
                expected += [(r, x) for (r, _, _), x in zip(sources, found[-1].split(sizes) if sizes else [])]
            for rank, first, end in sources:
                if rank == self._rank:
                    outgoing[writer].append(self._own(piece, first, end))
        self._exchange(outgoing, expected)
        return found

    def _exchange(self, outgoing: list[list[Tensor]], expected: list[tuple[int, Tensor]]) -> None:
        """Each of the expected tensors holds what its rank sent for it. outgoing: by rank, what is sent to it."""
        if self._group is None:
            return
        counts = [sum(x.numel() for rank, x in expected if rank == r) for r in range(len(outgoing))]
        received = all_to_all_bytes(outgoing, counts, self._group, self._device)
        for rank, x in expected:
            x.copy_(received[rank][: x.numel()])
            received[rank] = received[rank][x.numel() :]

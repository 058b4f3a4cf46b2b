"""Pieces of a model's tensors, gathered from the ranks that hold them by those that write them, a batch at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alfb_dist.checkpoint.gathering import Gatherer, Request
from alfb_dist.distributed.collectives import Group, group_rank
from alfb_dist.moe.sharded_experts import sharded_experts
from alfb_dist.pretrained.outputs import Piece

BATCH_BYTES, LEAST_BYTES = 4 << 20, 1 << 20
"""Bytes that all writers together are sent at a time, and the least for each of them."""


@dataclass(frozen=True)
class Part:
    """This rank's elements of a flattened tensor, from element `start` on."""

    flat: Tensor
    start: int = 0


@dataclass(frozen=True)
class _Experts:
    """How a tensor is sharded: experts in total and on each rank, and elements of an expert."""

    num_experts: int
    num_local: int
    size: int


def batches(waiting: list[list[Piece]], widths: Mapping[str, int]) -> Iterator[list[tuple[int, Piece]]]:
    """Yield (writer, piece) of every writer's pieces in order, a batch at a time, with large pieces divided.

    widths: bytes of an element by name of the tensor.
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


class PieceGatherer:
    """Brings pieces of a model's tensors to the ranks that write them."""

    def __init__(self, model: Any, parts: Mapping[str, Part], group: Group, device: torch.device) -> None:
        """Share with all ranks what this one holds; collective.

        parts: what this rank holds, by the names of the model's tensors. device: of the group's backend.
        """
        self._parts, self._rank, ep_degree = parts, group_rank(group), 1
        self._experts: dict[str, _Experts] = {}
        for name, module in sharded_experts(model):
            ep_degree = module.ep_size
            for parameter, p in module.named_parameters():
                self._experts[f"{name}.{parameter}"] = _Experts(
                    module.num_experts, module.num_local_experts, p[0].numel()
                )
        self._sizes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        held = {name: (part.start, part.start + part.flat.numel()) for name, part in parts.items()}
        self._gatherer = Gatherer(held, self._read, ep_degree, group, device)

    def _read(self, request: Request, start: int, stop: int) -> Tensor:
        part = self._parts[request.parameter]
        return part.flat[start - part.start : stop - part.start]

    def _place(self, piece: Piece) -> tuple[int | None, int]:
        """Return (expert-parallel position, first element) of a piece in its holders' flattened tensors."""
        if piece.expert is None:
            return None, piece.start
        experts = self._experts.get(piece.parameter)
        if experts is None:
            return None, piece.expert * math.prod(self._sizes[piece.parameter][1:]) + piece.start
        position, local = divmod(piece.expert, experts.num_local)
        return position, local * experts.size + piece.start

    def _request(self, writer: int, piece: Piece) -> Request | None:
        """Return what has to be gathered of a piece; None if no rank holds it (rows of no expert, LongCat)."""
        experts = self._experts.get(piece.parameter)
        if experts is not None and piece.expert is not None and piece.expert >= experts.num_experts:
            return None
        position, first = self._place(piece)
        stop, width = first + piece.stop - piece.start, self._parts[piece.parameter].flat.element_size()
        return Request(writer, piece.parameter, "weight", position, first, stop, width)

    def gather(self, batch: Sequence[tuple[int, Piece]]) -> list[Tensor]:
        """Return the bytes of the pieces that this rank writes, in order, on CPU; collective.

        batch: (writer, piece), the same on every rank. What is returned may share memory with the model. Rows that
        belong to no expert are 0.
        """
        requests = [self._request(writer, piece) for writer, piece in batch]
        gathered = iter(self._gatherer.gather([request for request in requests if request is not None]))
        return [
            next(gathered) if request is not None else self._zeros(piece)
            for (writer, piece), request in zip(batch, requests)
            if writer == self._rank
        ]

    def _zeros(self, piece: Piece) -> Tensor:
        width = self._parts[piece.parameter].flat.element_size()
        return torch.zeros((piece.stop - piece.start) * width, dtype=torch.uint8)

"""Whole global tensors on the ranks that write them, put together from the parts that ranks hold; batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alfb_dist.checkpoint.optimizer import Held, elementwise
from alfb_dist.checkpoint.safetensors_file import DTYPES, Entry
from alfb_dist.checkpoint.tensors import GlobalTensor
from alfb_dist.distributed.collectives import (
    Group,
    all_to_all_bytes,
    broadcast_object,
    gather_objects,
    group_rank,
)

BATCH_BYTES = 32 << 20
"""How much of its share a writer is sent at a time; one tensor may be more."""


@dataclass(frozen=True)
class Item:
    """One tensor of a save and the rank that writes it."""

    tensor: GlobalTensor
    kind: str
    entry: Entry
    writer: int


def items(tensors: Sequence[GlobalTensor], writers: Sequence[int], kinds: dict[str, dict[str, str]]) -> list[Item]:
    """Every tensor of a save in the order of writing, equal on every rank; wide types before narrow ones.

    kinds: by parameter, the format's name of the type of each kind of tensor there is of it.
    """
    found = [
        Item(tensor, kind, Entry(tensor.key(kind), dtype, tensor.shape), writer)
        for tensor, writer in zip(tensors, writers)
        for kind, dtype in kinds[tensor.parameter].items()
    ]
    return sorted(found, key=lambda item: -DTYPES[item.entry.dtype][1])


def batches(found: Sequence[Item], world_size: int) -> Iterator[list[Item]]:
    """The items cut into batches in which no writer has more than BATCH_BYTES or one tensor, each writer's in order."""
    waiting: list[list[Item]] = [[] for _ in range(world_size)]
    for item in reversed(found):
        waiting[item.writer].append(item)
    while any(waiting):
        batch: list[Item] = []
        for queue in waiting:
            size = 0
            while queue and (size == 0 or size + queue[-1].entry.bytes <= BATCH_BYTES):
                size += max(queue[-1].entry.bytes, 1)
                batch.append(queue.pop())
        yield batch


@dataclass(frozen=True)
class _Piece:
    """Elements start to stop of a global tensor, held by a rank."""

    rank: int
    start: int
    stop: int


class Gatherer:
    """Puts global tensors together from the parts that the ranks hold. Making one is collective."""

    def __init__(self, engine: Any, held: dict[str, Held], ep_degree: int, *, split: bool, group: Group) -> None:
        """split: whether ranks hold fragments of parameters; otherwise writers hold what they write."""
        self._engine, self._held, self._group = engine, held, group
        self._rank = group_rank(group)
        self._spans: dict[tuple[str, int | None], list[tuple[int, int, int]]] = {}
        self._split = split and group is not None and group.size() > 1
        if self._split:
            mine = {name: (part.start, part.numel) for name, part in held.items() if part.numel}
            everyone = broadcast_object(gather_objects(mine, group), group)
            for rank, spans in enumerate(everyone):
                for name, (start, numel) in spans.items():
                    for position in (None, rank % ep_degree):
                        self._spans.setdefault((name, position), []).append((rank, start, start + numel))

    def _pieces(self, item: Item) -> list[_Piece]:
        """Who holds which part of the item's tensor, in order. RuntimeError unless that is each element once."""
        tensor, found, end = item.tensor, [], 0
        if self._held[tensor.parameter].group is None:
            return [_Piece(item.writer, 0, tensor.numel)]  # frozen: every rank has the whole
        for rank, start, stop in self._spans.get((tensor.parameter, tensor.position), []):
            low, high = max(start - tensor.start, 0), min(stop - tensor.start, tensor.numel)
            if low < high:
                found.append(_Piece(rank, low, high))
        for piece in found:
            if piece.start != end:
                break
            end = piece.stop
        if end != tensor.numel:
            spans = [(piece.rank, piece.start, piece.stop) for piece in found]
            raise RuntimeError(f"{item.entry.key} of {tensor.numel} elements is held as (rank, from, to): {spans}")
        return found

    def _own(self, item: Item, start: int, stop: int) -> Tensor:
        """Elements start to stop of the item's tensor, as this rank holds them: flat, not copied."""
        part = self._held[item.tensor.parameter]
        flat = part.part(elementwise(self._engine, part)[item.kind])
        offset = item.tensor.start - part.start
        return flat[offset + start : offset + stop]

    def gather(self, batch: Sequence[Item]) -> Iterator[tuple[Item, Tensor]]:
        """Those items of the batch that this rank writes, whole, on CPU, in order; collective if `split`."""
        if not self._split:
            for item in batch:
                if item.writer == self._rank:
                    yield item, self._own(item, 0, item.tensor.numel).cpu()
            return
        pieces = {item: self._pieces(item) for item in batch}
        received = self._exchange(batch, pieces)
        for item in batch:
            if item.writer == self._rank:
                yield item, _joined(item, pieces[item], received)

    def _exchange(self, batch: Sequence[Item], pieces: dict[Item, list[_Piece]]) -> list[Tensor]:
        """The bytes that each rank sent to this one: its pieces of what this rank writes, in the batch's order."""
        assert self._group is not None
        outgoing: list[list[Tensor]] = [[] for _ in range(self._group.size())]
        incoming = [0] * self._group.size()
        for item in batch:
            width = DTYPES[item.entry.dtype][1]
            for piece in pieces[item]:
                if piece.rank == self._rank:
                    own = self._own(item, piece.start, piece.stop)
                    outgoing[item.writer].append(own.contiguous().view(torch.uint8))
                if item.writer == self._rank:
                    incoming[piece.rank] += (piece.stop - piece.start) * width
        return all_to_all_bytes(outgoing, incoming, self._group, self._engine.device)


def _joined(item: Item, pieces: Sequence[_Piece], received: list[Tensor]) -> Tensor:
    """The item's tensor, flat, from the front of what was received; that is then gone from there."""
    parts = []
    for piece in pieces:
        size = (piece.stop - piece.start) * DTYPES[item.entry.dtype][1]
        parts.append(received[piece.rank][:size])
        received[piece.rank] = received[piece.rank][size:]
    return torch.cat(parts)

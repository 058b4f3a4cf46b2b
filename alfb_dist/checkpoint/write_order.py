"""The tensors of a save in the order in which they are written, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from alfb_dist.checkpoint.gathering import Request
from alfb_dist.checkpoint.safetensors_file import DTYPES, Entry
from alfb_dist.checkpoint.tensors import GlobalTensor

BATCH_BYTES = 32 << 20
"""Bytes that a writer is sent at a time; a single tensor may be larger."""


@dataclass(frozen=True)
class Item:
    """One tensor of a save and the rank that writes it."""

    tensor: GlobalTensor
    kind: str
    entry: Entry
    writer: int

    def request(self) -> Request:
        """Return what its writer has to gather."""
        tensor, width = self.tensor, DTYPES[self.entry.dtype][1]
        stop = tensor.start + tensor.numel
        return Request(self.writer, tensor.parameter, self.kind, tensor.position, tensor.start, stop, width)


def items(tensors: Sequence[GlobalTensor], writers: Sequence[int], kinds: dict[str, dict[str, str]]) -> list[Item]:
    """Return every tensor of a save in the order of writing, the same on every rank: wide types before narrow ones.

    kinds: by parameter, the format's name of the type of each kind of tensor it has.
    """
    found = [
        Item(tensor, kind, Entry(tensor.key(kind), dtype, tensor.shape), writer)
        for tensor, writer in zip(tensors, writers)
        for kind, dtype in kinds[tensor.parameter].items()
    ]
    return sorted(found, key=lambda item: -DTYPES[item.entry.dtype][1])


def batches(found: Sequence[Item], world_size: int) -> Iterator[list[Item]]:
    """Yield the items in batches in which no writer has more than BATCH_BYTES or one tensor, each writer's in order."""
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

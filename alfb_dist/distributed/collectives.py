"""Every collective of the package. Each takes its group; no other file calls torch.distributed's collectives.

A group of None is this process alone, where torch.distributed is not up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Group = ProcessGroup | None


def size(group: Group) -> int:
    """How many ranks the group has."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """This process's rank in the group."""
    return 0 if group is None else group.rank()


def world_group() -> Group:
    """The group of all ranks, or None where torch.distributed is not up."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def all_sum(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the group's ranks, a new tensor; collective."""
    total = x.clone()
    if group is not None and group.size() > 1:
        dist.all_reduce(total, group=group)
    return total


def all_max(x: Tensor, group: Group) -> Tensor:
    """The elementwise maximum of x over the group's ranks, a new tensor; collective."""
    top = x.clone()
    if group is not None and group.size() > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    return top


def all_equal(x: Tensor, group: Group) -> bool:
    """Whether x has the same bits on every rank of the group; collective."""
    bits = x.detach().contiguous().flatten().view(torch.uint8).to(torch.int32)  # a type of every backend
    extremes = all_max(torch.cat([bits, -bits]), group)
    return bool((extremes[: bits.numel()] == -extremes[bits.numel() :]).all())


def broadcast_(x: Tensor, group: Group) -> None:
    """x holds what the group's first rank had; in place, collective."""
    if group is not None and group.size() > 1:
        dist.broadcast(x, src=dist.get_global_rank(group, 0), group=group)


def known_groups() -> set[ProcessGroup]:
    """Every group that this process has made or takes part in."""
    return set(dist.distributed_c10d._world.pg_map) if dist.is_available() and dist.is_initialized() else set()


def set_timeouts(seconds: float, groups: Iterable[ProcessGroup]) -> None:
    """An exchange in these groups waits at most so long. Groups made without a timeout would wait 30 minutes."""
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def timeout_seconds(group: ProcessGroup, device: torch.device) -> float:
    """How long an exchange in this group waits."""
    seconds: float = group._get_backend(device).options._timeout.total_seconds()
    return seconds


def broadcast_object(value: Any, group: Group) -> Any:
    """The first rank's value (any plain object) on every rank; collective."""
    box = [value]
    if group is not None and group.size() > 1:
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]


def gather_objects(value: Any, group: Group) -> list[Any] | None:
    """Each rank's value (any plain object) in rank order on the group's first rank, None on the others; collective."""
    if group is None or group.size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(value, gathered, dst=dist.get_global_rank(group, 0), group=group)
    return gathered


def share_objects(value: Any, group: Group) -> list[Any]:
    """Each rank's value (any plain object) in rank order, on every rank; collective."""
    shared: list[Any] = broadcast_object(gather_objects(value, group), group)
    return shared


def barrier(group: Group) -> None:
    """Every rank of the group has come here; collective."""
    if group is not None and group.size() > 1:
        dist.barrier(group=group)


def exchange_row_counts(send_counts: list[int], rows: int, group: ProcessGroup, device: torch.device) -> list[int]:
    """How many rows each rank of the group will send to this one; collective. See `exchange_notes`."""
    return [count for (count,) in exchange_notes([[n] for n in send_counts], rows, group, device)]


def exchange_notes(notes: list[list[int]], rows: int, group: ProcessGroup, device: torch.device) -> list[list[int]]:
    """What each rank of the group notes for this one, as it notes something for each, in rank order; collective.

    A note is a number of rows and as many other numbers as all ranks agree on. The rows noted must sum to `rows`. A
    rank whose counts do not add up tells the others, and RuntimeError naming it is raised on every rank: a wrong size
    would otherwise be silent (stale rows) or abort the receiver.
    """
    going, problem = notes_to_send(notes, rows, group)
    told = exchange_numbers(going, group, device)
    check_notes(told, group, problem)
    return told


def notes_to_send(notes: list[list[int]], rows: int, group: ProcessGroup) -> tuple[list[list[int]], str]:
    """(the notes, ""), or where their rows do not add up (what tells everyone so in `check_notes`, what is wrong)."""
    counts = [note[0] for note in notes]
    if len(counts) == group.size() and sum(counts) == rows and min(counts) >= 0:
        return notes, ""
    width = len(notes[0]) if notes else 1
    return [[-1] * width] * group.size(), f"; here {counts} for {rows} rows"


def check_notes(told: list[list[int]], group: ProcessGroup, problem: str) -> None:
    """Nothing, or RuntimeError naming the ranks whose row counts did not add up. problem: of this rank's own."""
    wrong = [dist.get_global_rank(group, r) for r, (count, *_) in enumerate(told) if count < 0]
    if wrong:
        raise RuntimeError(f"row counts do not add up to the rows to be sent on rank(s) {wrong}{problem}")


def exchange_numbers(numbers: Sequence[Sequence[int]], group: ProcessGroup, device: torch.device) -> list[list[int]]:
    """Return the numbers that each rank of the group has for this one, in rank order; collective.

    numbers: int64, a row for each rank, of the same length on every rank.
    """
    sent = torch.tensor(numbers, dtype=torch.int64, device=device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    numbers_by_rank: list[list[int]] = received.tolist()
    return numbers_by_rank


def all_gather_numbers(numbers: Sequence[int], group: ProcessGroup, device: torch.device) -> list[list[int]]:
    """Each rank's numbers (int64, equally many), in rank order; collective."""
    gathered = torch.zeros(group.size(), len(numbers), dtype=torch.int64, device=device)
    gathered[group.rank()] = torch.tensor(numbers)
    dist.all_reduce(gathered, group=group)
    numbers_by_rank: list[list[int]] = gathered.tolist()
    return numbers_by_rank


def start_all_to_all_bytes(
    sent: Tensor, send_sizes: list[int], receive_sizes: list[int], group: ProcessGroup
) -> Callable[[], list[Tensor]]:
    """Bytes are on their way to the other ranks of the group; call what is returned for those that come, in rank order.

    Collective. Sizes must be agreed on; what is sent must stay as it is until then.
    """
    received = sent.new_empty(sum(receive_sizes))
    work = dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=group, async_op=True)

    def finish() -> list[Tensor]:
        work.wait()
        return list(received.split(receive_sizes))

    return finish


def _all_to_all(rows: Tensor, send_counts: list[int], receive_counts: list[int], group: ProcessGroup) -> Tensor:
    if rows.shape[0] != sum(send_counts):
        raise RuntimeError(f"{rows.shape[0]} rows to send, but the row counts say {send_counts}")
    received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), receive_counts, send_counts, group=group)
    return received


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send_counts: list[int], receive_counts: list[int], group: Any) -> Tensor:
        ctx.route = receive_counts, send_counts, group
        return _all_to_all(rows, send_counts, receive_counts, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _all_to_all(grads[0], *ctx.route), None, None, None


def all_to_all_rows(rows: Tensor, send_counts: list[int], receive_counts: list[int], group: ProcessGroup) -> Tensor:
    """The rows that the group's ranks sent to this one, in rank order; collective, differentiable.

    rows: (sum(send_counts), ...), sorted by destination. receive_counts: from `exchange_row_counts`. Zero rows are
    fine. The backward is the reverse exchange. Raises RuntimeError if the rows do not match the counts.
    """
    return _AllToAllRows.apply(rows, send_counts, receive_counts, group)

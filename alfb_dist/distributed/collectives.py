"""Every collective of the package, each with its group. No other file calls torch.distributed's collectives.

A group of None is this process alone, without torch.distributed.
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
    """Return the number of ranks in the group."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """Return this process's rank in the group."""
    return 0 if group is None else group.rank()


def world_group() -> Group:
    """Return the group of all ranks, None without torch.distributed."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def start_distributed(backend: str, timeout_seconds: float) -> None:
    """Start torch.distributed, as the environment sets it up; collective over all ranks.

    Raises torch.distributed.DistError if they do not meet within the timeout.
    """
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))


def end_distributed() -> None:
    """Wait for all ranks and end torch.distributed; collective."""
    dist.barrier()
    dist.destroy_process_group()


def new_groups(ranks_by_group: Iterable[list[int]], timeout_seconds: float) -> list[ProcessGroup]:
    """Return a new group for each list of ranks; collective over all ranks, which all pass the same lists.

    timeout_seconds: of every exchange in them.
    """
    return [dist.new_group(ranks, timeout=timedelta(seconds=timeout_seconds)) for ranks in ranks_by_group]


def all_sum(x: Tensor, group: Group) -> Tensor:
    """Return the sum of x over the group's ranks, a new tensor; collective."""
    total = x.clone()
    if group is not None and group.size() > 1:
        dist.all_reduce(total, group=group)
    return total


def all_max(x: Tensor, group: Group) -> Tensor:
    """Return the elementwise maximum of x over the group's ranks, a new tensor; collective."""
    maximum = x.clone()
    if group is not None and group.size() > 1:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    return maximum


def all_equal(x: Tensor, group: Group) -> bool:
    """Return whether x has the same bits on every rank of the group; collective."""
    bits = x.detach().contiguous().flatten().view(torch.uint8).to(torch.int32)  # a type that every backend supports
    extremes = all_max(torch.cat([bits, -bits]), group)
    return bool((extremes[: bits.numel()] == -extremes[bits.numel() :]).all())


def broadcast_(x: Tensor, group: Group) -> None:
    """Copy the x of the group's first rank into x; in place, collective."""
    if group is not None and group.size() > 1:
        dist.broadcast(x, src=dist.get_global_rank(group, 0), group=group)


def known_groups() -> set[ProcessGroup]:
    """Return every group that this process belongs to."""
    return set(dist.distributed_c10d._world.pg_map) if dist.is_available() and dist.is_initialized() else set()


def set_timeouts(seconds: float, groups: Iterable[ProcessGroup]) -> None:
    """Set the timeout of exchanges in these groups; without it torch waits 30 minutes."""
    for group in groups:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def timeout_seconds(group: ProcessGroup, device: torch.device) -> float:
    """Return the timeout of exchanges in this group."""
    seconds: float = group._get_backend(device).options._timeout.total_seconds()
    return seconds


def broadcast_object(value: Any, group: Group) -> Any:
    """Return the first rank's value, a plain object, on every rank; collective."""
    box = [value]
    if group is not None and group.size() > 1:
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]


def gather_objects(value: Any, group: Group) -> list[Any] | None:
    """Return each rank's value, a plain object, in rank order on the first rank, and None on the others; collective."""
    if group is None or group.size() == 1:
        return [value]
    gathered: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(value, gathered, dst=dist.get_global_rank(group, 0), group=group)
    return gathered


def share_objects(value: Any, group: Group) -> list[Any]:
    """Return each rank's value, a plain object, in rank order on every rank; collective."""
    shared: list[Any] = broadcast_object(gather_objects(value, group), group)
    return shared


def barrier(group: Group) -> None:
    """Wait for every rank of the group; collective."""
    if group is not None and group.size() > 1:
        dist.barrier(group=group)


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
    """Return each rank's numbers (int64, as many on every rank) in rank order; collective."""
    gathered = torch.zeros(group.size(), len(numbers), dtype=torch.int64, device=device)
    gathered[group.rank()] = torch.tensor(numbers)
    dist.all_reduce(gathered, group=group)
    numbers_by_rank: list[list[int]] = gathered.tolist()
    return numbers_by_rank


def start_all_to_all_bytes(
    sent: Tensor, send_sizes: list[int], receive_sizes: list[int], group: ProcessGroup
) -> Callable[[], list[Tensor]]:
    """Send bytes to each rank of the group; collective. The returned function waits for the bytes from each.

    The sizes must be agreed on; `sent` must not change until then.
    """
    received = sent.new_empty(sum(receive_sizes))
    work = dist.all_to_all_single(received, sent, receive_sizes, send_sizes, group=group, async_op=True)

    def finish() -> list[Tensor]:
        work.wait()
        return list(received.split(receive_sizes))

    return finish


def all_to_all_bytes(
    parts: Sequence[Sequence[Tensor]], receive_sizes: list[int], group: ProcessGroup, device: torch.device
) -> list[Tensor]:
    """Return the bytes from each rank of the group, on CPU; collective.

    parts: by rank the tensors of bytes to be sent to it, one after the other. device: of the group's backend.
    Raises RuntimeError if a rank sends other than receive_sizes.
    """
    sizes = [sum(part.numel() for part in to_rank) for to_rank in parts]
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    sent = torch.cat([nothing, *(part.to(device) for to_rank in parts for part in to_rank)])
    announced = [size for (size,) in exchange_numbers([[size] for size in sizes], group, device)]
    if announced != receive_sizes:
        raise RuntimeError(f"the ranks send {announced} bytes, but {receive_sizes} are expected")
    return [part.cpu() for part in start_all_to_all_bytes(sent, sizes, receive_sizes, group)()]

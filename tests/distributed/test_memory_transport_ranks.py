"""Which ranks read each other's memory, and what they do with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from alfb_dist import cpu
from alfb_dist.distributed.all_to_all import Exchange
from alfb_dist.distributed.memory_transport import MemoryTransport

pytestmark = pytest.mark.skipif(not cpu.has_shared_memory(), reason="no memory that processes share")


def by_memory(without_memory: list[int]) -> list[bool]:
    """For each rank, whether this one reads its memory."""
    if dist.get_rank() in without_memory:
        os.environ["ALFB_SHARED_MEMORY"] = "0"
    exchange = Exchange(dist.group.WORLD)
    exchange.all_to_all([(torch.ones(4, 1), None)], [1] * 4)
    dist.barrier()  # the memory of a rank goes with its exchange
    transport = exchange._transport
    return [peer is not None for peer in transport.peers] if isinstance(transport, MemoryTransport) else [False] * 4


@pytest.mark.parametrize("without_memory", [[], [1], [0, 1, 2, 3]])
def test_two_ranks_that_share_memory_use_it(tmp_path: Path, without_memory: list[int]) -> None:
    for rank, found in enumerate(run_ranks(4, by_memory, without_memory, folder=tmp_path)):
        assert found == [rank != r and not {rank, r} & set(without_memory) for r in range(4)]


def disagree() -> str:
    exchange, rank = Exchange(dist.group.WORLD), dist.get_rank()
    rows = torch.ones(3, 2)
    exchange.all_to_all([(rows, None)], [1, 2])
    counts, expected = ([1, 2], [1, 1]) if rank == 0 else ([2, 1], [2, 1])  # rank 0 expects 1 row and is sent 2
    try:
        exchange.all_to_all([(rows, None)], counts, expected)
        message = ""
    except RuntimeError as error:
        message = str(error)
    dist.barrier()
    return message


def test_rows_other_than_agreed_are_an_error_and_not_stale_rows(tmp_path: Path) -> None:
    first, second = run_ranks(2, disagree, folder=tmp_path)
    assert "send [1, 2] rows, not [1, 1]" in first and second == ""


def mapped_files() -> int:
    """Return how many of our memory files this process has in its memory."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[4] for line in maps if "memfd:alfb_dist" in line})


def grow() -> tuple[int, int]:
    """Return the fewest and the most files in memory over thirty exchanges that grow."""
    exchange, counted = Exchange(dist.group.WORLD), []
    for turn in range(30):
        rows = torch.zeros(2 * 2 ** min(turn, 18), 8)
        exchange.all_to_all([(rows, None)], [len(rows) // 2] * 2)
        counted.append(mapped_files())
    return min(counted[2:]), max(counted)


def test_number_of_memory_files_does_not_grow_with_messages(tmp_path: Path) -> None:
    """Of each rank two for messages, and one for headers where they go by memory."""
    files = 4 if cpu.board(2) is None else 6
    assert run_ranks(2, grow, folder=tmp_path) == [(files, files)] * 2

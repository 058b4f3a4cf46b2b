"""Messages by memory, by the network and by both: growing ones, slow readers, counts that do not agree."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

import alfb_dist
from alfb_dist.distributed.all_to_all import Exchange


def value(source: int, destination: int, turn: int) -> float:
    return float(source * 1000 + destination * 100 + turn)


def exchange_many(without_memory: list[int]) -> list[bool]:
    """Twelve swaps of messages from nothing to 3 MB, with readers that take their time: which ranks went by memory."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank in without_memory:
        os.environ["ALFB_SHARED_MEMORY"] = "0"
    exchange, sleeper = Exchange(dist.group.WORLD), random.Random(rank)
    for turn in range(12):
        rows_of = [[(3 * s + 5 * d + turn) % 7 * 4 ** (turn % 6) for d in range(world)] for s in range(world)]
        counts = rows_of[rank]
        values = torch.cat([torch.full((n, 37), value(rank, d, turn)) for d, n in enumerate(counts)])
        flags = torch.cat([torch.full((n,), d == turn % world) for d, n in enumerate(counts)])
        known = [rows_of[s][rank] for s in range(world)] if turn % 2 else None
        arrived, told = exchange.swap([(values, None), (flags, None)], counts, known)
        assert told == [rows_of[s][rank] for s in range(world)]
        time.sleep(sleeper.random() * 0.01)  # others may be at the next swap by now
        for source in set(range(world)) - {rank}:
            got, flag = arrived[source]
            assert got.shape == (told[source], 37) and (got == value(source, rank, turn)).all()
            assert flag.dtype == torch.bool and (flag == (rank == turn % world)).all()
        assert all(t.numel() == 0 for t in arrived[rank])
    return [peer is not None for peer in exchange._met.peers]


@pytest.mark.parametrize("without_memory", [[], [1], [0, 1, 2, 3]])
def test_rows_arrive_whole_whatever_the_sizes_and_the_way(tmp_path: Path, without_memory: list[int]) -> None:
    by_memory = run_ranks(4, exchange_many, without_memory, folder=tmp_path)
    without = set(without_memory if alfb_dist.cpu.has_shared_memory() else range(4))
    for rank, found in enumerate(by_memory):
        assert found == [rank != r and not {rank, r} & without for r in range(4)]


def disagree() -> str:
    exchange, rank = Exchange(dist.group.WORLD), dist.get_rank()
    rows = torch.ones(3, 2)
    exchange.swap([(rows, None)], [1, 2])
    counts, expected = ([1, 2], [1, 1]) if rank == 0 else ([2, 1], [2, 1])  # rank 0 expects 1 row and is sent 2
    try:
        exchange.swap([(rows, None)], counts, expected)
        message = ""
    except RuntimeError as error:
        message = str(error)
    dist.barrier()  # the memory of a rank goes with its exchange
    return message


def test_rows_other_than_agreed_are_an_error_and_not_stale_rows(tmp_path: Path) -> None:
    if not alfb_dist.cpu.has_shared_memory():
        pytest.skip("over the network alone, counts are not checked again once they are agreed on")
    told, nothing = run_ranks(2, disagree, folder=tmp_path)
    assert "send [1, 2] rows, not [1, 1]" in told and nothing == ""


def mapped_files() -> int:
    """How many of our memory files this process has in its memory."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[4] for line in maps if "memfd:alfb_dist" in line})


def grow() -> tuple[int, int]:
    """The fewest and the most files in memory over thirty exchanges that grow."""
    exchange, counted = Exchange(dist.group.WORLD), []
    for turn in range(30):
        rows = torch.zeros(2 * 2 ** min(turn, 18), 8)
        exchange.swap([(rows, None)], [len(rows) // 2] * 2)
        counted.append(mapped_files())
    return min(counted[2:]), max(counted)


def test_memory_files_stay_as_many_however_messages_grow(tmp_path: Path) -> None:
    """Of each rank two for messages, and one for notes where they go by memory."""
    files = 0 if not alfb_dist.cpu.has_shared_memory() else 4 if alfb_dist.cpu.board(2) is None else 6
    assert run_ranks(2, grow, folder=tmp_path) == [(files, files)] * 2

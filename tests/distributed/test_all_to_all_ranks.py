"""All-to-all by memory, by the network and by both: order and types of rows, sizes, slow readers, wrong row counts."""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from alfb_dist.distributed.all_to_all import Exchange

Ranks = Callable[..., dict[str, Any]]

# send[s][d]: rows from rank s to rank d. Uneven, with zero rows, with a rank that has none, all to one, none at all.
SENDS = {
    1: [[[3]], [[0]]],
    2: [[[1, 2], [3, 0]], [[0, 0], [2, 5]], [[0, 4], [0, 1]], [[0, 0], [0, 0]]],
    4: [
        [[1, 2, 0, 3], [0, 0, 0, 0], [4, 0, 1, 1], [0, 7, 0, 0]],
        [[0, 0, 3, 0], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 5, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]],
    ],
}
DTYPES = (torch.float64, torch.bfloat16, torch.int32)
WAYS = {
    "memory": ("ALFB_SHARED_MEMORY", []),
    "network": ("ALFB_SHARED_MEMORY", [0, 1, 2, 3]),
    "both": ("ALFB_SHARED_MEMORY", [1]),
    "headers by network": ("ALFB_NATIVE", [1]),  # where one has no compiler
}
"""The switch that is off, and the ranks on which it is."""
CASES = [(1, "network"), *((world, way) for world in (2, 4) for way in WAYS)]


def code(source: int, destination: int, row: int, column: int) -> float:
    """A value that shows where it came from; exact in bfloat16 for small numbers."""
    return float(64 * source + 16 * destination + 2 * row + column)


def rows_between(send: list[list[int]], source: int, destination: int) -> list[list[float]]:
    return [[code(source, destination, i, c) for c in range(2)] for i in range(send[source][destination])]


def take(way: str) -> None:
    switch, ranks = WAYS[way]
    if dist.get_rank() in ranks:
        os.environ[switch] = "0"


def exchange_types(exchange: Exchange) -> list[list[list[Any]]]:
    """By case and source, the rows of each type that arrived; the types travel together, the last with an index."""
    rank, results = exchange.rank, []
    for send in SENDS[exchange.num_ranks]:
        sent = [row for d in range(exchange.num_ranks) for row in rows_between(send, rank, d)]
        rows = [torch.tensor(sent, dtype=dtype).reshape(-1, 2) for dtype in DTYPES]
        index = torch.arange(len(sent)).flip(0)
        pairs = [(rows[0], None), (rows[1], None), (rows[2].flip(0), index)]
        arrived, counts = exchange.all_to_all(pairs, send[rank])
        assert counts == [send[s][rank] for s in range(exchange.num_ranks)]
        assert all(tuple(x.dtype for x in tensors) == DTYPES for tensors in arrived)
        results.append([[x.tolist() for x in tensors] for tensors in arrived])
    return results


GOOD = {1: [4], 2: [4, 0], 4: [1, 1, 0, 2]}


def wrong_counts(world: int) -> list[list[list[int]]]:
    """By case, the row counts of each rank for its 4 rows: of the last rank they are wrong; in the last, of several."""
    good = GOOD[world]
    wrong = [
        [*good[:-1], good[-1] - 1],
        [*good[:-1], good[-1] + 1],
        good[:-1],
        [*good, 0],
        [5] + [0] * (world - 2) + [-1],
    ]
    several = [good if r % 2 == 0 and world > 1 else [9] * world for r in range(world)]
    return [*([good] * (world - 1) + [bad] for bad in wrong), several]


def exchange_wrong_counts(exchange: Exchange) -> list[str]:
    """The error of each case. A right exchange follows each wrong one."""
    world, texts = exchange.num_ranks, []
    for counts in wrong_counts(world):
        try:
            exchange.all_to_all([(torch.ones(4, 3), None)], counts[exchange.rank])
            texts.append("")
        except RuntimeError as error:
            texts.append(str(error))
        arrived, _ = exchange.all_to_all([(torch.full((4, 3), exchange.rank), None)], GOOD[world])
        for source in set(range(world)) - {exchange.rank}:
            assert arrived[source][0].tolist() == [[source] * 3] * GOOD[world][exchange.rank]
    return texts


def exchange_all(way: str) -> dict[str, Any]:
    take(way)
    exchange = Exchange(dist.group.WORLD)
    return {"rows": exchange_types(exchange), "errors": exchange_wrong_counts(exchange)}


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """exchanged(world, way): by rank, what `exchange_all` returned; run once for each."""
    return functools.cache(
        lambda world, way: run_ranks(world, exchange_all, way, folder=tmp_path_factory.mktemp("ranks"))
    )


@pytest.mark.parametrize(("world", "way"), CASES)
def test_each_row_of_each_type_comes_to_its_rank_in_order(exchanged: Ranks, world: int, way: str) -> None:
    for rank, found in enumerate(exchanged(world, way)):
        for send, arrived in zip(SENDS[world], found["rows"], strict=True):
            for source, by_type in enumerate(arrived):
                expected = [] if source == rank else rows_between(send, source, rank)
                assert by_type == [expected] * len(DTYPES)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("world", "way"), CASES)
def test_wrong_counts_raise_on_every_rank_naming_those_that_have_them(exchanged: Ranks, world: int, way: str) -> None:
    cases = wrong_counts(world)
    for rank, found in enumerate(exchanged(world, way)):
        for counts, text in zip(cases, found["errors"], strict=True):
            wrong = [r for r, given in enumerate(counts) if given != GOOD[world]]
            assert f"row counts do not add up to the rows to be sent on rank(s) {wrong}" in text
            assert (f"here {counts[rank]} for 4 rows" in text) == (rank in wrong)


def wrong_counts_in_subgroup() -> str:
    """Groups [0, 1] and [2, 3]; only rank 3 is wrong."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    exchange, text = Exchange(groups[rank // 2]), ""
    try:
        exchange.all_to_all([(torch.ones(2, 1), None)], [1, 1 + (rank == 3)])
    except RuntimeError as error:
        text = str(error)
    dist.barrier()  # the memory of a rank goes with its exchange
    return text


@pytest.mark.timeout(60)
def test_wrong_rank_of_a_subgroup_is_named_by_its_global_rank(tmp_path: Path) -> None:
    texts = run_ranks(4, wrong_counts_in_subgroup, folder=tmp_path)
    assert texts[:2] == ["", ""]
    assert all("rank(s) [3]" in text for text in texts[2:])


def wrong_counts_where_they_are_known() -> str:
    """All ranks pass one row less than their counts say, and no headers go, so that none enters the exchange."""
    take("network")
    try:
        Exchange(dist.group.WORLD).all_to_all([(torch.zeros(1, 2), None)], [1, 1], [1, 1])
    except RuntimeError as error:
        return str(error)
    return ""


def test_rows_that_do_not_match_their_counts_are_not_sent(tmp_path: Path) -> None:
    for text in run_ranks(2, wrong_counts_where_they_are_known, folder=tmp_path):
        assert "[1, 1] for 1 rows" in text


def value(source: int, destination: int, turn: int) -> float:
    return float(source * 1000 + destination * 100 + turn)


def exchange_many(way: str) -> None:
    """Exchange twelve times, from nothing to 3 MB, with readers that take their time."""
    take(way)
    rank, world = dist.get_rank(), dist.get_world_size()
    exchange, sleeper = Exchange(dist.group.WORLD), random.Random(rank)
    for turn in range(12):
        rows_of = [[(3 * s + 5 * d + turn) % 7 * 4 ** (turn % 6) for d in range(world)] for s in range(world)]
        counts = rows_of[rank]
        values = torch.cat([torch.full((n, 37), value(rank, d, turn)) for d, n in enumerate(counts)])
        flags = torch.cat([torch.full((n,), d == turn % world) for d, n in enumerate(counts)])
        known = [rows_of[s][rank] for s in range(world)] if turn % 2 else None
        arrived, received = exchange.all_to_all([(values, None), (flags, None)], counts, known)
        assert received == [rows_of[s][rank] for s in range(world)]
        time.sleep(sleeper.random() * 0.01)  # others may be at the next exchange by now
        for source in set(range(world)) - {rank}:
            got, flag = arrived[source]
            assert got.shape == (received[source], 37) and (got == value(source, rank, turn)).all()
            assert flag.dtype == torch.bool and (flag == (rank == turn % world)).all()
        assert all(t.numel() == 0 for t in arrived[rank])


@pytest.mark.parametrize("way", WAYS)
def test_rows_arrive_whole_whatever_the_sizes_and_the_way(tmp_path: Path, way: str) -> None:
    run_ranks(4, exchange_many, way, folder=tmp_path)

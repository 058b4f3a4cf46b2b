"""Collectives against plain Python, on 1, 2 and 4 ranks: rows, gradients, wrong counts, equality to the bit."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from torch import Tensor

from alfb_dist.distributed.collectives import (
    all_equal,
    all_max,
    all_sum,
    all_to_all_rows,
    barrier,
    broadcast_,
    broadcast_object,
    exchange_row_counts,
    size,
    world_group,
)

Ranks = Callable[..., list[Any]]

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


def code(source: int, destination: int, row: int, column: int) -> float:
    """A value that tells where it came from; exact in bfloat16 for small numbers."""
    return float(64 * source + 16 * destination + 2 * row + column)


def sent_rows(send: list[list[int]], rank: int) -> list[list[float]]:
    return [[code(rank, d, i, c) for c in range(2)] for d, n in enumerate(send[rank]) for i in range(n)]


def received_rows(send: list[list[int]], rank: int) -> list[list[float]]:
    return [[code(s, rank, i, c) for c in range(2)] for s in range(len(send)) for i in range(send[s][rank])]


def exchange(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """For each case: (received, gradient of the rows sent), where rank r weights what it received by its codes + r."""
    group, rank, results = dist.group.WORLD, dist.get_rank(), []
    for send in SENDS[size(group)]:
        rows = torch.tensor(sent_rows(send, rank), dtype=dtype).reshape(-1, 2).requires_grad_(dtype.is_floating_point)
        counts = exchange_row_counts(send[rank], len(rows), group, rows.device)
        assert counts == [send[s][rank] for s in range(size(group))]
        received = all_to_all_rows(rows, send[rank], counts, group)
        assert received.dtype == dtype
        if dtype.is_floating_point:
            (received * (received.detach() + rank)).sum().backward()
        results.append((received.detach().tolist(), None if rows.grad is None else rows.grad.tolist()))
    return results


DTYPES = (torch.float64, torch.bfloat16, torch.int32)


def exchange_all() -> dict[torch.dtype, list[tuple[Any, ...]]]:
    return {dtype: exchange(dtype) for dtype in DTYPES}


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """exchanged(world): by rank, what `exchange_all` returned; run once per world size."""
    return functools.cache(lambda world: run_ranks(world, exchange_all, folder=tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_to_all_brings_each_row_to_its_rank_in_rank_order(exchanged: Ranks, world: int, dtype: torch.dtype) -> None:
    for rank, results in enumerate(exchanged(world)):
        for send, (received, _) in zip(SENDS[world], results[dtype]):
            assert received == received_rows(send, rank)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_of_all_to_all_is_the_reverse_exchange(exchanged: Ranks, world: int, dtype: torch.dtype) -> None:
    for rank, results in enumerate(exchanged(world)):
        for send, (_, gradient) in zip(SENDS[world], results[dtype]):
            expected = [[code(rank, d, i, c) + d for c in range(2)] for d, n in enumerate(send[rank]) for i in range(n)]
            assert gradient == torch.tensor(expected, dtype=dtype).reshape(-1, 2).tolist()


def gradient_of_layouts() -> list[list[list[float]]]:
    """The gradient that arrives at an exchange may be an expanded scalar or a transposed matrix, not contiguous."""
    counts = [1, 3] if dist.get_rank() == 0 else [3, 1]
    gradients = []
    for weight in (None, torch.arange(12.0).reshape(3, 4).T):
        rows = torch.ones(4, 3, requires_grad=True)
        received = all_to_all_rows(rows, counts, counts, dist.group.WORLD)
        (received.sum() if weight is None else (received * weight).sum()).backward()
        gradients.append(rows.grad.tolist())
    return gradients


def test_gradient_of_all_to_all_takes_any_layout(ranks: Ranks) -> None:
    weight = torch.arange(12.0).reshape(3, 4).T.tolist()
    (first0, first1), (second0, second1) = ranks(2, gradient_of_layouts)
    assert first0 == second0 == [[1.0] * 3] * 4
    # Rank 0 keeps its row 0 and gets rows 1 to 3 of what rank 1 received from it; rank 1 the other way round.
    assert first1 == [weight[0], *weight[0:3]]
    assert second1 == [*weight[1:4], weight[3]]


def try_counts(cases: list[tuple[list[list[int]], int]]) -> list[str]:
    """The error text of exchange_row_counts for each case of (counts by rank, rows on this rank), then a plain sum."""
    texts = []
    for counts, rows in cases:
        try:
            exchange_row_counts(counts[dist.get_rank()], rows, dist.group.WORLD, torch.device("cpu"))
            texts.append("")
        except RuntimeError as e:
            texts.append(str(e))
        assert all_sum(torch.ones(1), dist.group.WORLD).item() == size(dist.group.WORLD)
    return texts


@pytest.mark.timeout(60)
@pytest.mark.parametrize("world", [1, 2])
def test_wrong_counts_on_one_rank_raise_on_every_rank_naming_it(ranks: Ranks, world: int) -> None:
    good = [4] + [0] * (world - 1)
    wrong = {
        "short": [3] + [0] * (world - 1),
        "long": [5] + [0] * (world - 1),
        "negative": [5, -1] + [0] * (world - 2) if world > 1 else [-4],
        "too few ranks": good[:-1],
        "too many ranks": [*good, 0],
    }
    last = world - 1
    cases = [([good] * last + [bad], 4) for bad in wrong.values()]
    for rank, texts in enumerate(ranks(world, try_counts, [([good] * world, 4), *cases])):
        assert texts[0] == ""
        for text, bad in zip(texts[1:], wrong.values()):
            assert f"row counts do not add up to the rows to be sent on rank(s) [{last}]" in text
            assert (f"here {bad} for 4 rows" in text) == (rank == last)


@pytest.mark.timeout(60)
def test_wrong_counts_on_several_ranks_name_them_all(ranks: Ranks) -> None:
    counts = [[4, 0, 0, 0], [1, 1, 1, 0], [0, 0, 4, 0], [9, 0, 0, 0]]
    for (text,) in ranks(4, try_counts, [(counts, 4)]):
        assert "rank(s) [1, 3]" in text


def wrong_counts_in_subgroup() -> str:
    """Groups [0, 1] and [2, 3]; only rank 3 is wrong."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    try:
        exchange_row_counts([1, 1 + (rank == 3)], 2, groups[rank // 2], torch.device("cpu"))
    except RuntimeError as e:
        return str(e)
    return ""


@pytest.mark.timeout(60)
def test_wrong_rank_of_a_subgroup_is_named_by_its_global_rank(ranks: Ranks) -> None:
    texts = ranks(4, wrong_counts_in_subgroup)
    assert texts[:2] == ["", ""]
    assert all("rank(s) [3]" in text for text in texts[2:])


def rows_against_counts() -> str:
    """All ranks pass one row less than their counts say, so that none enters the exchange."""
    try:
        all_to_all_rows(torch.zeros(1, 2), [1, 1], [1, 1], dist.group.WORLD)
    except RuntimeError as e:
        return str(e)
    return ""


def test_rows_that_do_not_match_their_counts_are_not_sent(ranks: Ranks) -> None:
    for text in ranks(2, rows_against_counts):
        assert re.search(r"1 rows to send.*\[1, 1\]", text)


def equal_cases(cases: dict[str, list[Tensor]]) -> dict[str, bool]:
    return {name: all_equal(by_rank[dist.get_rank()], dist.group.WORLD) for name, by_rank in cases.items()}


def test_all_equal_compares_bits(ranks: Ranks) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    one_bit = x.view(torch.int32) ^ torch.nn.functional.one_hot(torch.tensor(7), 15).reshape(5, 3).int()
    nan = torch.tensor([math.nan])
    other_nan = (nan.view(torch.int32) + 1).view(torch.float32)
    big = torch.tensor([2**60, -1])
    cases = {
        "same": ([x, x.clone()], True),
        "one bit": ([x, one_bit.view(torch.float32)], False),
        "the other way": ([one_bit.view(torch.float32), x], False),
        "zeros": ([torch.tensor([0.0]), torch.tensor([-0.0])], False),
        "negative zeros": ([torch.tensor([-0.0]), torch.tensor([-0.0])], True),
        "same nan": ([nan, nan.clone()], True),
        "other nan": ([nan, other_nan], False),
        "int64": ([big, big.clone()], True),
        "int64 by one": ([big, big + torch.tensor([1, 0])], False),
        "bool": ([torch.tensor([True, False]), torch.tensor([True, True])], False),
        "bfloat16": ([x.bfloat16(), x.bfloat16()], True),
        "sum and product agree": ([torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])], False),
        "scalar": ([torch.tensor(3.5), torch.tensor(3.5)], True),
        "empty": ([torch.empty(0, 4), torch.empty(0, 4)], True),
        "layout": ([x.T, x.T.contiguous()], True),
        "requires grad": ([x.clone().requires_grad_(), x], True),
    }
    expected = {name: answer for name, (_, answer) in cases.items()}
    assert ranks(2, equal_cases, {name: by_rank for name, (by_rank, _) in cases.items()}) == [expected, expected]


def reductions() -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.group.WORLD
    low, high = dist.new_group([0, 1]), dist.new_group([2, 3])
    group = low if rank < 2 else high
    x = torch.tensor([2**60 + rank, -rank])
    total, top = all_sum(x, world), all_max(x, world)
    bias = torch.tensor([float(rank)])
    broadcast_(bias, group)
    barrier(group)
    return {
        "input": x.tolist(),
        "sum": total.tolist(),
        "max": top.tolist(),
        "group sum": all_sum(x[1:], group).tolist(),
        "bias": bias.item(),
        "object": broadcast_object({"rank": rank}, group),
        "sizes": (size(world), size(group), size(None)),
        "one rank differs": [all_equal(torch.tensor([1.0, 2.0 + (rank == r)]), world) for r in range(4)],
        "equal in the group": all_equal(torch.tensor([rank // 2]), group),
    }


def test_reductions_are_exact_take_their_group_and_leave_the_input(ranks: Ranks) -> None:
    for rank, result in enumerate(ranks(4, reductions)):
        assert result == {
            "input": [2**60 + rank, -rank],
            "sum": [4 * 2**60 + 6, -6],
            "max": [2**60 + 3, 0],
            "group sum": [-1] if rank < 2 else [-5],
            "bias": 0.0 if rank < 2 else 2.0,
            "object": {"rank": 0 if rank < 2 else 2},
            "sizes": (4, 2, 1),
            "one rank differs": [False] * 4,
            "equal in the group": True,
        }


def test_without_torch_distributed_every_collective_is_this_process_alone() -> None:
    x = torch.tensor([1.0, -2.0])
    assert world_group() is None and size(None) == 1
    assert torch.equal(all_sum(x, None), x) and all_sum(x, None) is not x
    assert torch.equal(all_max(x, None), x)
    assert all_equal(x, None) and all_equal(torch.tensor([math.nan]), None)
    broadcast_(x, None)
    barrier(None)
    assert x.tolist() == [1.0, -2.0]
    assert broadcast_object("as it is", None) == "as it is"

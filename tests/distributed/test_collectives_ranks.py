"""Collectives against plain Python, on 2 and 4 ranks: bytes, sums, equality to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from alfb_dist.distributed.collectives import (
    all_equal,
    all_max,
    all_sum,
    all_to_all_bytes,
    barrier,
    broadcast_,
    broadcast_object,
    size,
    world_group,
)

Ranks = Callable[..., list[Any]]

# send[s][d]: bytes from rank s to rank d, in parts.
SENDS: list[list[list[list[int]]]] = [
    [[[1], [2, 3]], [[], [4]]],
    [[[], []], [[5, 0, 1], []]],
    [[[], []], [[], []]],
]


def exchange_bytes() -> list[list[list[int]]]:
    """By case and source, the bytes that arrived."""
    rank, device, results = dist.get_rank(), torch.device("cpu"), []
    for send in SENDS:
        parts = [[torch.full((n,), 10 * rank + d, dtype=torch.uint8) for n in send[rank][d]] for d in range(2)]
        sizes = [sum(send[s][rank]) for s in range(2)]
        results.append([x.tolist() for x in all_to_all_bytes(parts, sizes, dist.group.WORLD, device)])
    with pytest.raises(RuntimeError, match=r"send \[\d, \d\] bytes, but \[9, 9\] are expected"):
        all_to_all_bytes([[], [torch.ones(2, dtype=torch.uint8)]], [9, 9], dist.group.WORLD, device)
    return results


def test_bytes_come_from_each_rank_in_rank_order(ranks: Ranks) -> None:
    for rank, results in enumerate(ranks(2, exchange_bytes)):
        for send, received in zip(SENDS, results, strict=True):
            assert received == [[10 * s + rank] * sum(send[s][rank]) for s in range(2)]


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

"""The rows to send and the sum of the rows that come back, against loops over tokens and slots."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.row_choices import choose, parts_of
from torch import Tensor

from alfb_dist.moe.permute import Plan, destinations, plan_rows, plan_rows_torch, sum_rows, sum_rows_torch

PLANS = pytest.mark.parametrize("plan", [plan_rows, plan_rows_torch])
SUMS = pytest.mark.parametrize("add", [sum_rows, sum_rows_torch])


def loop(ids_TK: Tensor, weights_TK: Tensor, num_local: int, num_ranks: int) -> Plan:
    """Rank by rank, token by token, slot by slot."""
    tokens, ids, weights, empty, rows, slots = [], [], [], [], [], []
    for rank in range(num_ranks):
        rows.append(0)
        slots.append(0)
        for token, (row_ids, row_weights) in enumerate(zip(ids_TK.tolist(), weights_TK.tolist())):
            local = [i - rank * num_local if i // num_local == rank else num_local for i in row_ids]
            filled = [i < num_local for i in local]
            if any(filled):
                tokens.append(token)
                ids.append(local)
                weights.append([w if here else 0.0 for w, here in zip(row_weights, filled)])
                empty.append([not here for here in filled])
                rows[-1] += 1
                slots[-1] += sum(filled)
    shape = (-1, ids_TK.shape[1])
    return Plan(
        torch.tensor(tokens, dtype=torch.int64),
        torch.tensor(ids, dtype=torch.int32).view(shape),
        torch.tensor(weights, dtype=weights_TK.dtype).view(shape),
        torch.tensor(empty, dtype=torch.bool).view(shape),
        rows,
        slots,
    )


@PLANS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_local", "num_ranks"), [(0, 2, 4, 2), (1, 1, 1, 1), (50, 4, 3, 5), (90, 8, 16, 4)]
)
def test_rows_equal_the_loop(
    num_tokens: int, top_k: int, num_local: int, num_ranks: int, dtype: torch.dtype, plan: Callable[..., Plan]
) -> None:
    ids_TK, weights_TK = choose(num_tokens, top_k, num_local * num_ranks, seed=0)
    weights_TK = weights_TK.to(dtype)
    for found, expected in zip(
        plan(ids_TK, weights_TK, num_local, num_ranks), loop(ids_TK, weights_TK, num_local, num_ranks)
    ):
        if isinstance(found, Tensor):
            assert isinstance(expected, Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)
        else:
            assert found == expected


def test_destinations_are_the_ranks_of_the_filled_slots() -> None:
    goes_PT = destinations(torch.tensor([[0, 5], [6, 6], [2, 1]]), 2, 3)  # 6 marks an empty slot
    assert goes_PT.tolist() == [[True, False, True], [False, False, True], [True, False, False]]


@PLANS
@pytest.mark.parametrize("wrong", [-1, 7])
def test_ids_out_of_range_raise(wrong: int, plan: Callable[..., Plan]) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        plan(torch.tensor([[0, wrong], [6, 5]]), torch.ones(2, 2), 1, 6)


@SUMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 37])
@pytest.mark.parametrize("shares", list(itertools.product([0.0, 0.5, 1.0], repeat=3)))
def test_sums_equal_the_loop(num_tokens: int, shares: tuple[float, ...], dtype: torch.dtype, add: Any) -> None:
    """The tokens of a part are a share of all; a token in none of the parts gets zeros."""
    parts = parts_of(num_tokens, shares, dtype)
    expected_TD = torch.zeros(num_tokens, parts[0][1].shape[1], dtype=dtype)
    for token_N, rows_ND in parts:
        for token, row_D in zip(token_N.tolist(), rows_ND):
            expected_TD[token] += row_D
    assert torch.equal(add(parts, num_tokens), expected_TD)

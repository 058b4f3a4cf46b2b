"""Compiled routes against torch's: the same plan, and sums that are equal."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from alfb_dist.moe import permute as routes

pytestmark = pytest.mark.skipif(routes.library() is None, reason="no C compiler on this machine")


def choices(num_tokens: int, top_k: int, num_experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """ids, of which a quarter are empty slots and some come twice in a token, and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(num_experts, (num_tokens, top_k), generator=generator)
    empty_TK = torch.rand(num_tokens, top_k, generator=generator) < 0.25
    return ids_TK.masked_fill(empty_TK, num_experts), torch.rand(num_tokens, top_k, generator=generator)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_local", "num_ranks"), [(0, 2, 4, 2), (1, 1, 1, 1), (50, 4, 3, 5), (300, 8, 16, 4)]
)
def test_plan_is_torchs(num_tokens: int, top_k: int, num_local: int, num_ranks: int, seed: int) -> None:
    ids_TK, weights_TK = choices(num_tokens, top_k, num_local * num_ranks, seed)
    ours = routes.plan(ids_TK, weights_TK, num_local, num_ranks)
    for mine, theirs in zip(ours, routes._by_torch(ids_TK, weights_TK, num_local, num_ranks)):
        if isinstance(mine, Tensor):
            assert isinstance(theirs, Tensor) and mine.dtype == theirs.dtype and torch.equal(mine, theirs)
        else:
            assert mine == theirs


def test_plan_takes_what_is_not_contiguous_and_other_types() -> None:
    ids_TK, weights_TK = choices(4, 40, 6, 0)
    ours = routes.plan(ids_TK.T, weights_TK.T, 3, 2)
    for ids, weights in ((ids_TK.T, weights_TK.T.double()), (ids_TK.T.int(), weights_TK.T)):
        theirs = routes.plan(ids, weights, 3, 2)
        assert torch.equal(ours.ids_NK, theirs.ids_NK) and torch.equal(ours.weights_NK, theirs.weights_NK.float())


@pytest.mark.parametrize("wrong", [-1, 7])
def test_ids_of_no_expert_are_refused(wrong: int) -> None:
    with pytest.raises(IndexError, match=r"expert ids must be in \[0, 6\]"):
        routes.plan(torch.tensor([[0, wrong], [6, 5]]), torch.ones(2, 2), 3, 2)


@pytest.mark.parametrize("num_tokens", [0, 1, 37])
@pytest.mark.parametrize("shares", list(itertools.product([0.0, 0.5, 1.0], repeat=3)))
def test_sums_are_torchs(num_tokens: int, shares: tuple[float, ...]) -> None:
    """Of three parts, each with a share of the tokens; a token in none of them gets zeros."""
    generator = torch.Generator().manual_seed(num_tokens)
    parts = []
    for share in shares:
        token_N = (torch.rand(num_tokens, generator=generator) < share).nonzero().flatten()
        parts.append((token_N, torch.randn(len(token_N), 19, generator=generator)))
    expected_TD = torch.zeros(num_tokens, 19)
    for token_N, rows_ND in parts:
        expected_TD.index_add_(0, token_N, rows_ND)
    assert torch.equal(routes.add_up(parts, num_tokens), expected_TD)
    doubled = [(token_N, rows_ND.double()) for token_N, rows_ND in parts]
    assert torch.equal(routes.add_up(doubled, num_tokens).float(), sum_in_double(doubled, num_tokens))


def sum_in_double(parts: list[tuple[Tensor, Tensor]], num_tokens: int) -> Tensor:
    total_TD = torch.zeros(num_tokens, 19, dtype=torch.float64)
    for token_N, rows_ND in parts:
        total_TD[token_N] += rows_ND
    return total_TD.float()

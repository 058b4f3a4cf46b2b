"""Compiled permute against plain torch: the same rows and equal sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.row_choices import choose, parts_of
from torch import Tensor

from alfb_dist import cpu
from alfb_dist.cpu.permute import PERMUTE
from alfb_dist.moe.permute import plan_rows_torch, sum_rows_torch

pytestmark = pytest.mark.skipif(not PERMUTE.available(), reason="no C compiler")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_local", "num_ranks"), [(0, 2, 4, 2), (1, 1, 1, 1), (50, 4, 3, 5), (300, 8, 16, 4)]
)
def test_rows_are_those_of_torch(num_tokens: int, top_k: int, num_local: int, num_ranks: int, seed: int) -> None:
    ids_TK, weights_TK = choose(num_tokens, top_k, num_local * num_ranks, seed)
    compiled = cpu.plan_rows(ids_TK, weights_TK, num_local, num_ranks)
    assert compiled is not None
    for ours, theirs in zip(compiled, plan_rows_torch(ids_TK, weights_TK, num_local, num_ranks), strict=True):
        if isinstance(ours, Tensor):
            assert isinstance(theirs, Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        else:
            assert ours == theirs


def test_strided_tensors_are_read_right_and_other_types_left_to_torch() -> None:
    ids_TK, weights_TK = (t.T for t in choose(4, 40, 6, 0))
    compiled, theirs = cpu.plan_rows(ids_TK, weights_TK, 3, 2), plan_rows_torch(ids_TK, weights_TK, 3, 2)
    assert compiled is not None
    assert torch.equal(compiled[1], theirs.ids_NK) and torch.equal(compiled[2], theirs.weights_NK)
    assert cpu.plan_rows(ids_TK, weights_TK.double(), 3, 2) is None
    assert cpu.plan_rows(ids_TK.int(), weights_TK, 3, 2) is None
    assert cpu.plan_rows(ids_TK.to("meta"), weights_TK.to("meta"), 3, 2) is None


@pytest.mark.parametrize("wrong", [-1, 7])
def test_ids_out_of_range_raise(wrong: int) -> None:
    with pytest.raises(IndexError, match=r"expert ids must be in \[0, 6\]"):
        cpu.plan_rows(torch.tensor([[0, wrong], [6, 5]]), torch.ones(2, 2), 3, 2)


@pytest.mark.parametrize("num_tokens", [0, 1, 37])
@pytest.mark.parametrize("shares", list(itertools.product([0.0, 0.5, 1.0], repeat=3)))
def test_sums_are_those_of_torch(num_tokens: int, shares: tuple[float, ...]) -> None:
    """The tokens of a part are a share of all; a token in none of the parts gets zeros."""
    parts = parts_of(num_tokens, shares, torch.float32)
    compiled = cpu.sum_rows(parts, num_tokens)
    assert compiled is not None and torch.equal(compiled, sum_rows_torch(parts, num_tokens))
    assert cpu.sum_rows([(token_N, rows_ND.double()) for token_N, rows_ND in parts], num_tokens) is None

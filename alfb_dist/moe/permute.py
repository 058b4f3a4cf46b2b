"""The rows of tokens that each rank gets, and the sum of those that come back. Compiled on a CPU (cpu/permute.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from alfb_dist import cpu


class Plan(NamedTuple):
    """The rows that one rank sends, by rank and then by token: one for each rank with any of the token's experts."""

    token_N: Tensor  # int64
    ids_NK: Tensor  # int32, local to the receiving rank
    weights_NK: Tensor  # 0 in empty slots
    empty_NK: Tensor  # bool
    row_counts: list[int]  # for each rank
    slot_counts: list[int]  # filled slots, for each rank


def plan_rows(expert_ids_TK: Tensor, weights_TK: Tensor, num_local_experts: int, num_ranks: int) -> Plan:
    """Return the rows to send for a choice of experts.

    expert_ids_TK: int64 in [0, E]; E marks an empty slot. Expert i belongs to rank i // num_local_experts.
    Raises IndexError (RuntimeError in plain torch) for other ids.
    """
    rows = cpu.plan_rows(expert_ids_TK, weights_TK, num_local_experts, num_ranks)
    return plan_rows_torch(expert_ids_TK, weights_TK, num_local_experts, num_ranks) if rows is None else Plan(*rows)


def destinations(expert_ids_TK: Tensor, num_local_experts: int, num_ranks: int) -> Tensor:
    """Return which tokens go to which rank: (P, T) bool. Empty slots go nowhere."""
    rank_TK = expert_ids_TK // num_local_experts
    goes_PT = torch.zeros(num_ranks + 1, len(rank_TK), dtype=torch.bool, device=rank_TK.device)
    return goes_PT.scatter_(0, rank_TK.T, True)[:num_ranks]


def plan_rows_torch(ids_TK: Tensor, weights_TK: Tensor, num_local: int, num_ranks: int) -> Plan:
    """Return what `plan_rows` returns, in plain torch."""
    goes_PT = destinations(ids_TK, num_local, num_ranks)
    rank_N, token_N = goes_PT.nonzero(as_tuple=True)
    local_NK = ids_TK.index_select(0, token_N) - (rank_N * num_local)[:, None]
    empty_NK = (local_NK < 0) | (local_NK >= num_local)
    local_NK = local_NK.masked_fill_(empty_NK, num_local).to(torch.int32)
    rank_S = (ids_TK // num_local).flatten()
    slots_P = rank_S.new_zeros(num_ranks + 1).scatter_add_(0, rank_S, torch.ones_like(rank_S))
    row_counts, slot_counts = torch.stack([goes_PT.sum(1), slots_P[:-1]]).tolist()  # waits for the device once
    weights_NK = weights_TK.index_select(0, token_N).masked_fill_(empty_NK, 0)
    return Plan(token_N, local_NK, weights_NK, empty_NK, row_counts, slot_counts)


def sum_rows(parts: Sequence[tuple[Tensor, Tensor]], num_tokens: int) -> Tensor:
    """Return for each token the sum of its rows in the (tokens, rows) of all parts, part after part: (T, D).

    The tokens of one part are distinct.
    """
    total_TD = cpu.sum_rows(parts, num_tokens)
    return sum_rows_torch(parts, num_tokens) if total_TD is None else total_TD


def sum_rows_torch(parts: Sequence[tuple[Tensor, Tensor]], num_tokens: int) -> Tensor:
    """Return what `sum_rows` returns, in plain torch."""
    like = parts[0][1]
    shape = (num_tokens, like.shape[1])
    total_TD = cpu.empty(shape, like)
    total_TD = like.new_zeros(shape) if total_TD is None else total_TD.zero_()
    for token_N, rows_ND in parts:
        total_TD.index_add_(0, token_N, rows_ND)
    return total_TD

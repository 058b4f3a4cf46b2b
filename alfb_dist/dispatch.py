"""Tokens to the ranks that own their experts, and back.

A token crosses to a rank once, however many of its experts live there, with the ids and weights of those experts; the
rank returns one row, the weighted sum of what its experts made of the token. So the bytes each way are the distinct
(token, rank) pairs times the row's bytes, and the experts never know whether expert parallelism is on: they always get
rows with K slots, of which some are empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from alfb_dist.collectives import Group, all_to_all_rows, exchange_row_counts


@dataclass(frozen=True)
class Route:
    """The way back for the rows of one dispatch."""

    group: ProcessGroup
    num_tokens: int
    token_N: Tensor  # int64: which token of this rank each sent row is
    send_counts: list[int]  # rows sent to each rank of the group
    receive_counts: list[int]  # rows received from each rank of the group


def dispatch(
    x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, num_local_experts: int, group: Group
) -> tuple[Tensor, Tensor, Tensor, Route | None]:
    """Every token is where its experts are: (rows_RD, expert_ids_RK, weights_RK, route); collective, differentiable.

    expert_ids_TK: int64 in [0, E]; E marks an empty slot. Expert i belongs to rank i // num_local_experts of the group.
    In expert_ids_RK, ids are local, in [0, num_local_experts); an empty slot holds num_local_experts and weight 0.
    Without a group (or with one rank) the tokens stay as they are and the route is None.
    """
    if group is None or group.size() == 1:
        return x_TD, expert_ids_TK, weights_TK, None
    num_ranks, num_tokens = group.size(), x_TD.shape[0]
    rank_TK = expert_ids_TK // num_local_experts
    goes_PT = torch.zeros(num_ranks + 1, num_tokens, dtype=torch.bool, device=x_TD.device)
    goes_PT = goes_PT.scatter_(0, rank_TK.T, True)[:num_ranks]  # empty slots go nowhere
    rank_N, token_N = goes_PT.nonzero(as_tuple=True)
    send_counts: list[int] = goes_PT.sum(1).tolist()
    receive_counts = exchange_row_counts(send_counts, token_N.numel(), group, x_TD.device)

    local_NK = expert_ids_TK[token_N] - (rank_N * num_local_experts)[:, None]
    here_NK = (local_NK >= 0) & (local_NK < num_local_experts)
    local_NK = local_NK.masked_fill(~here_NK, num_local_experts)
    weights_NK = weights_TK.index_select(0, token_N) * here_NK
    rows_RD = all_to_all_rows(x_TD.index_select(0, token_N), send_counts, receive_counts, group)
    weights_RK = all_to_all_rows(weights_NK, send_counts, receive_counts, group)
    ids_RK = all_to_all_rows(local_NK.to(torch.int32), send_counts, receive_counts, group).to(torch.int64)
    return rows_RD, ids_RK, weights_RK, Route(group, num_tokens, token_N, send_counts, receive_counts)


def combine(rows_RD: Tensor, route: Route | None) -> Tensor:
    """Each token's output, the sum of the rows that its ranks made of it: (T, D); collective, differentiable."""
    if route is None:
        return rows_RD
    rows_ND = all_to_all_rows(rows_RD, route.receive_counts, route.send_counts, route.group)
    out_TD = rows_ND.new_zeros(route.num_tokens, rows_ND.shape[1])
    return out_TD.index_add(0, route.token_N, rows_ND)

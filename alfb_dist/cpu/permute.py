"""The rows that each rank gets, and the sum of the rows that come back, on a CPU (csrc/permute.c)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alfb_dist.cpu.allocator import allocate
from alfb_dist.cpu.build import Library

PERMUTE = Library(
    "permute.c",
    {"count_rows": (4, 4), "list_rows": (4, 9), "add_rows": (2, 4), "clear_unseen": (2, 2)},
    returning=("count_rows",),
)

Rows = tuple[Tensor, Tensor, Tensor, Tensor, list[int], list[int]]


def plan_rows(expert_ids_TK: Tensor, weights_TK: Tensor, num_local_experts: int, num_ranks: int) -> Rows | None:
    """Return the rows to send to each rank, in rank order and by token: (tokens, ids, weights, empty, rows, slots).

    expert_ids_TK: int64 in [0, E]; E marks an empty slot. Expert i belongs to rank i // num_local_experts.
    tokens: (N,) int64. ids: (N, K) int32, local to the receiving rank. weights: (N, K), 0 in empty slots. empty: (N, K)
    bool. rows and slots: their number for each rank, of slots those that are filled.
    None unless on a CPU, the ids int64 and the weights float32. Raises IndexError for other ids.
    """
    known = expert_ids_TK.dtype == torch.int64 and weights_TK.dtype == torch.float32
    if not expert_ids_TK.is_cpu or not known or not PERMUTE.available():
        return None
    ids_TK, weights_TK = expert_ids_TK.contiguous(), weights_TK.contiguous()
    sizes, counts = (*ids_TK.shape, num_ranks, num_local_experts), ids_TK.new_empty(4, num_ranks)
    if PERMUTE.call("count_rows", *sizes, ids_TK, *counts[:3]):
        last = num_ranks * num_local_experts
        raise IndexError(f"expert ids must be in [0, {last}], got {ids_TK.min()} to {ids_TK.max()}")
    row_counts, slot_counts = counts[:2].tolist()
    shape = (sum(row_counts), ids_TK.shape[1])
    outputs = (
        ids_TK.new_empty(shape[0]),
        ids_TK.new_empty(shape, dtype=torch.int32),
        weights_TK.new_empty(shape),
        ids_TK.new_empty(shape, dtype=torch.bool),
    )
    PERMUTE.call("list_rows", *sizes, ids_TK, weights_TK, counts[0], *outputs, *counts[2:])
    return *outputs, row_counts, slot_counts


def sum_rows(parts: Sequence[tuple[Tensor, Tensor]], num_tokens: int) -> Tensor | None:
    """Return for each token the sum of its rows in the (tokens, rows) of all parts, part after part: (T, D).

    The tokens of one part are distinct. None unless the rows are float32 on a CPU.
    """
    like = parts[0][1]
    if not like.is_cpu or like.dtype != torch.float32 or not PERMUTE.available():
        return None
    total_TD = allocate((num_tokens, like.shape[1]), like)
    seen_T = torch.zeros(num_tokens, dtype=torch.bool)
    for token_N, rows_ND in parts:
        PERMUTE.call("add_rows", *rows_ND.shape, token_N.contiguous(), rows_ND.contiguous(), total_TD, seen_T)
    PERMUTE.call("clear_unseen", *total_TD.shape, total_TD, seen_T)
    return total_TD

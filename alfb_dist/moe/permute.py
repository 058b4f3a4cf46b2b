"""Which rows of tokens go to which rank, and the sum of what the ranks made of them; compiled on a CPU (permute.c)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alfb_dist.cpu import allocator as arena
from alfb_dist.cpu.build import load


class Plan(NamedTuple):
    """The rows that one rank sends, in rank order; a token has one for each rank that owns any of its experts."""

    token_N: Tensor  # int64
    ids_NK: Tensor  # int32, local to the receiving rank
    weights_NK: Tensor  # 0 where a slot is empty
    empty_NK: Tensor  # bool
    row_counts: list[int]  # for each rank
    slot_counts: list[int]  # filled ones, for each rank


_ARGUMENTS = {"count_rows": (4, 4), "list_rows": (4, 9), "add_rows": (2, 4), "clear_unseen": (2, 2)}


@functools.cache
def library() -> Any:
    """The compiled passes, or None where they cannot be had."""
    lib = load(Path(__file__).parents[1] / "cpu" / "csrc" / "permute.c")
    for name, (numbers, pointers) in _ARGUMENTS.items() if lib else ():
        getattr(lib, name).argtypes = [ctypes.c_int64] * numbers + [ctypes.c_void_p] * pointers
        getattr(lib, name).restype = ctypes.c_int64 if name == "count_rows" else None
    return lib


def _call(name: str, *arguments: Tensor | int) -> Any:
    return getattr(library(), name)(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))


def plan(expert_ids_TK: Tensor, weights_TK: Tensor, num_local_experts: int, num_ranks: int) -> Plan:
    """The rows to send for these choices.

    expert_ids_TK: int64 in [0, E]; E marks an empty slot. Expert i belongs to rank i // num_local_experts.
    Other ids raise IndexError, or where it is not compiled RuntimeError, as torch does.
    """
    known = expert_ids_TK.dtype == torch.int64 and weights_TK.dtype == torch.float32
    if expert_ids_TK.is_cpu and known and library() is not None:
        return _compiled(expert_ids_TK.contiguous(), weights_TK.contiguous(), num_local_experts, num_ranks)
    return _by_torch(expert_ids_TK, weights_TK, num_local_experts, num_ranks)


def _compiled(ids_TK: Tensor, weights_TK: Tensor, num_local: int, num_ranks: int) -> Plan:
    sizes, counts = (*ids_TK.shape, num_ranks, num_local), ids_TK.new_empty(4, num_ranks)
    if _call("count_rows", *sizes, ids_TK, *counts[:3]):
        raise IndexError(f"expert ids must be in [0, {num_ranks * num_local}], got {ids_TK.min()} to {ids_TK.max()}")
    row_counts, slot_counts = counts[:2].tolist()
    shape = (sum(row_counts), ids_TK.shape[1])
    made = Plan(
        ids_TK.new_empty(shape[0]),
        ids_TK.new_empty(shape, dtype=torch.int32),
        weights_TK.new_empty(shape),
        ids_TK.new_empty(shape, dtype=torch.bool),
        row_counts,
        slot_counts,
    )
    _call("list_rows", *sizes, ids_TK, weights_TK, counts[0], *made[:4], *counts[2:])
    return made


def destinations(expert_ids_TK: Tensor, num_local_experts: int, num_ranks: int) -> Tensor:
    """Which tokens go to which rank: (P, T) bool. Empty slots go nowhere."""
    rank_TK = expert_ids_TK // num_local_experts
    goes_PT = torch.zeros(num_ranks + 1, len(rank_TK), dtype=torch.bool, device=rank_TK.device)
    return goes_PT.scatter_(0, rank_TK.T, True)[:num_ranks]


def _by_torch(ids_TK: Tensor, weights_TK: Tensor, num_local: int, num_ranks: int) -> Plan:
    goes_PT = destinations(ids_TK, num_local, num_ranks)
    rank_N, token_N = goes_PT.nonzero(as_tuple=True)
    local_NK = ids_TK.index_select(0, token_N) - (rank_N * num_local)[:, None]
    empty_NK = (local_NK < 0) | (local_NK >= num_local)
    local_NK = local_NK.masked_fill_(empty_NK, num_local).to(torch.int32)
    rank_S = (ids_TK // num_local).flatten()
    slots_P = rank_S.new_zeros(num_ranks + 1).scatter_add_(0, rank_S, torch.ones_like(rank_S))
    row_counts, slot_counts = torch.stack([goes_PT.sum(1), slots_P[:-1]]).tolist()  # one wait for the device
    weights_NK = weights_TK.index_select(0, token_N).masked_fill_(empty_NK, 0)
    return Plan(token_N, local_NK, weights_NK, empty_NK, row_counts, slot_counts)


def add_up(parts: Sequence[tuple[Tensor, Tensor]], num_tokens: int) -> Tensor:
    """The sum for each token of (tokens, rows), part after part: (T, D). Rows of a part are of different tokens."""
    like = parts[0][1]
    if not like.is_cpu or like.dtype != torch.float32 or library() is None:
        total_TD = arena.zeros((num_tokens, like.shape[1]), like)
        for token_N, rows_ND in parts:
            total_TD.index_add_(0, token_N, rows_ND)
        return total_TD
    total_TD = arena.empty((num_tokens, like.shape[1]), like)
    seen_T = torch.zeros(num_tokens, dtype=torch.bool)
    for token_N, rows_ND in parts:
        _call("add_rows", *rows_ND.shape, token_N.contiguous(), rows_ND.contiguous(), total_TD, seen_T)
    _call("clear_unseen", *total_TD.shape, total_TD, seen_T)
    return total_TD

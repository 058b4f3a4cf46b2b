"""Choices of experts and parts of rows, for the tests of both forms of permute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WIDTH = 19


def choose(num_tokens: int, top_k: int, num_experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (ids, weights); a quarter of the slots are empty, and some tokens choose an expert twice."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(num_experts, (num_tokens, top_k), generator=generator)
    empty_TK = torch.rand(num_tokens, top_k, generator=generator) < 0.25
    return ids_TK.masked_fill(empty_TK, num_experts), torch.rand(num_tokens, top_k, generator=generator)


def parts_of(num_tokens: int, shares: Sequence[float], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return (tokens, rows) for each share, which is the part of all tokens that have a row."""
    generator = torch.Generator().manual_seed(num_tokens)
    parts = []
    for share in shares:
        token_N = (torch.rand(num_tokens, generator=generator) < share).nonzero().flatten()
        parts.append((token_N, torch.randn(len(token_N), WIDTH, generator=generator).to(dtype)))
    return parts

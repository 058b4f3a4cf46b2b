"""Measures of balance. Pure functions of loads and biases; every load is int64, summed over the global batch."""

from __future__ import annotations

import torch
from torch import Tensor


def max_violation(load_LE: Tensor) -> Tensor:
    """Return by how much the busiest expert of each layer exceeds the mean, relative to the mean: (L,) float64.

    load_LE: tokens per layer and expert, (..., E). 0 is perfect balance, or no load; E - 1 is
    the collapse onto one expert. Source: MaxVio of arXiv:2408.15664, section 4.1.
    """
    load = load_LE.to(torch.float64)
    mean = load.mean(-1)
    return torch.where(mean > 0, (load.amax(-1) - mean) / mean.clamp(min=1e-300), 0.0)


def rank_skew(load_LE: Tensor, ep_degree: int) -> Tensor:
    """Return the rows of the busiest expert-parallel rank over the mean, per layer: (L,) float64; 1 if even or empty.

    Expert i belongs to rank i // (E / ep_degree).
    """
    load_LP = load_LE.to(torch.float64).unflatten(-1, (ep_degree, -1)).sum(-1)
    mean = load_LP.mean(-1)
    return torch.where(mean > 0, load_LP.amax(-1) / mean.clamp(min=1e-300), 1.0)


def dead_experts(load_LE: Tensor) -> int:
    """Return the number of experts, over all layers, without a token."""
    return int((load_LE == 0).sum())


def bias_range(bias_LE: Tensor) -> float:
    """Return the widest spread (max - min) of the biases within one layer, in score units."""
    return float((bias_LE.amax(-1) - bias_LE.amin(-1)).max()) if bias_LE.numel() else 0.0

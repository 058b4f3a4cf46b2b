"""Which samples a step trains on: a function of seed and step alone, so that a resumed run needs no saved state.

Each epoch visits every sample once, in an order of its own. A Feistel network over the sample numbers computes the
sample at any position, so no permutation is kept in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

UInts = NDArray[np.uint64]


def _mix(x: UInts) -> UInts:
    """Map each number to another one to one, modulo 2**64 (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _feistel(x: UInts, keys: UInts, half_bits: int) -> UInts:
    """Permute 0..4**half_bits-1; each number's key chooses the permutation."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = x >> shift, x & mask
    for i in range(1, _ROUNDS + 1):
        round_keys = _mix(keys + np.uint64(_GOLDEN * i & _MASK))
        left, right = right, left ^ (_mix(right ^ round_keys) & mask)
    return (left << shift) | right


def shuffled(positions: NDArray[Any], epochs: NDArray[Any], num_samples: int, seed: int) -> NDArray[np.int64]:
    """Return the sample at each position of its epoch's order, int64, same shape.

    positions: (N,) in 0..num_samples-1. epochs: (N,). For a fixed epoch and seed this is a permutation of the samples.
    """
    half_bits = max(1, -(-(num_samples - 1).bit_length() // 2))
    keys = _mix(_mix(np.full(positions.shape, seed & _MASK, np.uint64)) + epochs.astype(np.uint64) * np.uint64(_GOLDEN))
    samples = positions.astype(np.uint64)
    outside = np.ones(positions.shape, bool)
    while outside.any():  # the network permutes up to 4 times as many numbers: repeat for those beyond the samples
        samples[outside] = _feistel(samples[outside], keys[outside], half_bits)
        outside = samples >= np.uint64(num_samples)
    return samples.astype(np.int64)


def batch_ids(seed: int, step: int, global_batch: int, num_samples: int) -> NDArray[np.int64]:
    """Return the samples of a step's global batch, int64 (global_batch,), equal on every rank for any number of ranks.

    step: counts optimizer steps from 0. A batch may end one epoch and begin the next.
    Raises ValueError if a number is out of range.
    """
    if step < 0 or global_batch < 1 or num_samples < 1:
        raise ValueError(
            f"step ({step}) must be at least 0, "
            f"global_batch ({global_batch}) and num_samples ({num_samples}) at least 1"
        )
    epoch, position = divmod(step * global_batch, num_samples)
    positions = position + np.arange(global_batch, dtype=np.int64)
    return shuffled(positions % num_samples, epoch + positions // num_samples, num_samples, seed)


def rank_samples(batch_ids: NDArray[np.int64], rank: int, world: int, micro_batch: int) -> list[NDArray[np.int64]]:
    """Return the rank's contiguous share of a global batch, as micro-batches of (micro_batch,) samples in order.

    The shares of all ranks are the whole batch, each sample once.
    Raises ValueError if world * micro_batch does not divide the batch, or if the rank is not in 0..world-1.
    """
    if world < 1 or micro_batch < 1 or not 0 <= rank < world:
        raise ValueError(
            f"rank ({rank}) must be in 0..world-1, world is {world}; micro_batch ({micro_batch}) at least 1"
        )
    if len(batch_ids) % (world * micro_batch):
        raise ValueError(
            f"global_batch ({len(batch_ids)}) must be divisible by world * micro_batch ({world} * {micro_batch})"
        )
    share = len(batch_ids) // world
    return list(batch_ids[rank * share : (rank + 1) * share].reshape(-1, micro_batch))

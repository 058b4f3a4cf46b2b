"""The sampler: seed and step alone decide the samples, each sample once an epoch, for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from alfb_dist.data import batch_ids, rank_samples
from alfb_dist.data.sampler import shuffled

M64 = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix_oracle(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return x ^ x >> 31


def sample_oracle(position: int, epoch: int, num_samples: int, seed: int) -> int:
    """One sample of one epoch's order, in Python's own integers."""
    half = 1
    while 4**half < num_samples:
        half += 1
    key = mix_oracle(mix_oracle(seed & M64) + epoch * GOLDEN & M64)
    x = position
    while True:
        left, right = x >> half, x & (1 << half) - 1
        for i in range(1, 9):
            left, right = right, left ^ mix_oracle(right ^ mix_oracle(key + i * GOLDEN & M64)) & (1 << half) - 1
        x = left << half | right
        if x < num_samples:
            return x


def steps_oracle(seed: int, num_steps: int, global_batch: int, num_samples: int) -> list[list[int]]:
    """Write down the epochs one after the other and cut the list into batches."""
    line: list[int] = []
    epoch = 0
    while len(line) < num_steps * global_batch:
        line += [sample_oracle(position, epoch, num_samples, seed) for position in range(num_samples)]
        epoch += 1
    return [line[i * global_batch : (i + 1) * global_batch] for i in range(num_steps)]


def order(num_samples: int, epoch: int = 0, seed: int = 0) -> list[int]:
    return shuffled(np.arange(num_samples), np.full(num_samples, epoch), num_samples, seed).tolist()


def test_an_epoch_visits_every_sample_once() -> None:
    for num_samples in (*range(1, 40), 63, 64, 65, 256, 257, 1000):
        for epoch in range(3):
            assert sorted(order(num_samples, epoch)) == list(range(num_samples)), num_samples


@pytest.mark.parametrize(("num_samples", "global_batch"), [(1, 3), (2, 3), (5, 4), (7, 7), (10, 4), (10, 25), (64, 6)])
@pytest.mark.parametrize("seed", [0, 7, -1])
def test_steps_cut_the_line_of_epochs_into_batches(num_samples: int, global_batch: int, seed: int) -> None:
    expected = steps_oracle(seed, 12, global_batch, num_samples)
    assert [batch_ids(seed, step, global_batch, num_samples).tolist() for step in range(12)] == expected


def test_the_order_never_changes() -> None:
    """A resumed run must see the samples that the first would have seen, on any version of any library."""
    assert order(10, epoch=0, seed=0) == [1, 0, 9, 3, 5, 6, 2, 8, 7, 4]
    assert batch_ids(1234, 5, 4, 6).tolist() == [2, 0, 3, 1]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(order(100, epoch, seed)) for epoch in range(5) for seed in range(5)]
    assert len(set(orders)) == 25
    assert tuple(range(100)) not in orders


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5, 10, 16])
def test_every_sample_is_equally_likely_at_every_position(num_samples: int) -> None:
    epochs = 4000
    grid = np.tile(np.arange(num_samples), epochs), np.repeat(np.arange(epochs), num_samples)
    samples = shuffled(*grid, num_samples, 11).reshape(epochs, num_samples)
    share = 1 / num_samples
    bound = 5 * np.sqrt(epochs * share * (1 - share))  # five standard deviations of a binomial count
    for position in range(num_samples):
        counts = np.bincount(samples[:, position], minlength=num_samples)
        assert np.abs(counts - epochs * share).max() < bound, (position, counts)


def test_every_pair_is_equally_likely_at_neighbouring_positions() -> None:
    epochs, n = 6000, 6
    grid = np.tile(np.arange(n), epochs), np.repeat(np.arange(epochs), n)
    samples = shuffled(*grid, n, 5).reshape(epochs, n)
    pairs = np.bincount(samples[:, 2] * n + samples[:, 3], minlength=n * n).reshape(n, n)
    share = 1 / (n * (n - 1))
    off_diagonal = pairs[~np.eye(n, dtype=bool)]
    assert np.trace(pairs) == 0
    assert np.abs(off_diagonal - epochs * share).max() < 5 * np.sqrt(epochs * share * (1 - share))


def test_number_of_samples_is_not_limited_by_memory() -> None:
    num_samples, global_batch = 3 << 40, 4096
    ids = batch_ids(0, 123_456_789, global_batch, num_samples)
    assert len(set(ids.tolist())) == global_batch
    assert 0 <= ids.min() < ids.max() < num_samples
    position = 123_456_789 * global_batch
    assert ids[:3].tolist() == [sample_oracle(position + i, 0, num_samples, 0) for i in range(3)]


def test_shares_of_eight_samples_by_hand() -> None:
    ids = np.array([10, 11, 12, 13, 14, 15, 16, 17])
    shares = {
        (0, 1, 8): [[10, 11, 12, 13, 14, 15, 16, 17]],
        (0, 1, 2): [[10, 11], [12, 13], [14, 15], [16, 17]],
        (0, 2, 2): [[10, 11], [12, 13]],
        (1, 2, 2): [[14, 15], [16, 17]],
        (1, 2, 4): [[14, 15, 16, 17]],
        (2, 4, 1): [[14], [15]],
        (3, 4, 2): [[16, 17]],
    }
    for (rank, world, micro_batch), expected in shares.items():
        assert [part.tolist() for part in rank_samples(ids, rank, world, micro_batch)] == expected


@pytest.mark.parametrize(
    ("rank", "world", "micro_batch"), [(0, 3, 1), (0, 2, 3), (2, 2, 1), (-1, 2, 1), (0, 0, 1), (0, 1, 0)]
)
def test_uneven_shares_are_refused(rank: int, world: int, micro_batch: int) -> None:
    with pytest.raises(ValueError, match=r"divisible by world \* micro_batch|must be in 0..world-1"):
        rank_samples(np.arange(8), rank, world, micro_batch)


@pytest.mark.parametrize(("step", "global_batch", "num_samples"), [(-1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_numbers_out_of_range_are_refused(step: int, global_batch: int, num_samples: int) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        batch_ids(0, step, global_batch, num_samples)

"""Measures of balance against hand-worked values."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from alfb_dist.balance.metrics import bias_range, dead_experts, max_violation, rank_skew


def loads(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


@pytest.mark.parametrize(
    ("load_E", "violation"),
    [
        ([7, 7, 7, 7], 0.0),
        ([12, 0, 0, 0], 3.0),
        ([5, 4, 3, 4], 0.25),
        ([1, 2, 3, 6], 1.0),
        ([4, 3, 1, 0], 1.0),
        ([0, 0, 0, 0], 0.0),
    ],
)
def test_max_violation_is_excess_of_the_busiest_over_the_mean(load_E: list[int], violation: float) -> None:
    assert max_violation(loads(load_E)).tolist() == [violation]


def test_max_violation_is_per_layer_and_float64() -> None:
    violation_L = max_violation(loads([4, 4], [8, 0], [0, 0], [1, 3]))
    assert violation_L.dtype == torch.float64
    assert violation_L.tolist() == [0.0, 1.0, 0.0, 0.5]


def test_max_violation_of_collapse_is_number_of_experts_minus_one() -> None:
    for num_experts in (2, 16, 256):
        load_E = torch.zeros(num_experts, dtype=torch.int64)
        load_E[num_experts // 2] = 12_345
        assert max_violation(load_E).item() == pytest.approx(num_experts - 1, rel=1e-15)


@pytest.mark.parametrize("seed", range(5))
def test_max_violation_equals_fractions(seed: int) -> None:
    load_E = torch.randint(0, 2**40, (12,), generator=torch.Generator().manual_seed(seed))
    mean = Fraction(sum(load_E.tolist()), 12)
    expected = float((max(load_E.tolist()) - mean) / mean)
    assert max_violation(load_E).item() == pytest.approx(expected, rel=1e-14)


def test_max_violation_sees_one_token_beyond_float32() -> None:
    tokens = 2**24
    assert max_violation(loads([tokens + 1, tokens - 1])).item() == 1 / tokens


def test_max_violation_does_not_change_its_input() -> None:
    load_LE = loads([5, 4, 3, 4])
    max_violation(load_LE)
    assert load_LE.tolist() == [[5, 4, 3, 4]] and load_LE.dtype == torch.int64


def test_rank_skew_sums_consecutive_experts() -> None:
    # Two ranks: 5 + 4 = 9 and 3 + 4 = 7 of a mean of 8; four ranks: 5 of a mean of 4.
    load_LE = loads([5, 4, 3, 4])
    assert rank_skew(load_LE, 1).tolist() == [1.0]
    assert rank_skew(load_LE, 2).tolist() == [9 / 8]
    assert rank_skew(load_LE, 4).tolist() == [5 / 4]


def test_rank_skew_of_no_load_is_one() -> None:
    assert rank_skew(loads([0, 0, 0, 0], [8, 0, 0, 0]), 2).tolist() == [1.0, 2.0]


def test_rank_skew_can_hide_what_max_violation_shows() -> None:
    load_LE = loads([8, 0, 0, 8])
    assert rank_skew(load_LE, 2).tolist() == [1.0]
    assert max_violation(load_LE).tolist() == [1.0]


def test_dead_experts_are_counted_over_all_layers() -> None:
    assert dead_experts(loads([0, 1, 2, 0], [3, 4, 5, 6], [0, 9, 9, 9])) == 3


def test_bias_range_is_the_widest_spread_within_a_layer() -> None:
    assert bias_range(torch.tensor([[0.5, -0.25, 0.0], [10.0, 10.5, 10.0]])) == 0.75
    assert bias_range(torch.zeros(0, 4)) == 0.0

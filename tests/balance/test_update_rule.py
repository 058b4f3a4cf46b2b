"""The update rules and rate schedules: worked values, exactness, signs, refusals."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

import alfb_dist
from alfb_dist.balance.update_rule import RULES, rate_schedule, update_bias


def moved(load: list[int], rate: float, rule: str = "sign", *, centered: bool = False) -> Tensor:
    return update_bias(torch.zeros(len(load)), torch.tensor(load), rate=rate, rule=rule, centered=centered)


def random_load(seed: int, layers: int = 3, experts: int = 8, top: int = 50) -> Tensor:
    return torch.randint(0, top, (layers, experts), generator=torch.Generator().manual_seed(seed))


# Worked values.


def test_sign_rule_moves_by_one_rate_and_leaves_the_mean_expert() -> None:
    assert torch.equal(moved([5, 4, 3, 4], 0.01), torch.tensor([-0.01, 0.0, 0.01, 0.0]))


def test_sign_rule_of_a_collapse() -> None:
    assert torch.equal(moved([10, 0, 0, 0], 1e-3), torch.tensor([-1e-3, 1e-3, 1e-3, 1e-3]))


def test_centred_sign_rule_of_a_collapse() -> None:
    assert torch.equal(moved([10, 0, 0, 0], 1e-3, centered=True), torch.tensor([-1.5e-3, 0.5e-3, 0.5e-3, 0.5e-3]))


def test_sign_rule_of_a_gate_seen_by_two_depths() -> None:
    load_E = torch.tensor([4, 0, 0, 0]) + torch.tensor([0, 3, 1, 0])
    assert torch.equal(moved(load_E.tolist(), 1e-3), torch.tensor([-1e-3, -1e-3, 1e-3, 1e-3]))


def test_proportional_rule_moves_by_the_share_error() -> None:
    # Shares 5/16, 4/16, 3/16, 4/16 of a target of 1/4.
    assert torch.equal(moved([5, 4, 3, 4], 0.5, "proportional"), torch.tensor([-1 / 32, 0.0, 1 / 32, 0.0]))
    assert torch.equal(moved([10, 0, 0, 0], 1.0, "proportional"), torch.tensor([-0.75, 0.25, 0.25, 0.25]))


def test_rms_rule_moves_by_the_error_over_its_root_mean_square() -> None:
    # Errors (-1, 0, 1, 0) / 16, their root mean square (1 / 16) / sqrt(2).
    torch.testing.assert_close(moved([5, 4, 3, 4], 0.01, "rms"), 0.01 * torch.tensor([-(2**0.5), 0.0, 2**0.5, 0.0]))
    # Errors (-3, 1, 1, 1) / 4, their root mean square sqrt(12 / 4) / 4.
    expected = 0.01 * torch.tensor([-(3**0.5), 3**-0.5, 3**-0.5, 3**-0.5])
    torch.testing.assert_close(moved([10, 0, 0, 0], 0.01, "rms"), expected)


def test_centring_of_rules_whose_moves_sum_to_zero_changes_nothing() -> None:
    load_LE = random_load(0)
    for rule in ("proportional", "rms"):
        plain = update_bias(torch.zeros(3, 8), load_LE, rate=0.1, rule=rule)
        centred = update_bias(torch.zeros(3, 8), load_LE, rate=0.1, rule=rule, centered=True)
        torch.testing.assert_close(plain, centred, rtol=0, atol=1e-8)


# Laws of every rule.


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_no_load_moves_nothing(rule: str, centered: bool) -> None:
    bias_LE = torch.tensor([[0.1, -0.2, 0.3], [5.0, 5.0, 5.0]])
    load_LE = torch.tensor([[0, 0, 0], [2, 2, 2]])
    assert torch.equal(update_bias(bias_LE, load_LE, rate=1e-2, rule=rule, centered=centered), bias_LE)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_rate_zero_freezes_every_bit(rule: str, centered: bool) -> None:
    bias_LE = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    frozen = update_bias(bias_LE, random_load(1), rate=0, rule=rule, centered=centered)
    assert torch.equal(frozen, bias_LE)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_under_loaded_expert_gains_bias_and_over_loaded_loses(rule: str, seed: int) -> None:
    load_LE = random_load(seed)
    step_LE = update_bias(torch.zeros(3, 8), load_LE, rate=0.01, rule=rule)
    excess_LE = load_LE * 8 - load_LE.sum(-1, keepdim=True)
    assert torch.equal(torch.sign(step_LE).long(), -torch.sign(excess_LE))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(4))
def test_centred_moves_have_mean_zero(rule: str, seed: int) -> None:
    step_LE = update_bias(torch.zeros(3, 8), random_load(seed), rate=0.01, rule=rule, centered=True)
    assert step_LE.double().mean(-1).abs().max() < 1e-9


def exact_direction(load: list[int], rule: str, centered: bool) -> list[float]:
    """In fractions; the one root in float64."""
    total, num = sum(load), len(load)
    error = [Fraction(1, num) - Fraction(n, total) for n in load]
    if rule == "sign":
        direction = [float((e > 0) - (e < 0)) for e in error]
    elif rule == "proportional":
        direction = [float(e) for e in error]
    else:
        rms = float(sum(e * e for e in error) / num) ** 0.5
        direction = [float(e) / rms for e in error]
    mean = sum(direction) / num
    return [d - mean if centered else d for d in direction]


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_update_equals_fractions(rule: str, centered: bool, seed: int) -> None:
    load_LE = random_load(seed, top=10**9)
    bias_LE = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
    updated_LE = update_bias(bias_LE, load_LE, rate=0.03, rule=rule, centered=centered)
    for bias_E, load_E, updated_E in zip(bias_LE, load_LE, updated_LE):
        direction = exact_direction(load_E.tolist(), rule, centered)
        expected = bias_E.double() + 0.03 * torch.tensor(direction, dtype=torch.float64)
        torch.testing.assert_close(updated_E, expected.float(), rtol=2e-7, atol=1e-8)


@pytest.mark.parametrize("rule", RULES)
def test_layers_do_not_see_each_other(rule: str) -> None:
    bias_LE, load_LE = torch.randn(3, 8, generator=torch.Generator().manual_seed(2)), random_load(2)
    together = update_bias(bias_LE, load_LE, rate=0.01, rule=rule, centered=True)
    alone = [update_bias(b, n, rate=0.01, rule=rule, centered=True) for b, n in zip(bias_LE, load_LE)]
    assert torch.equal(together, torch.stack(alone))


def test_input_is_left_as_it_is() -> None:
    bias_LE, load_LE = torch.zeros(1, 4), torch.tensor([[5, 4, 3, 4]])
    updated_LE = update_bias(bias_LE, load_LE, rate=0.01)
    assert not bias_LE.any() and load_LE.tolist() == [[5, 4, 3, 4]]
    assert updated_LE.dtype == torch.float32 and updated_LE.data_ptr() != bias_LE.data_ptr()


def test_public_name_is_the_function() -> None:
    assert alfb_dist.update_bias is update_bias


# Exactness.


def test_sign_sees_one_token_where_float32_does_not() -> None:
    # In float32 the first count rounds to 2**24 and the sum to 3 * 2**24 - 1.
    tokens = 2**24
    assert moved([tokens + 1, tokens, tokens - 1], 1.0).tolist() == [-1.0, 0.0, 1.0]


def test_sign_sees_one_token_where_float64_does_not() -> None:
    tokens = 2**54
    assert moved([tokens + 1, tokens, tokens, tokens - 1], 1.0).tolist() == [-1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sign_holds_where_a_float_sum_flips_it(dtype: torch.dtype) -> None:
    load_E = torch.tensor([2**25 + 1, 2**25 + 2, 2**25 + 4, 2**25 + 1])  # the mean is 2**25 + 2
    as_float = load_E.to(dtype)
    flipped = torch.sign(as_float.sum() / 4 - as_float)
    exact = moved(load_E.tolist(), 1.0)
    assert exact.tolist() == [1.0, 0.0, -1.0, 1.0]
    assert not torch.equal(flipped.float(), exact)


def test_bias_moves_on_where_bfloat16_would_stall() -> None:
    bias_E, load_E, stalled_E = torch.zeros(2), torch.tensor([0, 2]), torch.zeros(2, dtype=torch.bfloat16)
    for _ in range(1000):
        bias_E = update_bias(bias_E, load_E, rate=1e-3)
        stalled_E = stalled_E + 1e-3 * torch.tensor([1, -1], dtype=torch.bfloat16)
    torch.testing.assert_close(bias_E, torch.tensor([1.0, -1.0]), rtol=1e-4, atol=0)
    assert stalled_E.abs().max() <= 0.5


# Refusals.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bias_of_another_type_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"bias must be float32.*got {dtype}"):
        update_bias(torch.zeros(4, dtype=dtype), torch.ones(4, dtype=torch.int64), rate=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.bool])
def test_load_of_another_type_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"load must be int64.*got {dtype}"):
        update_bias(torch.zeros(4), torch.ones(4, dtype=dtype), rate=1e-3)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(4,\)"):
        update_bias(torch.zeros(2, 4), torch.ones(4, dtype=torch.int64), rate=1e-3)


@pytest.mark.parametrize("rate", [-1e-3, float("nan"), float("inf")])
def test_rate_that_is_negative_or_not_finite_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate must be a finite number >= 0"):
        moved([1, 2], rate)


def test_unknown_rule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="sign, proportional, rms, got 'sing'"):
        moved([1, 2], 1e-3, "sing")


# Schedules.


def test_schedule_without_options_is_constant() -> None:
    assert [rate_schedule(0.25)(step) for step in (0, 1, 10**9)] == [0.25] * 3


def test_schedule_rises_linearly_over_the_warm_up() -> None:
    at = rate_schedule(1.0, warmup_steps=4)
    assert [at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_schedule_is_zero_from_its_step_on() -> None:
    at = rate_schedule(0.5, warmup_steps=2, zero_at_step=4)
    assert [at(step) for step in (0, 1, 2, 3, 4, 5, 10**6)] == [0.25, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0]


def test_schedule_refuses_steps_that_cross() -> None:
    with pytest.raises(ValueError, match=r"zero_at_step \(4\).*warmup_steps \(4\)"):
        rate_schedule(0.5, warmup_steps=4, zero_at_step=4)
    with pytest.raises(ValueError, match="warmup_steps must be >= 0, got -1"):
        rate_schedule(0.5, warmup_steps=-1)
    with pytest.raises(ValueError, match=r"zero_at_step \(0\)"):
        rate_schedule(0.5, zero_at_step=0)

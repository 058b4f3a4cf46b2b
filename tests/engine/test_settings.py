"""Sharding and Balancing: their defaults are those of the public functions; values that are not valid are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

import alfb_dist
from alfb_dist.engine.balancer import rate_of
from alfb_dist.engine.balancing import Balancing
from alfb_dist.moe.sharding import Sharding

PUBLIC = [alfb_dist.parallelize, alfb_dist.initialize, alfb_dist.Balancer, alfb_dist.BalanceCallback]


@pytest.mark.parametrize("function", PUBLIC, ids=lambda function: function.__name__)
def test_defaults_of_a_public_function_are_those_of_the_settings(function: Callable[..., Any]) -> None:
    defaults = {field.name: field.default for kind in (Sharding, Balancing) for field in fields(kind)}
    defaults.pop("ep_degree")
    parameters = inspect.signature(function).parameters
    shared = {name: parameters[name].default for name in parameters if name in defaults}
    assert len(shared) >= 4 and shared == {name: defaults[name] for name in shared}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"ep_degree": 0}, "ep_degree must be an integer >= 1, got 0"),
        ({"ep_degree": 2.0}, r"ep_degree must be an integer >= 1, got 2\.0"),
        ({"ep_degree": 2, "max_rows": 1}, r"max_rows must be 0 or at least ep_degree \(2\), got 1"),
        ({"ep_degree": 2, "sequence_loss_alpha": -0.1}, r"sequence_loss_alpha must be >= 0, got -0\.1"),
        ({"ep_degree": 2, "batch_loss_alpha": float("nan")}, "batch_loss_alpha must be >= 0, got nan"),
        ({"ep_degree": 2, "timeout_seconds": 0}, "timeout_seconds must be > 0, got 0"),
    ],
)
def test_sharding_that_is_not_valid_is_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Sharding(**given)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"rule": "sing"}, "got 'sing'"),
        ({"rate": float("inf")}, "got inf"),
        ({"rate": lambda step: -1.0}, r"got -1\.0"),
        ({"mode": ["train", "off"]}, "mode must be one of train, freeze, recentre, .* got 'off'"),
        ({"warmup_steps": -1}, "warmup_steps must be >= 0, got -1"),
        ({"warmup_steps": 3, "zero_at_step": 3}, r"zero_at_step \(3\) must be greater than warmup_steps \(3\)"),
        ({"rate": lambda step: 1.0, "zero_at_step": 3}, "leave warmup_steps and zero_at_step out"),
    ],
)
def test_balancing_that_is_not_valid_is_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        rate_of(Balancing(**given))


def test_rate_is_a_number_a_schedule_or_a_function() -> None:
    assert [rate_of(Balancing(rate=0.5))(step) for step in (0, 9)] == [0.5, 0.5]
    warmed = rate_of(Balancing(rate=0.5, warmup_steps=2, zero_at_step=3))
    assert [warmed(step) for step in range(4)] == [0.25, 0.5, 0.5, 0.0]
    assert rate_of(Balancing(rate=lambda step: 1.0 / (step + 1)))(3) == 0.25


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Sharding(ep_degree=1).max_rows = 4  # type: ignore[misc]

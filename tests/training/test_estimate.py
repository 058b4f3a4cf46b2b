"""The sizes of a dry run against those of built models and routed tokens."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from alfb_dist.config import load_config
from alfb_dist.moe.parallelize import parallelize
from alfb_dist.training.estimate import estimate, remote_ranks
from alfb_dist.training.model import build_model

TEST_CONFIG = Path(__file__).parents[2] / "configs" / "test.toml"


@pytest.mark.parametrize(("num_experts", "top_k", "ep_degree"), [(4, 2, 2), (6, 3, 3), (8, 2, 4), (8, 8, 4), (4, 1, 1)])
def test_remote_ranks_is_the_mean_over_all_choices(num_experts: int, top_k: int, ep_degree: int) -> None:
    local = num_experts // ep_degree
    choices = list(combinations(range(num_experts), top_k))
    # Seen from rank 0: the other ranks that hold the chosen experts.
    mean = sum(len({e // local for e in chosen} - {0}) for chosen in choices) / len(choices)
    assert remote_ranks(num_experts, top_k, ep_degree) == pytest.approx(mean)


def test_parameters_are_those_of_the_built_model() -> None:
    config = load_config(TEST_CONFIG)
    model = build_model(config)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    sizes = estimate(config, 4)
    assert sizes.parameters == total
    assert sizes.active_parameters == total - experts + experts * 2 // 8
    assert sizes.rank_parameters == total - experts + experts // 2
    assert sizes.weight_bytes == 4 * sizes.rank_parameters
    parallelize(model, ep_degree=1)
    assert sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize(("stage", "gradients", "states"), [(0, 4, 8), (1, 4, 12), (2, 4, 12)])
def test_zero_divides_what_it_partitions(stage: int, gradients: int, states: int) -> None:
    overrides = [f"deepspeed.zero_optimization.stage={stage}"]
    config = load_config(TEST_CONFIG, overrides)
    sizes = estimate(config, 4)
    dense = 2 * sizes.rank_parameters - sizes.parameters  # EP 2: rank = dense + experts / 2
    experts_here = sizes.rank_parameters - dense
    share = dense / 4 + experts_here / 2 if stage else sizes.rank_parameters
    assert sizes.optimizer_bytes == pytest.approx(share * states, abs=16)
    assert sizes.gradient_bytes == pytest.approx((share if stage == 2 else sizes.rank_parameters) * gradients, abs=16)


def test_bytes_exchanged_grow_with_tokens_layers_and_width() -> None:
    config = load_config(TEST_CONFIG)  # 8 sequences of 32, hidden 32, 2 MoE layers, 8 experts top 2, EP 2
    mean = 1 * (1 - (4 * 3) / (8 * 7))
    assert estimate(config, 2).exchange_bytes == int(8 * 32 / 2 * 2 * mean * 32 * 4 * 4)
    assert estimate(load_config(TEST_CONFIG, ["parallel.ep_degree=1"]), 2).exchange_bytes == 0

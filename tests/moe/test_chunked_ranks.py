"""A limit on the rows of a rank: the same results, whatever the routing, and never more rows at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tiny import full_gradients, set_biases, tiny_batch, tiny_model
from torch import Tensor

from alfb_dist.engine.balancer import Balancer
from alfb_dist.moe import sharded_experts
from alfb_dist.moe.parallelize import parallelize

BOUND, WIDE = 12, 10_000


CASES = [(world, ep, hot) for world, ep in ((1, 1), (2, 2), (4, 2), (4, 4)) for hot in (False, True)]


def hot_model(hot: bool) -> Any:
    """Of 8 experts, the first four take every token if hot."""
    model = tiny_model(seed=3, attn_implementation="eager").double()
    bias_E = torch.tensor([9.0] * 4 + [0.0] * 4 if hot else [0.0] * 8)
    set_biases(model, bias_E.expand(2, 8))
    return model


def train(ep: int, hot: bool, max_rows: int) -> dict[str, Any]:
    """One training forward and backward, and an evaluation, of a batch whose size differs between ranks."""
    model = parallelize(hot_model(hot), ep_degree=ep, max_rows=max_rows)
    balancer, rank = Balancer(model), dist.get_rank()
    batch, seen, compute = tiny_batch(rank, 1 + rank, 14), [], sharded_experts.expert_mlp

    def spy(x_RD: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(len(x_RD))
        return compute(x_RD, *args, **options)

    sharded_experts.expert_mlp = spy
    loss = model(**batch).loss
    loss.backward()
    gradients = full_gradients(model)
    balancer.step()
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    sharded_experts.expert_mlp = compute
    return {
        "loss": loss.detach(),
        "logits": logits,
        "gradients": gradients,
        "load": balancer.load_LE,
        "rows": max(seen),
        "calls": len(seen),
    }


def all_settings() -> dict[tuple[int, bool, int], dict[str, Any]]:
    degrees = [ep for world, ep, _ in CASES if world == dist.get_world_size()]
    settings = [(ep, hot, rows) for ep in degrees for hot in (False, True) for rows in (0, BOUND)]
    return {setting: train(*setting) for setting in [*settings, (degrees[0], True, WIDE)]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
    return functools.cache(lambda world: run_ranks(world, all_settings, folder=tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize(("world", "ep", "hot"), CASES)
def test_chunks_give_the_same_loss_logits_gradients_and_loads(
    ranks: Callable[[int], list[Any]], world: int, ep: int, hot: bool
) -> None:
    for rank in ranks(world):
        free, bounded = rank[ep, hot, 0], rank[ep, hot, BOUND]
        torch.testing.assert_close(bounded["loss"], free["loss"], rtol=1e-13, atol=0)
        torch.testing.assert_close(bounded["logits"], free["logits"], rtol=1e-12, atol=1e-13)
        assert torch.equal(bounded["load"], free["load"])
        assert bounded["gradients"].keys() == free["gradients"].keys()
        for name, gradient in free["gradients"].items():
            torch.testing.assert_close(bounded["gradients"][name], gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("world", "ep", "hot"), CASES)
def test_no_rank_ever_has_more_rows_than_the_bound(
    ranks: Callable[[int], list[Any]], world: int, ep: int, hot: bool
) -> None:
    results = ranks(world)
    assert max(rank[ep, hot, 0]["rows"] for rank in results) > BOUND  # there is something to bound
    assert all(rank[ep, hot, BOUND]["rows"] <= BOUND for rank in results)
    assert len({rank[ep, hot, BOUND]["calls"] for rank in results[:ep]}) == 1  # the ranks of a group go in step


def test_nothing_is_computed_twice_where_all_rows_fit(ranks: Callable[[int], list[Any]]) -> None:
    assert [rank[2, True, WIDE]["calls"] for rank in ranks(2)] == [4, 4]  # two layers, trained and evaluated


def test_a_bound_below_one_row_a_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_rows must be 0 or at least ep_degree \(1\), got -1"):
        parallelize(tiny_model(), ep_degree=1, max_rows=-1)

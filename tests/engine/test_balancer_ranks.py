"""The Balancer: the same bias on every rank, whatever the EP degree, micro-batches, recompute or evaluation."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks
from support.tiny import (
    GROUP_LIMITED,
    biases,
    expert_parameters,
    gates,
    part,
    plain_step,
    random_biases,
    tiny_batch,
    tiny_model,
)
from torch import Tensor, nn

from alfb_dist.engine.balancer import Balancer
from alfb_dist.moe.parallelize import parallelize
from alfb_dist.moe.sharded_experts import sharded_experts

STEPS, RATE, LEARNING_RATE, TOP_K = 4, 0.05, 0.1, 4


# Training for some steps, against a plain loop over transformers' own model.


class Loop(NamedTuple):
    world: int
    ep: int
    micro_batches: int = 1
    checkpointing: bool | None = None  # use_reentrant
    evaluate: bool = False
    rule: str = "sign"
    group_limited: bool = False


LOOPS = [
    Loop(1, 1),
    Loop(1, 1, micro_batches=4, checkpointing=True, evaluate=True),
    Loop(2, 1),
    Loop(2, 2, micro_batches=2),
    Loop(2, 2, checkpointing=True, evaluate=True),
    Loop(4, 1),
    Loop(4, 2),
    Loop(4, 4),
    Loop(4, 1, micro_batches=2, checkpointing=True),
    Loop(4, 2, checkpointing=False, evaluate=True),
    Loop(4, 4, micro_batches=2, checkpointing=True, evaluate=True),
    Loop(2, 2, rule="proportional"),
    Loop(4, 2, micro_batches=2, rule="proportional"),
    Loop(2, 1, group_limited=True),
    Loop(4, 4, micro_batches=2, checkpointing=True, evaluate=True, group_limited=True),
]


def global_batch(step: int) -> dict[str, Tensor]:
    """Return 8 sequences of 6 positions, the last of which is padding: 40 tokens."""
    return tiny_batch(step, 8, 6, padding=[1] * 8)


TOKENS = 40


def start_model(group_limited: bool) -> nn.Module:
    model = tiny_model(3, **(GROUP_LIMITED if group_limited else {})).double()
    for gate, bias_E in zip(gates(model), random_biases(model, 4)):
        gate.e_score_correction_bias = bias_E
    return model


def averaged_step(model: nn.Module) -> None:
    """Take an SGD step on gradients averaged over ranks: dense ones over all, experts' over their expert-data group."""
    experts, grid = expert_parameters(model), sharded_experts(model)[0][1].grid
    dense = [p for p in model.parameters() if not any(p is e for e in experts)]
    with torch.no_grad():
        for parameters, group in ((dense, grid.world_group), (experts, grid.expert_data_group)):
            flat = torch.cat([p.grad.flatten() for p in parameters])
            dist.all_reduce(flat, group=group)
            for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
                p -= LEARNING_RATE * gradient.view_as(p) / dist.get_world_size()
                p.grad = None


def evaluate(model: nn.Module, step: int) -> None:
    model.eval()
    with torch.no_grad():
        model(**tiny_batch(100 + step, 2 + dist.get_rank(), 5))
    model.train()


def run_loop(loop: Loop) -> list[dict[str, Any]]:
    model = parallelize(start_model(loop.group_limited), ep_degree=loop.ep)
    if loop.checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": loop.checkpointing})
    balancer = Balancer(model, rate=RATE, rule=loop.rule, centered=loop.rule != "sign")
    seen = []
    for step in range(STEPS):
        mine = part(global_batch(step), dist.get_rank(), loop.world)
        for i in range(loop.micro_batches):
            (model(**part(mine, i, loop.micro_batches)).loss / loop.micro_batches).backward()
            if loop.evaluate:
                evaluate(model, step)
        averaged_step(model)
        assert balancer.step() is True
        assert balancer.num_steps == step + 1
        seen.append({"bias": balancer.bias_LE, "load": balancer.load_LE, "in the model": biases(model)})
    return seen


def run_loops() -> dict[Loop, list[dict[str, Any]]]:
    return {loop: run_loop(loop) for loop in LOOPS if loop.world == dist.get_world_size()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
    """Return trained(world), which runs `run_loops` once per world size and returns its results by rank."""
    return functools.cache(lambda world: run_ranks(world, run_loops, folder=tmp_path_factory.mktemp("ranks")))


@functools.cache
def plain_loop(rule: str, group_limited: bool) -> list[dict[str, Tensor]]:
    """Return the steps of a loop over transformers' own model and whole batches."""
    model = start_model(group_limited)
    return [plain_step(model, global_batch(i), learning_rate=LEARNING_RATE, rate=RATE, rule=rule) for i in range(STEPS)]


@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_bias_and_loads_equal_a_plain_loops_on_every_rank(loop: Loop, trained: Callable[[int], list[Any]]) -> None:
    expected = plain_loop(loop.rule, loop.group_limited)
    for by_loop in trained(loop.world):
        for step, seen in enumerate(by_loop[loop]):
            assert torch.equal(seen["load"], expected[step]["load"])
            assert torch.equal(seen["in the model"], seen["bias"])
            if loop.rule == "sign":
                assert torch.equal(seen["bias"].view(torch.int32), expected[step]["bias"].view(torch.int32))
            else:
                torch.testing.assert_close(seen["bias"], expected[step]["bias"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_bias_has_the_same_bits_on_every_rank_and_in_every_loop(rule: str, trained: Callable[[int], list[Any]]) -> None:
    seen = {
        loop: [by_loop[loop] for by_loop in trained(loop.world)]
        for loop in LOOPS
        if loop.rule == rule and not loop.group_limited
    }
    for step in range(STEPS):
        bits = {
            tuple(by_step[step]["bias"].view(torch.int32).flatten().tolist()) for r in seen.values() for by_step in r
        }
        assert len(bits) == 1


@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_loads_sum_to_unpadded_tokens_times_top_k(loop: Loop, trained: Callable[[int], list[Any]]) -> None:
    for by_loop in trained(loop.world):
        for seen in by_loop[loop]:
            assert seen["load"].dtype == torch.int64 and seen["bias"].dtype == torch.float32
            assert seen["load"].sum(1).tolist() == [TOKENS * TOP_K] * 2


def test_plain_loops_bias_differs_by_step_and_layer() -> None:
    """Otherwise the equalities above would show little."""
    for group_limited in (False, True):
        by_step = [seen["bias"] for seen in plain_loop("sign", group_limited)]
        assert all(not torch.equal(a, b) for a, b in itertools.pairwise(by_step))
        assert not torch.equal(by_step[-1][0], by_step[-1][1])

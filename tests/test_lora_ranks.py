"""peft's LoRA: what is adapted or frozen changes nothing about the count; which order works, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny import biases, expected_load, part, random_biases, set_biases, tiny_batch, tiny_model
from torch import Tensor, nn

import alfb_dist
from alfb_dist.engine import quiet, start_without_compiler

RATE = 0.05
ATTENTION: dict[str, Any] = {"target_modules": ["o_proj"]}
EXPERTS: dict[str, Any] = {
    "target_modules": ["o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}

# peft asks transformers by a name that goes away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def batch() -> dict[str, Tensor]:
    return tiny_batch(1, 4, 6, padding=[0, 2, 1, 3])


def start_model() -> nn.Module:
    model = tiny_model(3)
    set_biases(model, random_biases(model, 4))
    return model


def adapted(model: nn.Module, targets: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)  # of the adapters
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **targets)).train()


def built(order: str, targets: dict[str, Any]) -> nn.Module:
    model = start_model()
    if order == "parallelize, peft":
        alfb_dist.parallelize(model, ep_degree=1)
    model = adapted(model, targets)
    return alfb_dist.parallelize(model, ep_degree=1) if order == "peft, parallelize" else model


ORDERS = [
    ("peft", ATTENTION),
    ("peft", EXPERTS),
    ("peft, parallelize", ATTENTION),
    ("parallelize, peft", ATTENTION),
    ("parallelize, peft", EXPERTS),
]


@pytest.mark.parametrize(("order", "targets"), ORDERS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_count_move_and_gradients_are_those_of_plain_peft(order: str, targets: dict[str, Any]) -> None:
    plain = adapted(start_model(), targets)
    load_LE, before = expected_load(plain, batch()), biases(plain)
    plain(**batch()).loss.backward()
    model = built(order, targets)
    balancer = alfb_dist.Balancer(model, rate=RATE)
    model(**batch()).loss.backward()
    assert balancer.step()
    assert torch.equal(balancer.load_LE, load_LE) and load_LE.sum(1).tolist() == [18 * 4] * 2
    assert torch.equal(balancer.bias_LE, alfb_dist.update_bias(before, load_LE, rate=RATE))
    gradients = [[p.grad for p in m.parameters() if p.requires_grad] for m in (model, plain)]
    assert len(gradients[0]) == len(gradients[1]) == (6 if targets is ATTENTION else 14)
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_adapted_experts_are_sharded_first() -> None:
    with pytest.raises(ValueError, match="ParamWrapper"):
        built("peft, parallelize", EXPERTS)


def sharded() -> dict[str, Any]:
    start_without_compiler()
    quiet(40)
    seen: dict[str, Any] = {}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
    }
    mine = part(batch(), dist.get_rank(), 2)
    for order in ("peft, initialize", "parallelize, peft"):
        if order == "peft, initialize":
            engine, balancer = alfb_dist.initialize(adapted(start_model(), ATTENTION), config, ep_degree=2, rate=RATE)
        else:
            model = alfb_dist.parallelize(start_model(), ep_degree=2)
            engine = deepspeed.initialize(model=adapted(model, ATTENTION), config=config)[0]
            balancer = alfb_dist.Balancer(engine, rate=RATE)
        engine.backward(engine(**mine).loss)
        engine.step()
        seen[order] = balancer.step(), balancer.load_LE, balancer.bias_LE
    with pytest.raises(ValueError, match="adapters of experts need ep_degree 1, got 2"):
        alfb_dist.Balancer(adapted(alfb_dist.parallelize(start_model(), ep_degree=2), EXPERTS))
    zero = {**config, "zero_optimization": {"stage": 1}}
    with pytest.raises(ValueError, match="ZeRO stage 1 cannot train a model whose experts are all frozen"):
        alfb_dist.initialize(adapted(start_model(), ATTENTION), zero, ep_degree=2)
    return seen


def test_frozen_experts_over_two_ranks_count_as_in_one(ranks: Callable[..., list[Any]]) -> None:
    plain = adapted(start_model(), ATTENTION)
    load_LE, before = expected_load(plain, batch()), biases(plain)
    for seen in ranks(2, sharded):
        for acted, load, bias_LE in seen.values():
            assert acted and torch.equal(load, load_LE)
            assert torch.equal(bias_LE, alfb_dist.update_bias(before, load_LE, rate=RATE))

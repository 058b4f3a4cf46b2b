"""Every supported family on ranks: sharded, it is the model of one process, and its bias moves alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.by_hand import counted, moved, same_bits
from support.ranks import run_ranks
from support.tiny import full_gradients, full_weights, part
from support.tiny_families import FAMILIES, batch, expected_load, family_model, logits_weights_ids, set_biases
from torch import Tensor, nn

from alfb_dist import Balancer, initialize, parallelize, update_bias
from alfb_dist.engine.initialize import quiet
from alfb_dist.moe.families.blocks import moe_blocks

RATE = 0.01
FOUR = ["afmoe", "deepseek_v4", "ernie4_5_moe", "inkling_text", "longcat_flash", "mixtral", "nemotron_h"]
FOUR += ["gpt_oss", "llama4_text"]
"""Families of unusual structure, which also run on four ranks, where some get no token at all."""


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest value expected (at least 1e-3)."""
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-3))


def gradient_difference(model: nn.Module, plain: nn.Module, world: int) -> tuple[float, str]:
    """The largest difference of any parameter's gradient, and which it is."""
    reference = {n: p.grad for n, p in plain.named_parameters()}
    for n, p in model.named_parameters():
        if p.grad is None:  # not used by the family either
            assert reference[n] is None or not reference[n].any(), n
            p.grad = torch.zeros_like(p)
    found = [(0.0, "")]
    for n, g in full_gradients(model).items():
        theirs = torch.zeros_like(g) if reference[n] is None else reference[n]
        found.append((difference(g / world, theirs[: len(g)]), n))
    return max(found)


def top_k_of(model: Any) -> int:
    """The number of experts of each token."""
    names = ("top_k_experts", "num_experts_per_tok")
    return next(top_k for name in names if (top_k := getattr(model.config, name, 0)))


def one_family(family: str, ep: int, last: float) -> dict[str, Any]:
    """Differences between training on this rank's part of a batch and one process that trains on all of it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    plain, model = family_model(family), family_model(family)
    set_biases(plain, 0, last=last), set_biases(model, 0, last=last)
    parallelize(model, ep_degree=ep)
    balancer, whole = Balancer(model, rate=RATE), batch(1)
    before_LE = balancer.bias_LE
    expected, got = plain(**whole), model(**part(whole, rank, world))
    expected.loss.backward(), got.loss.backward()
    balancer.step()
    load_LE, loss = expected_load(plain, whole), got.loss.detach().clone()
    dist.all_reduce(loss)
    worst, name = gradient_difference(model, plain, world)
    return {
        "logits": difference(got.logits.detach(), expected.logits.detach().chunk(world)[rank]),
        "loss": abs(float(loss / world - expected.loss)),
        "gradient": worst,
        "gradient of": name,
        "load": torch.equal(balancer.load_LE, load_LE),
        "slots": set(balancer.load_LE.sum(1).tolist()) == {whole["input_ids"].numel() * top_k_of(plain)},
        "moved": not torch.equal(balancer.bias_LE, before_LE),
        "rule": torch.equal(balancer.bias_LE, update_bias(before_LE, load_LE, rate=RATE)),
        "bias": balancer.bias_LE.tolist(),
    }


def families_on_ranks(families: list[str], ep: int, last: float) -> dict[str, dict[str, Any]]:
    return {family: one_family(family, ep, last) for family in families}


@pytest.fixture(scope="module")
def by_case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    cases = {"EP 2": (2, list(FAMILIES), 0.0), "EP 4, half the experts idle": (4, FOUR, -100.0)}
    return {
        name: run_ranks(ep, families_on_ranks, families, ep, last, folder=tmp_path_factory.mktemp("ranks"))
        for name, (ep, families, last) in cases.items()
    }


CASES = [("EP 2", f) for f in FAMILIES] + [("EP 4, half the experts idle", f) for f in FOUR]


@pytest.mark.parametrize(("case", "family"), CASES)
def test_sharded_family_equals_one_process(by_case: dict[str, list[dict[str, Any]]], case: str, family: str) -> None:
    for result in by_case[case]:
        seen = result[family]
        assert seen["logits"] < 1e-4 and seen["loss"] < 1e-5, seen
        assert seen["gradient"] < 1e-3, seen


@pytest.mark.parametrize(("case", "family"), CASES)
def test_bias_moves_by_the_rule_and_alike_on_all_ranks(
    by_case: dict[str, list[dict[str, Any]]], case: str, family: str
) -> None:
    laws = ("load", "slots", "rule", "moved")
    assert all(result[family][law] for result in by_case[case] for law in laws)
    assert all(result[family]["bias"] == by_case[case][0][family]["bias"] for result in by_case[case])


UNDER_DEEPSPEED = [
    "deepseek_v4",
    "ernie4_5_moe",
    "gpt_oss",
    "hy_v3",
    "longcat_flash",
    "llama4_text",
    "mixtral",
    "nemotron_h",
]
SETTINGS = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}


def trained_by_deepspeed(family: str) -> dict[str, Any]:
    """Differences between two steps of DeepSpeed's engine on sharded experts and of a plain loop in one process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    plain, model = family_model(family), family_model(family)
    set_biases(plain, 0), set_biases(model, 0)
    engine, balancer = initialize(model, SETTINGS, ep_degree=world, rate=0.0)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        engine.backward(engine(**part(batch(step), rank, world)).loss)
        engine.step()
        balancer.step()
        plain(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    reference = dict(plain.named_parameters())
    seen = {n: difference(w, reference[n].detach()[: len(w)]) for n, w in full_weights(model).items()}
    worst = max(seen, key=lambda n: seen[n])
    return {"weights": seen[worst], "of": worst, "rule": moves_by_the_rule(engine, balancer)}


def moves_by_the_rule(engine: Any, balancer: Balancer) -> bool:
    """Whether one more step moves the biases by the outputs of all ranks' gates, counted one by one."""
    chosen: list[Tensor] = []
    for block in moe_blocks(engine.module):
        block.gate.register_forward_hook(lambda _, __, output: chosen.append(logits_weights_ids(output)[2]))
    balancer.rate, before_LE = RATE, balancer.bias_LE
    mine = part(batch(2), dist.get_rank(), dist.get_world_size())
    engine.backward(engine(**mine).loss)
    engine.step()
    balancer.step()
    every_token = torch.ones_like(mine["input_ids"])
    load_LE = torch.tensor([counted([ids], every_token, before_LE.shape[1]) for ids in chosen])
    dist.all_reduce(load_LE)
    expected = [moved(bias_E.numpy(), load, RATE) for bias_E, load in zip(before_LE, load_LE.tolist(), strict=True)]
    return all(same_bits(a, b) for a, b in zip(expected, balancer.bias_LE, strict=True))


def all_trained_by_deepspeed() -> dict[str, dict[str, Any]]:
    quiet()
    return {family: trained_by_deepspeed(family) for family in UNDER_DEEPSPEED}


def test_engine_trains_unusual_families_as_a_plain_loop_does(ranks: Callable[..., list[Any]]) -> None:
    for result in ranks(2, all_trained_by_deepspeed):
        for family, seen in result.items():
            assert seen["weights"] < 1e-3 and seen["rule"], (family, seen)

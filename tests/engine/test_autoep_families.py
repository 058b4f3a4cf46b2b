"""DeepSpeed's AutoEP with a Balancer, over the families that AutoEP computes as transformers does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.autoep_families import PRESETS, converted
from support.by_hand import counted, moved, same_bits
from support.tiny_families import batch, biases, family_model, set_biases
from test_autoep_ranks import autoep_engine
from torch import Tensor, nn

from alfb_dist import Balancer
from alfb_dist.moe.gate import BalancedGate

RATE, STEPS, SEQUENCES, POSITIONS = 0.03, 2, 4, 6
CASES = [("glm4_moe", 1), ("qwen3_moe", 2), ("qwen3_next", 1)]
"""(family, ZeRO stage): a bias and groups; no bias; no bias and a shared expert with a gate."""


def routers(model: nn.Module) -> list[Any]:
    return [m.router for m in model.modules() if type(m).__name__ == "AutoEPMoELayer"]


def record_choices(model: nn.Module) -> list[list[Tensor]]:
    """Return, for each router, a list that collects its expert ids in training forwards."""
    chosen: list[list[Tensor]] = []
    for router in routers(model):
        ids: list[Tensor] = []
        chosen.append(ids)
        router.register_forward_hook(
            lambda m, _, out, ids=ids: ids.append(out[1]) if m.training and torch.is_grad_enabled() else None
        )
    return chosen


def data(seed: int) -> dict[str, Tensor]:
    """Return a batch of which every second sequence ends in two positions of padding."""
    given = batch(seed, SEQUENCES, POSITIONS)
    mask_BS = torch.ones(SEQUENCES, POSITIONS, dtype=torch.int64)
    mask_BS[::2, -2:] = 0
    return given | {"attention_mask": mask_BS, "labels": given["labels"].masked_fill(mask_BS == 0, -100)}


def set_router_biases(model: nn.Module, seed: int) -> list[Any]:
    """Set the routers' biases to random values and return these as arrays."""
    generator = torch.Generator().manual_seed(seed)
    found = [router.e_score_correction_bias for router in routers(model)]
    for bias_E in found:
        bias_E.copy_(torch.rand(bias_E.shape, generator=generator) * 0.2)
    return [bias_E.numpy().copy() for bias_E in found]


@pytest.mark.parametrize("family", PRESETS)
def test_bias_chooses_counts_and_moves_in_autoeps_layer(family: str) -> None:
    model: Any = family_model(family, 3).eval()
    set_biases(model, 4)
    given = data(5)
    with torch.no_grad():
        expected = model(**given).logits
        converted(model, preset_model=PRESETS[family])
        balancer = Balancer(model.train(), rate=RATE)
        assert torch.allclose(model(**given).logits, expected, rtol=1e-4, atol=1e-5)
    assert any(bool(bias.any()) for bias in balancer.bias_LE) == bool(biases(family_model(family, 3)))
    start, chosen = set_router_biases(model, 6), record_choices(model)
    model(**given).loss.backward()
    balancer.step()
    loads = [counted(ids, given["attention_mask"], 8) for ids in chosen]
    assert balancer.load_LE.tolist() == loads and len(loads) == len(routers(model)) > 0
    for bias_E, load, router in zip(start, loads, routers(model), strict=True):
        assert same_bits(moved(bias_E, load, RATE), router.e_score_correction_bias)
        router.e_score_correction_bias[5] += 1000
    model(**given).loss.backward()
    assert all(bool((ids[-1] == 5).any(1).all()) for ids in chosen)


@pytest.mark.parametrize("family", ["glm4_moe", "olmoe"])
def test_bias_of_a_model_in_16_bits_is_float32_from_then_on(family: str) -> None:
    model = converted(family_model(family, 3).bfloat16(), preset_model=PRESETS[family])
    balancer = Balancer(model)
    assert {router.e_score_correction_bias.dtype for router in routers(model)} == {torch.float32}
    assert len(balancer.gates) == len(routers(model))


def test_family_whose_bias_autoep_drops_is_refused_by_name() -> None:
    model = converted(
        family_model("lfm2_moe", 3),
        moe_layer_pattern=r"model\.layers\.\d+\.feed_forward",
        num_experts_attr="num_experts",
        score_func="sigmoid",
    )
    with pytest.raises(ValueError, match=r"dropped the selection bias of Lfm2MoeForCausalLM \(expert_bias\)"):
        Balancer(model)
    assert not any(isinstance(m, BalancedGate) for m in model.modules())


def test_model_that_is_not_transformers_own_is_refused() -> None:
    model = converted(family_model("olmoe", 3), preset_model="mixtral")
    with pytest.raises(ValueError, match=r"dropped the selection bias of Sequential"):
        Balancer(nn.Sequential(model))


def train(family: str, stage: int) -> tuple[list[list[int]], list[Any], list[Any], list[list[int]]]:
    """Return the last step's loads, the first and last biases, and each step's loads on this rank, counted by hand."""
    model = family_model(family, 3)
    set_biases(model, 4)
    engine = autoep_engine(model, 2, stage, 2, preset_model=PRESETS[family])
    balancer = Balancer(engine, rate=RATE)
    start, chosen, by_step = set_router_biases(engine.module, 6), record_choices(engine.module), []
    for step in range(STEPS):
        for micro in range(2):
            mine = {n: x[2 * dist.get_rank() + micro :][:1] for n, x in data(step).items()}
            engine.backward(engine(**mine).loss)
            engine.step()
            balancer.step()
            engine.eval()
            with torch.no_grad():
                engine(**data(9))
            engine.train()
        mask_BS = data(step)["attention_mask"][2 * dist.get_rank() :][:2]
        by_step.append([counted(ids[-2:], mask_BS, 8) for ids in chosen])
    end = [router.e_score_correction_bias.numpy() for router in routers(engine.module)]
    return balancer.load_LE.tolist(), start, end, by_step


def train_all() -> dict[tuple[str, int], Any]:
    return {(family, stage): train(family, stage) for family, stage in CASES}


def test_bias_is_what_the_rule_makes_of_both_ranks_loads(ranks: Callable[..., list[Any]]) -> None:
    first, second = ranks(2, train_all)
    for case, (load, bias, end, by_step) in first.items():
        for mine, theirs in zip(by_step, second[case][3], strict=True):
            loads = [[a + b for a, b in zip(*both, strict=True)] for both in zip(mine, theirs, strict=True)]
            bias = [moved(b, n, RATE) for b, n in zip(bias, loads, strict=True)]
        assert load == second[case][0] == loads, case
        assert all(same_bits(a, b) and same_bits(a, c) for a, b, c in zip(bias, end, second[case][2], strict=True)), (
            case
        )

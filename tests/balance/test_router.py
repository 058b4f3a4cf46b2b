"""Routing against transformers' own gate (to the bit) and against sorted Python lists."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.tiny import tiny_config
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from alfb_dist.balance.router import RouterSpec, choose_experts, combine_weights, gate_scores

GATES: dict[str, dict[str, Any]] = {
    "plain": {"n_routed_experts": 16, "num_experts_per_tok": 4},
    "top 1": {"n_routed_experts": 8, "num_experts_per_tok": 1},
    "all experts": {"n_routed_experts": 8, "num_experts_per_tok": 8},
    "group limit": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2},
    "deepseek v3": {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4},
    "all groups": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 4},
    "not normalised": {"n_routed_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": False},
}
BIASES: dict[str, tuple[float, float]] = {
    "zero": (0.0, 0.0),
    "small": (-0.01, 0.01),
    "wide": (-0.5, 0.5),
    "negative scores": (-3.0, -1.5),
    "released": (5.0, 35.0),
}


def make_gate(seed: int, **overrides: Any) -> DeepseekV3TopkRouter:
    gate = DeepseekV3TopkRouter(tiny_config(**overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator) * 0.3)
    return gate


def spec_of(gate: DeepseekV3TopkRouter) -> RouterSpec:
    return RouterSpec(
        top_k=gate.top_k,
        num_groups=gate.num_group,
        group_limit=gate.topk_group,
        normalize=gate.norm_topk_prob,
        scaling=gate.routed_scaling_factor,
    )


def rand(seed: int, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias_name", BIASES)
@pytest.mark.parametrize("gate_name", GATES)
def test_routing_equals_transformers_to_the_bit(gate_name: str, bias_name: str) -> None:
    for seed in range(3):
        gate = make_gate(seed, **GATES[gate_name])
        spec = spec_of(gate)
        low, high = BIASES[bias_name]
        gate.e_score_correction_bias.copy_(rand(seed + 10, gate.num_experts, low=low, high=high))
        x_TD = torch.randn(50, gate.hidden_dim, generator=torch.Generator().manual_seed(seed + 20))
        logits_TE, weights_TK, ids_TK = gate(x_TD)
        scores_TE = gate_scores(nn.functional.linear(x_TD, gate.weight), spec)
        ours_TK = choose_experts(scores_TE, gate.e_score_correction_bias, spec)
        assert torch.equal(scores_TE, logits_TE.sigmoid())
        assert torch.equal(ours_TK, ids_TK)
        assert torch.equal(combine_weights(scores_TE, ours_TK, spec), weights_TK)


def slow_choice(scores: list[float], bias: list[float], spec: RouterSpec) -> set[int]:
    """By sorting: the best groups by the sum of their two best biased scores, then the best experts within them."""
    biased = [s + b for s, b in zip(scores, bias)]
    width = len(biased) // spec.num_groups
    groups = [range(g * width, (g + 1) * width) for g in range(spec.num_groups)]
    group_scores = [sum(sorted((biased[i] for i in group), reverse=True)[:2]) for group in groups]
    best = sorted(range(spec.num_groups), key=lambda g: -group_scores[g])[: spec.group_limit]
    allowed = [i for g in best for i in groups[g]] if spec.group_limit < spec.num_groups else range(len(biased))
    return set(sorted(allowed, key=lambda i: -biased[i])[: spec.top_k])


@pytest.mark.parametrize("bias_name", BIASES)
@pytest.mark.parametrize(
    "spec", [RouterSpec(4), RouterSpec(4, num_groups=4, group_limit=2), RouterSpec(2, num_groups=8)]
)
def test_choice_equals_sorting(spec: RouterSpec, bias_name: str) -> None:
    low, high = BIASES[bias_name]
    scores_TE, bias_E = rand(1, 80, 16), rand(2, 16, low=low, high=high)
    biased_TE = scores_TE + bias_E
    ids_TK = choose_experts(scores_TE, bias_E, spec)
    for biased_E, ids in zip(biased_TE.tolist(), ids_TK.tolist()):
        assert len(set(ids)) == spec.top_k
        assert set(ids) == slow_choice(biased_E, [0.0] * 16, spec)


def test_group_limit_of_negative_biased_scores_by_hand() -> None:
    """A mask of 0 instead of -inf would pick experts of the groups that lost, whose 0 beats every negative score."""
    spec = RouterSpec(top_k=2, num_groups=2, group_limit=1)
    scores_TE = torch.tensor([[0.5, 0.25, 0.75, 0.125]])
    bias_E = torch.tensor([-1.0, -1.0, -1.5, -1.5])  # -0.5, -0.75 against -0.75, -1.375
    assert sorted(choose_experts(scores_TE, bias_E, spec)[0].tolist()) == [0, 1]
    assert sorted(choose_experts(scores_TE, bias_E.flip(0), spec)[0].tolist()) == [2, 3]


@pytest.mark.parametrize("seed", range(3))
def test_experts_come_from_the_allowed_number_of_groups(seed: int) -> None:
    spec = RouterSpec(top_k=4, num_groups=4, group_limit=2)
    ids_TK = choose_experts(rand(seed, 200, 16), rand(seed + 1, 16, low=-4, high=-2), spec)
    assert all(len({i // 4 for i in ids}) <= 2 for ids in ids_TK.tolist())


def test_no_bias_is_a_bias_of_zero() -> None:
    for spec in (RouterSpec(4), RouterSpec(4, num_groups=4, group_limit=2)):
        scores_TE = rand(3, 60, 16)
        assert torch.equal(choose_experts(scores_TE, None, spec), choose_experts(scores_TE, torch.zeros(16), spec))


def test_higher_bias_wins_and_lower_bias_loses() -> None:
    scores_TE = torch.tensor([[0.5, 0.4, 0.3]])
    for bias, winner in [([0.0, 0.0, 0.0], 0), ([0.0, 0.2, 0.0], 1), ([0.0, 0.0, 0.3], 2), ([-0.2, 0.0, 0.0], 1)]:
        assert choose_experts(scores_TE, torch.tensor(bias), RouterSpec(1)).tolist() == [[winner]]


@pytest.mark.parametrize("constant", [-8.0, -1.0, 0.5, 16.0])
@pytest.mark.parametrize("spec", [RouterSpec(4), RouterSpec(4, num_groups=4, group_limit=2)])
def test_adding_a_constant_to_the_bias_changes_nothing(spec: RouterSpec, constant: float) -> None:
    """Scores and biases are multiples of 1/1024, so that every sum is exact; no two biased scores are equal."""
    generator = torch.Generator().manual_seed(4)
    scores_TE = torch.stack([torch.randperm(64, generator=generator)[:16] for _ in range(100)]) * 16 / 1024
    bias_E = torch.randperm(16, generator=generator) / 1024
    ids_TK = choose_experts(scores_TE, bias_E, spec)
    shifted_TK = choose_experts(scores_TE, bias_E + constant, spec)
    assert torch.equal(combine_weights(scores_TE, ids_TK, spec), combine_weights(scores_TE, shifted_TK, spec))
    assert torch.equal(ids_TK, shifted_TK)


@pytest.mark.parametrize("low", [0.0, -30.0, 2.0**20])
def test_weights_do_not_depend_on_the_bias_for_a_given_choice(low: float) -> None:
    """Also with a bias so large that (score + bias) - bias has no bit of the score left."""
    spec = RouterSpec(16, scaling=2.5)  # all 16 experts, so that the choice is given
    scores_TE = rand(5, 40, 16)
    ids_TK = choose_experts(scores_TE, low + rand(6, 16), spec)
    weights_TE = torch.zeros(40, 16).scatter(1, ids_TK, combine_weights(scores_TE, ids_TK, spec))
    torch.testing.assert_close(weights_TE, 2.5 * scores_TE / scores_TE.sum(1, keepdim=True), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("normalize", "scaling"), [*itertools.product([True, False], [1.0, 2.5])])
def test_weights_and_their_gradient_equal_the_formula_in_float64(normalize: bool, scaling: float) -> None:
    spec = RouterSpec(3, normalize=normalize, scaling=scaling)
    scores_TE = rand(7, 20, 8).double().requires_grad_()
    ids_TK = choose_experts(scores_TE.detach(), None, spec)
    weights_TK, gradient_TK = combine_weights(scores_TE, ids_TK, spec), torch.randn(20, 3, dtype=torch.float64)
    weights_TK.backward(gradient_TK)
    for t, (ids, weights) in enumerate(zip(ids_TK.tolist(), weights_TK.tolist())):
        chosen = [scores_TE[t, i].item() for i in ids]
        total = sum(chosen) if normalize else 1.0
        assert weights == pytest.approx([scaling * s / total for s in chosen], rel=1e-14)
        inner = sum(g * s for g, s in zip(gradient_TK[t].tolist(), chosen)) / total**2 if normalize else 0.0
        expected = torch.zeros(8, dtype=torch.float64)
        for i, g in zip(ids, gradient_TK[t].tolist()):
            expected[i] = scaling * (g / total - inner)
        torch.testing.assert_close(scores_TE.grad[t], expected, rtol=1e-12, atol=1e-14)


def test_scores_are_sigmoid_or_softmax() -> None:
    logits_TE = torch.tensor([[0.0, 1.0, -1.0]])
    e = torch.e
    assert gate_scores(logits_TE, RouterSpec(1)).tolist()[0] == pytest.approx([0.5, e / (e + 1), 1 / (e + 1)], rel=1e-6)
    total = 1 + e + 1 / e
    softmax = gate_scores(logits_TE, RouterSpec(1, score="softmax"))
    assert softmax.tolist()[0] == pytest.approx([1 / total, e / total, 1 / e / total], rel=1e-6)


def test_no_tokens_choose_nothing() -> None:
    for spec in (RouterSpec(4), RouterSpec(4, num_groups=4, group_limit=2)):
        scores_TE = torch.empty(0, 16)
        ids_TK = choose_experts(scores_TE, torch.zeros(16), spec)
        assert ids_TK.shape == combine_weights(scores_TE, ids_TK, spec).shape == (0, 4)
        assert ids_TK.dtype == torch.int64

"""A counted gate stays its family's: outputs, names, class, records and copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.tiny import (
    GROUP_LIMITED,
    TOP_K,
    biases,
    counted_model,
    expected_load,
    gates,
    pending,
    plain_model,
    random_biases,
    set_biases,
    tiny_batch,
    tiny_config,
    tiny_model,
    train_on,
)
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from alfb_dist.balance.router import RouterSpec
from alfb_dist.moe.batch import Batch
from alfb_dist.moe.families.probe import probe_router
from alfb_dist.moe.gate import AuxLosses, BalancedGate, balance_gate
from alfb_dist.moe.parallelize import parallelize, watch


def test_outputs_and_gradients_stay_the_same_to_the_bit() -> None:
    model, plain, batch = counted_model(7, **GROUP_LIMITED), plain_model(7, **GROUP_LIMITED), tiny_batch(7, 3, 7)
    ours, theirs = model(**batch), plain(**batch)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    ours.loss.backward(), theirs.loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters()):
        assert torch.equal(p.grad, q.grad), name


def test_state_dict_is_transformers() -> None:
    model, plain = counted_model(8), plain_model(8)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in theirs)
    fresh = tiny_model(9)
    watch(fresh)
    fresh.load_state_dict(theirs, strict=True)
    assert torch.equal(biases(fresh), biases(plain))


def test_parallelised_state_dict_has_transformers_names_and_shapes() -> None:
    ours = parallelize(tiny_model(8), ep_degree=1).state_dict()
    theirs = tiny_model(8).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_gate_is_still_an_instance_of_the_familys() -> None:
    gate = gates(counted_model())[0]
    assert isinstance(gate, DeepseekV3TopkRouter) and isinstance(gate, BalancedGate)
    assert type(gate).__name__ == "BalancedDeepseekV3TopkRouter"


def test_router_logits_are_still_recorded() -> None:
    model, plain, batch = parallelize(plain_model(9), ep_degree=1), plain_model(9), tiny_batch(9, 2, 5)
    ours = model(**batch, output_router_logits=True).router_logits
    theirs = plain(**batch, output_router_logits=True).router_logits
    assert len(ours) == len(theirs) == 2
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])  # behind experts that sum in another order


def test_watching_twice_counts_once() -> None:
    model, batch = counted_model(10), tiny_batch(10, 2, 5)
    classes = [type(g) for g in gates(model)]
    assert watch(model) == watch(model) == gates(model)
    assert [type(g) for g in gates(model)] == classes
    train_on(model, batch)
    assert torch.equal(pending(model), expected_load(plain_model(10), batch))


def test_aux_losses_cannot_be_added_to_a_watched_model() -> None:
    model = counted_model()
    with pytest.raises(ValueError, match="before a Balancer is made"):
        parallelize(model, ep_degree=1, sequence_loss_alpha=1e-4)


def test_model_without_gates_is_unchanged() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    assert watch(model) == []
    assert model(torch.ones(2, 3)).shape == (2, 3)


def test_copy_counts_for_itself() -> None:
    model = counted_model(11)
    train_on(model, tiny_batch(11, 2, 5, padding=[0, 2]))
    twin = copy.deepcopy(model)
    for gate in gates(twin):
        gate.pending_load_E = None
    batch = tiny_batch(12, 2, 5, padding=[4, 0])
    train_on(twin, batch)
    assert torch.equal(pending(twin), expected_load(plain_model(11), batch))  # its own padding, not the original's
    assert pending(model).sum(1).tolist() == [8 * TOP_K] * 2
    set_biases(twin, torch.ones(2, 8))
    assert torch.equal(biases(model), random_biases(model, 11))


class JitteredRouter(DeepseekV3TopkRouter):
    """A gate whose routing none of our specs describes: it prefers the experts that the family would like least."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, _, _ = super().forward(hidden_states)
        scores = logits.neg().sigmoid()
        ids = (scores + self.e_score_correction_bias).topk(self.top_k, dim=-1).indices
        return logits, scores.gather(1, ids), ids


@pytest.mark.parametrize("router", [DeepseekV3TopkRouter, JitteredRouter])
def test_gate_routes_as_its_family_whether_its_rule_is_known_or_not(router: type[DeepseekV3TopkRouter]) -> None:
    theirs, ours = router(tiny_config()), router(tiny_config())
    nn.init.normal_(theirs.weight, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(theirs.e_score_correction_bias, std=0.2, generator=torch.Generator().manual_seed(1))
    ours.load_state_dict(theirs.state_dict())
    balance_gate(ours, "e_score_correction_bias", Batch(), AuxLosses())
    assert (ours.spec is None) == (router is JitteredRouter)
    x_TD = torch.randn(30, 24, generator=torch.Generator().manual_seed(2))
    for expected, got in zip(theirs(x_TD), ours(x_TD)):
        assert torch.equal(expected, got)
    ours(x_TD)[1].sum().backward()
    assert torch.equal(ours.pending_load_E, torch.bincount(theirs(x_TD)[2].flatten(), minlength=8))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, RouterSpec(4, scaling=2.5)),
        (GROUP_LIMITED, RouterSpec(4, num_groups=4, group_limit=2, scaling=2.5)),
        ({"norm_topk_prob": False, "routed_scaling_factor": 1.0}, RouterSpec(4, normalize=False)),
    ],
    ids=["plain", "group limit", "not normalised"],
)
def test_spec_of_a_family_is_found_whatever_its_weights_are(overrides: dict[str, Any], expected: RouterSpec) -> None:
    """Also where all weights are still 0 and the biases equal, in which every rule gives the same choice."""
    gate = DeepseekV3TopkRouter(tiny_config(**overrides))
    assert probe_router(gate, "e_score_correction_bias").spec == expected
    assert not gate.weight.any() and not gate.e_score_correction_bias.any()


def test_finding_the_spec_leaves_the_random_state() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    watch(tiny_model())
    assert torch.equal(torch.get_rng_state(), before)

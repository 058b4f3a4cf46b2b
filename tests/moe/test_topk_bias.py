"""A bias inside a family's own top-k: it decides the choice and nothing else, and only if that is one top-k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alfb_dist.balance.router import RouterSpec
from alfb_dist.moe.batch import Batch
from alfb_dist.moe.families.probe import probe_router, probe_top_k
from alfb_dist.moe.gate import AuxLosses, balance_gate
from alfb_dist.moe.topk_bias import BiasedTopK, TopKSpec

SCORES = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
BIAS = torch.tensor([0.0, -0.4, 0.2, 0.0])
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "torch.topk": lambda x: torch.topk(x, 2),
    "method": lambda x: x.topk(2),
    "by name": lambda x: torch.topk(input=x, k=2, dim=1, largest=True, sorted=True),
    "negative dim": lambda x: x.topk(2, dim=-1),
}


@pytest.mark.parametrize("call", CALLS)
def test_choice_is_by_score_and_bias_and_the_values_are_unbiased(call: str) -> None:
    scores = SCORES.clone().requires_grad_()
    with BiasedTopK(BIAS, of_logits=False) as top_k:
        values, ids = CALLS[call](scores)
    assert ids.tolist() == [[0, 2], [2, 3]] and torch.equal(top_k.ids_TK, ids)
    assert values.tolist() == SCORES.gather(1, ids).tolist()
    values.sum().backward()
    assert scores.grad.tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]
    assert scores.topk(2).indices.tolist() == [[0, 1], [3, 2]]  # nothing is biased outside of the context


def test_logits_are_biased_by_their_softmax_and_returned_unbiased() -> None:
    logits = SCORES.log() + 3
    with BiasedTopK(BIAS, of_logits=True):
        values, ids = logits.topk(2)
    assert ids.tolist() == [[0, 2], [2, 3]] and torch.equal(values, logits.gather(1, ids))


def test_logits_in_16_bits_are_ranked_by_what_they_are_in_float32() -> None:
    """A softmax in 16 bits would round scores that differ to the same."""
    logits = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    with BiasedTopK(BIAS, of_logits=True):
        values, ids = logits.topk(2)
    expected = (logits.double().softmax(-1) + BIAS.double()).topk(2)[1]
    assert torch.equal(ids, expected) and values.dtype == torch.bfloat16
    rounded = (logits.softmax(-1) + BIAS).topk(2)[1]
    assert not torch.equal(rounded, expected)


OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "of another dimension": lambda x: x.T.topk(2, dim=0),
    "of fewer": lambda x: x[:, :3].topk(2),
    "of the smallest": lambda x: x.topk(2, largest=False),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_top_ks_are_unchanged_and_counted(other: str) -> None:
    with BiasedTopK(BIAS, of_logits=False) as top_k:
        got = OTHERS[other](SCORES)
    assert torch.equal(got[1], OTHERS[other](SCORES)[1])
    assert top_k.num_calls == 1 and top_k.ids_TK is None


class Gate(nn.Module):
    """A gate of 8 experts on 6 dimensions, with a bias of its logits that is 0 in a new model."""

    def __init__(self, weigh: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight, self.logit_bias = nn.Parameter(torch.zeros(8, 6)), nn.Parameter(torch.zeros(8))
        self.num_experts, self.top_k, self.weigh = 8, 2, weigh

    def forward(self, hidden_states: Tensor) -> Any:
        return self.weigh(nn.functional.linear(hidden_states.float(), self.weight.float(), self.logit_bias.float()))


def of_probabilities(logits: Tensor) -> Any:
    weights, ids = logits.softmax(-1).topk(2)
    return logits, weights, ids


def of_logits(logits: Tensor) -> Any:
    values, ids = logits.topk(2)
    return logits, values.softmax(-1), ids


def of_one(logits: Tensor) -> Any:
    values, ids = logits.topk(1)
    return logits, values.softmax(-1), ids  # 1, whichever it is


def dense(logits: Tensor) -> Any:
    values, ids = logits.topk(2)
    return torch.zeros_like(logits).scatter(1, ids, values.sigmoid()), logits


def in_two_steps(logits: Tensor) -> Any:
    best = logits.topk(4)[1]
    return of_probabilities(logits.scatter(1, best, logits.gather(1, best) + 1))


def at_random(logits: Tensor) -> Any:
    ids = logits.argsort(-1)[:, :2]
    return logits, logits.gather(1, ids), ids


def of_fewer(logits: Tensor) -> Any:
    weights, ids = logits[:, :7].softmax(-1).topk(2)
    return logits, weights, ids


def over_tokens(logits: Tensor) -> Any:
    weights, ids = logits.softmax(-1).topk(2, dim=0)
    return logits, weights, ids


def all_outputs(logits: Tensor) -> Any:
    weights, ids = logits.softmax(-1).topk(2)
    return logits.scatter(1, ids, 0.0), weights, ids


FORMS = [
    (of_probabilities, TopKSpec(False, 1)),
    (of_logits, TopKSpec(True, 1)),
    (dense, TopKSpec(True, 0)),
    (of_one, TopKSpec(True, 1)),
]
FORMS += [(weigh, None) for weigh in (in_two_steps, at_random, of_fewer, over_tokens, all_outputs)]


@pytest.mark.parametrize(("weigh", "expected"), FORMS)
def test_probe_finds_how_a_gate_chooses(weigh: Callable[[Tensor], Any], expected: TopKSpec | None) -> None:
    assert probe_top_k(Gate(weigh)) == expected


@pytest.mark.parametrize(("weigh", "expected"), FORMS)
def test_gate_gets_a_bias_or_is_refused_and_unchanged(weigh: Callable[[Tensor], Any], expected: Any) -> None:
    gate = Gate(weigh)
    if expected is None:
        with pytest.raises(ValueError, match="Gate has no selection bias and cannot get one: it does"):
            balance_gate(gate, "selection_bias", Batch(), AuxLosses())
        assert type(gate) is Gate and "selection_bias" not in gate.state_dict()
        return
    balance_gate(gate, "selection_bias", Batch(), AuxLosses())
    gate.bias_E[5] = 2.0
    output = gate(torch.zeros(3, 6))
    assert isinstance(gate, Gate) and (output[expected.weights_at] > 0).any()
    output[expected.weights_at].sum().backward()
    assert gate.pending_load_E.tolist()[5] == 3 and gate.pending_load_E.sum() == (3 if weigh is of_one else 6)


@pytest.mark.parametrize("with_bias", [False, True])
def test_our_routing_does_not_replace_a_gate_with_a_term_that_is_0_in_a_new_model(with_bias: bool) -> None:
    gate = Gate(of_probabilities)
    if not with_bias:
        del gate.logit_bias
        gate.logit_bias = torch.zeros(8)  # neither parameter nor buffer: it stays 0
    spec, exact = probe_router(gate, "selection_bias")
    assert spec == RouterSpec(2, "softmax", normalize=False, descending=spec.descending) and exact is not with_bias

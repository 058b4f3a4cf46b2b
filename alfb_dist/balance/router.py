"""From router logits to chosen experts and their weights. Pure functions; the arithmetic equals transformers' gates bit
for bit, in float32.

The bias takes part in the choice only. Weights come from the unbiased scores: never from (biased score - bias), which
rounds to 0 for a large bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class RouterSpec:
    """A rule that turns logits into choices and weights."""

    top_k: int
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    num_groups: int = 1
    group_limit: int = 1
    """A token's experts come from this many of `num_groups` groups (DeepSeek-V3: 4 of 8)."""
    normalize: bool = True
    scaling: float = 1.0
    descending: bool = False
    """Whether a token's experts are ordered by their biased scores, the best first."""


def float32_logits(hidden_states: Tensor, weight_ED: Tensor) -> Tensor:
    """Return the logits of tokens in any shape and type, computed in float32: (T, E)."""
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    return functional.linear(x_TD.to(torch.float32), weight_ED.to(torch.float32))


def gate_scores(logits_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Return the scores s of each token and expert, before any bias: (T, E)."""
    return logits_TE.sigmoid() if spec.score == "sigmoid" else logits_TE.softmax(-1)


def choose_experts(scores_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> Tensor:
    """Return the top-k experts of score + bias: (T, K) int64.

    With a group limit, only the groups with the largest sums of their two best biased scores take part; the others are
    masked with -inf, since 0 would beat negative biased scores. Source: arXiv:2412.19437, section 2.1.2.
    """
    biased_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if spec.group_limit < spec.num_groups:
        biased_TGe = biased_TE.unflatten(-1, (spec.num_groups, -1))
        group_score_TG = biased_TGe.topk(2, dim=-1)[0].sum(-1)
        chosen_TG = group_score_TG.topk(spec.group_limit, dim=-1, sorted=False)[1]
        masked_TG = torch.ones_like(group_score_TG, dtype=torch.bool).scatter_(-1, chosen_TG, False)
        biased_TE = biased_TGe.masked_fill(masked_TG.unsqueeze(-1), float("-inf")).flatten(-2)
    return biased_TE.topk(spec.top_k, dim=-1, sorted=spec.descending)[1]


def combine_weights(scores_TE: Tensor, expert_ids_TK: Tensor, spec: RouterSpec) -> Tensor:
    """Return the weights of the chosen experts, from the unbiased scores: (T, K); differentiable in the scores."""
    weights_TK = scores_TE.gather(-1, expert_ids_TK)
    if spec.normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return weights_TK * spec.scaling


def weights_and_ids(logits_TE: Tensor, bias_E: Tensor | None, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Return the combine weights and the ids of the experts that score + bias chooses, (T, K) each."""
    scores_TE = gate_scores(logits_TE, spec)
    ids_TK = choose_experts(scores_TE.detach(), bias_E, spec)
    return combine_weights(scores_TE, ids_TK, spec), ids_TK

"""How a gate routes: chosen once, when it is made to count, and then called in each forward.

A router is a callable kept on the gate. It takes the gate and the forward's arguments, and returns a `Routing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from alfb_dist import cpu
from alfb_dist.balance.router import RouterSpec, float32_logits, weights_and_ids
from alfb_dist.moe.families.probe import probe_top_k
from alfb_dist.moe.topk_bias import BiasedTopK, TopKSpec


class Routing(NamedTuple):
    """The result of a gate's forward."""

    output: tuple[Any, ...]  # what the family's forward returns
    logits_TE: Tensor | None  # of a gate with a known rule
    weights: Tensor  # (T, K), or (T, E) with 0 for experts that were not chosen
    ids_TK: Tensor  # int64
    weights_at: int  # position of the weights in the output


class Router(Protocol):
    """A way to route the tokens of a gate."""

    def __call__(self, gate: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Routing:
        """Route the tokens with the gate's parameters and bias."""


@dataclass(frozen=True)
class SpecRouter:
    """Routes by balance/router.py, for gates whose own forward gives the same bits."""

    spec: RouterSpec

    def __call__(self, gate: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Routing:
        """Route by the rule; other arguments than the tokens (a bias that the block passes) are the gate's already."""
        logits_TE = gate_logits(hidden_states, gate.get_parameter(gate.weight_name))
        weights_TK, ids_TK = weights_and_ids(logits_TE, gate.bias_E, self.spec)
        return Routing((logits_TE, weights_TK, ids_TK), logits_TE, weights_TK, ids_TK, 1)


class FamilyRouter:
    """Routes by the forward of a family whose gates have a selection bias."""

    def __call__(self, gate: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Routing:
        """Route by the family's forward, which returns (logits, weights, ids, ...)."""
        output = gate.family_forward(hidden_states, *args, **kwargs)
        logits_TE, weights_TK, ids_TK, *_ = output
        return Routing(output, logits_TE, weights_TK, ids_TK, 1)


@dataclass(frozen=True)
class BiasedFamilyRouter:
    """Routes by the forward of a family without a selection bias, with ours inside its top-k."""

    spec: TopKSpec

    def __call__(self, gate: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Routing:
        """Route by the family's forward with a biased top-k."""
        with BiasedTopK(gate.bias_E, of_logits=self.spec.of_logits) as top_k:
            output = gate.family_forward(hidden_states, *args, **kwargs)
        assert top_k.ids_TK is not None
        at = self.spec.weights_at
        return Routing(output, output[0], output[at], top_k.ids_TK, at)


def choose_router(gate: Any, bias_name: str, holder: nn.Module, exact: RouterSpec | None) -> Router:
    """Return the router for a family's gate.

    exact: the rule that gives the outputs of the family's forward bit for bit, if there is one.
    Raises ValueError if the gate has no bias and its forward does not choose by one top-k over its experts.
    """
    if exact is not None:
        return SpecRouter(exact)
    if getattr(holder, bias_name, None) is not None:
        return FamilyRouter()
    top_k = probe_top_k(gate)
    if top_k is None:
        raise ValueError(
            f"{type(gate).__name__} has no selection bias and cannot get one: it does not choose by one top-k over its "
            "experts that decides its weights"
        )
    return BiasedFamilyRouter(top_k)


def gate_logits(hidden_states: Tensor, weight_ED: Tensor) -> Tensor:
    """Return `float32_logits`, to the bit, with a compiled backward where there is one: (T, E)."""
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits_TE = cpu.gate_logits(x_TD, weight_ED)
    return float32_logits(x_TD, weight_ED) if logits_TE is None else logits_TE

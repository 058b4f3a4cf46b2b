"""How a family's gate routes, found by trying the gate on random tokens, weights and biases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from alfb_dist.balance.router import RouterSpec, float32_logits, weights_and_ids
from alfb_dist.moe.families.blocks import num_choices, score_matrix
from alfb_dist.moe.families.experts import CPU, FAILURES
from alfb_dist.moe.topk_bias import BiasedTopK, TopKSpec


@dataclass(frozen=True)
class _Trial:
    """A gate's outputs for random tokens, with a random weight and bias."""

    x_TD: Tensor
    weight_ED: Tensor
    bias_E: Tensor | None
    outputs: tuple[Tensor, ...]

    def follows(self, spec: RouterSpec) -> bool:
        """Whether the weights and ids follow from the logits by this rule, bit for bit."""
        logits_TE, weights_TK, ids_TK, *_ = self.outputs
        ours_TK, our_ids_TK = weights_and_ids(logits_TE.float(), self.bias_E, spec)
        return _same(ours_TK.to(weights_TK.dtype), weights_TK) and _same(our_ids_TK, ids_TK)

    def equals(self, spec: RouterSpec) -> bool:
        """Whether our whole routing gives the same outputs, bit for bit and in the same types."""
        logits_TE = float32_logits(self.x_TD, self.weight_ED)
        ours = logits_TE, *weights_and_ids(logits_TE, self.bias_E, spec)
        return len(self.outputs) == 3 and all(_same(a, b) for a, b in zip(ours, self.outputs))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _random_state(gate: Any, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Return random positive values for all that the gate holds, of which much is 0 or 1 in a new model and would not
    show."""
    held = [(name, p, dtype) for name, p in gate.named_parameters()]
    held += [(name, b, b.dtype) for name, b in gate.named_buffers() if b.is_floating_point()]
    return {
        name: (torch.rand(x.shape, generator=generator, device=CPU) + 0.5).to(_device(x), kind)
        for name, x, kind in held
    }


def _device(x: Tensor) -> torch.device:
    return CPU if x.device.type == "meta" else x.device


def _random_case(
    gate: Any, name: str, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return random tokens, and random values for all that the gate holds; `name` is the matrix of the logits."""
    weight_ED = gate.get_parameter(name)
    device = _device(weight_ED)
    x_TD = torch.randn(64, weight_ED.shape[1], generator=generator, device=CPU).to(device, dtype)
    random_ED = torch.randn(weight_ED.shape, generator=generator, device=CPU) / weight_ED.shape[1] ** 0.5
    return x_TD, {**_random_state(gate, dtype, generator), name: random_ED.to(device, dtype)}


def _outputs(gate: Any, state: dict[str, Tensor], x_TD: Tensor, *given: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield the gate's outputs for the tokens, in each shape in which it takes them."""
    for x in (x_TD, x_TD.unflatten(0, (4, 16))):
        try:
            outputs = functional_call(gate, state, (x, *given))
        except FAILURES:
            continue
        if isinstance(outputs, tuple):
            yield outputs


def _try(gate: Any, bias_name: str, holder: nn.Module, dtype: torch.dtype, shift: float) -> _Trial | None:
    """Return a trial of the gate, or None if it takes or returns something unknown.

    shift: the middle of the biases; -2 makes all biased scores negative.
    """
    bias = getattr(holder, bias_name, None)
    name = score_matrix(gate, num_choices(gate, bias))
    if name is None:
        return None
    generator = torch.Generator(CPU).manual_seed(0)
    x_TD, state = _random_case(gate, name, dtype, generator)
    given = []
    if bias is not None:
        bias = (torch.randn(bias.shape, generator=generator, device=CPU) + shift).to(x_TD.device)
        prefixes = [prefix for prefix, module in gate.named_modules() if module is holder]
        if prefixes:
            state[f"{prefixes[0]}.{bias_name}".lstrip(".")] = bias
        else:  # the block holds the bias and passes it to the gate
            given.append(bias)
    for outputs in _outputs(gate, state, x_TD, *given):
        if len(outputs) >= 3 and outputs[2].shape[0] == 64:
            return _Trial(x_TD, state[name], bias, outputs)
    return None


@torch.no_grad()
def probe_top_k(gate: Any) -> TopKSpec | None:
    """Return how a gate without a bias chooses, or None unless it takes one top-k over its experts for each token and
    that decides one of its outputs."""
    name, num_experts = score_matrix(gate, num_choices(gate, None)), num_choices(gate, None)
    if name is None:
        return None
    generator = torch.Generator(CPU).manual_seed(0)
    x_TD, state = _random_case(gate, name, torch.float32, generator)
    bias_E = torch.randn(num_experts, generator=generator, device=CPU).to(x_TD.device) * 4
    seen = []
    for one_E in (bias_E * 0, bias_E):
        with BiasedTopK(one_E, of_logits=False) as top_k:
            outputs = next(_outputs(gate, state, x_TD), None)
        if outputs is None or top_k.num_calls != 1 or top_k.ids_TK is None or len(top_k.ids_TK) != len(x_TD):
            return None
        seen.append((outputs, top_k.ids_TK, top_k.ranked_TE))
    (plain, _, ranked_TE), (biased, ids_TK, _) = seen
    changed = {i for i, (a, b) in enumerate(zip(plain, biased)) if _differ(a, b)}
    # The weight of a single chosen expert may be 1 whichever it is.
    at = {1} if len(biased) > 2 and torch.equal(biased[2], ids_TK) else changed
    assert ranked_TE is not None
    of_logits = bool(ranked_TE.min() < 0 or ranked_TE.max() > 1)
    return TopKSpec(of_logits, *at) if len(at) == 1 and changed <= at else None


def _differ(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point() and not torch.equal(a, b)


def _specs(gate: Any) -> Iterator[RouterSpec]:
    """Yield the rules that the gate may follow, the likely ones first."""
    num_groups = getattr(gate, "num_group", None) or getattr(gate, "n_group", None) or 1
    group_limit = getattr(gate, "topk_group", None) or 1
    names = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
    scaling = next((value for name in names if (value := getattr(gate, name, None))), 1.0)
    for descending in (False, True):
        for score in ("sigmoid", "softmax"):
            for normalize in (True, False):
                yield RouterSpec(gate.top_k, score, num_groups, group_limit, normalize, scaling, descending)


class RouterProbe(NamedTuple):
    """What a probe of a gate found."""

    spec: RouterSpec | None  # the rule by which its logits become its weights and ids bit for bit, if it is one of ours
    exact: bool  # whether our whole routing, logits included, equals its forward in float32 and in bfloat16


@torch.no_grad()
def probe_router(gate: Any, bias_name: str, holder: nn.Module | None = None) -> RouterProbe:
    """Find the rule by which a gate routes. holder: the module with the bias, the gate unless given."""
    if not isinstance(getattr(gate, "top_k", None), int):
        return RouterProbe(None, False)
    holder = gate if holder is None else holder
    trials = [_try(gate, bias_name, holder, torch.float32, shift) for shift in (-0.5, -2.0)]
    wide = [trial for trial in trials if trial is not None]
    spec = next((spec for spec in _specs(gate) if all(trial.follows(spec) for trial in wide)), None) if wide else None
    if spec is None or not all(trial.equals(spec) for trial in wide):
        return RouterProbe(spec, False)
    narrow = _try(gate, bias_name, holder, torch.bfloat16, -0.5)
    return RouterProbe(spec, narrow is not None and narrow.equals(spec))

"""The rule that a family's gate follows, found by trying the gate on random tokens, weights and biases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from alfb_dist.balance.router import RouterSpec, float32_logits, weights_and_ids
from alfb_dist.moe.families.blocks import num_choices, score_matrix
from alfb_dist.moe.topk_bias import BiasedChoice, Choice

CPU = torch.device("cpu")
"""Where trials run, also while a model is built without memory."""


@dataclass(frozen=True)
class _Trial:
    """What a gate makes of random tokens, with a random weight and bias of the given type."""

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


def _others(gate: Any, like: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    """Random positive values for all that the gate holds, of which much is 0 or 1 in a new model and hardly shows."""
    held = [(name, p, like) for name, p in gate.named_parameters()]
    held += [(name, b, b.dtype) for name, b in gate.named_buffers() if b.is_floating_point()]
    return {
        name: (torch.rand(x.shape, generator=generator, device=CPU) + 0.5).to(_device(x), dtype)
        for name, x, dtype in held
    }


def _device(x: Tensor) -> torch.device:
    return CPU if x.device.type == "meta" else x.device


def _replaced(gate: Any, name: str, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Random tokens, and random values for all that the gate holds; `name` is the matrix that gives the logits."""
    weight_ED = gate.get_parameter(name)
    device = _device(weight_ED)
    x_TD = torch.randn(64, weight_ED.shape[1], generator=generator, device=CPU).to(device, dtype)
    random_ED = torch.randn(weight_ED.shape, generator=generator, device=CPU) / weight_ED.shape[1] ** 0.5
    return x_TD, {**_others(gate, dtype, generator), name: random_ED.to(device, dtype)}


def _called(gate: Any, replaced: dict[str, Tensor], x_TD: Tensor, *given: Tensor) -> Iterator[tuple[Any, ...]]:
    """What the gate makes of the tokens, in the shapes in which it takes them."""
    for x in (x_TD, x_TD.unflatten(0, (4, 16))):
        try:
            outputs = functional_call(gate, replaced, (x, *given))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            continue
        if isinstance(outputs, tuple):
            yield outputs


def _try(gate: Any, bias_name: str, holder: nn.Module, dtype: torch.dtype, shift: float) -> _Trial | None:
    """A trial of the gate, or None if it is called in another way than we know or returns other things.

    shift: the middle of the biases; -2 makes all biased scores negative.
    """
    bias = getattr(holder, bias_name, None)
    name = score_matrix(gate, num_choices(gate, bias))
    if name is None:
        return None
    generator = torch.Generator(CPU).manual_seed(0)
    x_TD, replaced = _replaced(gate, name, dtype, generator)
    given = []
    if bias is not None:
        bias = (torch.randn(bias.shape, generator=generator, device=CPU) + shift).to(x_TD.device)
        prefixes = [prefix for prefix, module in gate.named_modules() if module is holder]
        if prefixes:
            replaced[f"{prefixes[0]}.{bias_name}".lstrip(".")] = bias
        else:  # the block holds the bias and hands it to the gate
            given.append(bias)
    for outputs in _called(gate, replaced, x_TD, *given):
        if len(outputs) >= 3 and outputs[2].shape[0] == 64:
            return _Trial(x_TD, replaced[name], bias, outputs)
    return None


@torch.no_grad()
def find_choice(gate: Any) -> Choice | None:
    """How a gate without a bias chooses, or None unless it takes one top-k over its experts, for each token, and that
    decides one of its outputs."""
    name, num_experts = score_matrix(gate, num_choices(gate, None)), num_choices(gate, None)
    if name is None:
        return None
    generator = torch.Generator(CPU).manual_seed(0)
    x_TD, replaced = _replaced(gate, name, torch.float32, generator)
    bias_E = torch.randn(num_experts, generator=generator, device=CPU).to(x_TD.device) * 4
    seen = []
    for one_E in (bias_E * 0, bias_E):
        with BiasedChoice(one_E, of_logits=False) as choice:
            outputs = next(_called(gate, replaced, x_TD), None)
        if outputs is None or choice.num_calls != 1 or choice.ids_TK is None or len(choice.ids_TK) != len(x_TD):
            return None
        seen.append((outputs, choice.ids_TK, choice.ranked_TE))
    (plain, _, ranked_TE), (biased, ids_TK, _) = seen
    changed = {i for i, (a, b) in enumerate(zip(plain, biased)) if _differ(a, b)}
    # Weights of the one chosen expert may be 1 whichever it is.
    at = {1} if len(biased) > 2 and torch.equal(biased[2], ids_TK) else changed
    assert ranked_TE is not None
    return Choice(bool(ranked_TE.min() < 0 or ranked_TE.max() > 1), *at) if len(at) == 1 and changed <= at else None


def _differ(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point() and not torch.equal(a, b)


def _specs(gate: Any) -> Iterator[RouterSpec]:
    """The rules that the gate may follow, the likely ones first."""
    num_groups = getattr(gate, "num_group", None) or getattr(gate, "n_group", None) or 1
    group_limit = getattr(gate, "topk_group", None) or 1
    names = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
    scaling = next((value for name in names if (value := getattr(gate, name, None))), 1.0)
    for descending in (False, True):
        for score in ("sigmoid", "softmax"):
            for normalize in (True, False):
                yield RouterSpec(gate.top_k, score, num_groups, group_limit, normalize, scaling, descending)


@torch.no_grad()
def find_rule(gate: Any, bias_name: str, holder: nn.Module) -> tuple[RouterSpec | None, bool]:
    """The gate's rule, and whether our whole routing equals the gate's own in float32 and in bfloat16."""
    if not isinstance(getattr(gate, "top_k", None), int):
        return None, False
    trials = [_try(gate, bias_name, holder, torch.float32, shift) for shift in (-0.5, -2.0)]
    wide = [trial for trial in trials if trial is not None]
    spec = next((spec for spec in _specs(gate) if all(trial.follows(spec) for trial in wide)), None) if wide else None
    if spec is None or not all(trial.equals(spec) for trial in wide):
        return spec, False
    narrow = _try(gate, bias_name, holder, torch.bfloat16, -0.5)
    return spec, narrow is not None and narrow.equals(spec)


def find_spec(gate: nn.Module, bias_name: str, holder: nn.Module | None = None) -> RouterSpec | None:
    """The rule by which the gate's logits become its weights and ids bit for bit, or None if it is none of ours."""
    return find_rule(gate, bias_name, holder or gate)[0]

"""The gates, selection biases and experts of a transformers model, found by structure, not by family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from alfb_dist.moe.families.experts import count_experts

GATE_NAMES = ("gate", "router")
ADDED_BIAS = "selection_bias"
"""The name in the gate of a selection bias that the family does not have and gets here."""
BIAS_NAMES = ("e_score_correction_bias", "expert_bias", ADDED_BIAS)

UNSUPPORTED = {
    "dbrx": "its experts are rows of one matrix, and it chooses them outside of its router",
    "jetmoe": "its experts are in no module of their own, and its attention is a mixture of experts too",
    "phimoe": "in training it draws its experts at random (SparseMixer), so there is no choice that a bias could move",
    "zaya": "its bias (balancing_biases) has a class that skips the experts, and the gate's ids give it as expert 0",
}
"""The refused families of MoE language models, by transformers' model type, and the reason."""


def check_supported(model: nn.Module) -> None:
    """Raise ValueError if the model's family is unsupported."""
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family in UNSUPPORTED:
        raise ValueError(f"{type(model).__name__} ({family}) cannot be balanced: {UNSUPPORTED[family]}")


@dataclass(frozen=True)
class MoEBlock:
    """One MoE block of a model: the module that calls its gate, then its experts with the gate's choice."""

    name: str  # in model.named_modules()
    module: Any  # an nn.Module; Any, since what it holds depends on the family
    gate: Any
    holder: Any  # the module that has the selection bias: the gate, a part of it (ERNIE), or the block (MiniMax-M2)
    bias_name: str  # of the holder's selection bias
    num_experts: int  # with weights; experts without (LongCat) follow them in the bias

    @property
    def added(self) -> bool:
        """Whether the family has no selection bias of its own."""
        return self.bias_name == ADDED_BIAS


def score_matrix(gate: nn.Module, num_experts: int) -> str | None:
    """Return the name of the gate's only matrix with one row for each expert, which gives its logits; else None."""
    names = [name for name, p in gate.named_parameters() if p.dim() == 2 and p.shape[0] == num_experts]
    names = [name for name in names if name.rpartition(".")[2] not in BIAS_NAMES]
    return names[0] if len(names) == 1 else None


def num_choices(gate: Any, bias: Tensor | None) -> int:
    """Return the number of experts among which the gate chooses."""
    if bias is not None:
        return bias.numel()
    num_experts = getattr(gate, "num_experts", None)
    return num_experts if isinstance(num_experts, int) else next(p.shape[0] for p in gate.parameters() if p.dim() == 2)


def _gates(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(getattr(module, "experts", None), nn.Module):
        gates = (getattr(module, name, None) for name in GATE_NAMES)
        yield from (gate for gate in gates if isinstance(gate, nn.Module))


def _find_bias(module: nn.Module) -> tuple[nn.Module, nn.Module, str] | None:
    """Return the gate, the holder of its bias and the bias's name."""
    for gate in _gates(module):
        for holder in (gate, *gate.children(), module):
            for bias_name in BIAS_NAMES:
                if isinstance(getattr(holder, bias_name, None), Tensor):
                    return gate, holder, bias_name
    return None


def _find_plain_gate(module: nn.Module) -> tuple[nn.Module, nn.Module, str] | None:
    """Return the same for a gate without a bias that has a matrix with one row for each expert."""
    for gate in _gates(module):
        num_experts = count_experts(module.get_submodule("experts"))
        if score_matrix(gate, num_experts) is not None:
            return gate, gate, ADDED_BIAS
    return None


def moe_blocks(model: nn.Module) -> Iterator[MoEBlock]:
    """Yield every block of the model with experts and a gate with a selection bias, in the model's order.

    If no gate of the model has one, yield every block whose gate can get one: in a family that biases some of its
    layers, the others are meant to have none.
    """
    modules = list(model.named_modules())
    for find in (_find_bias, _find_plain_gate):
        found = [(name, module, find(module)) for name, module in modules]
        blocks = [(name, module, *parts) for name, module, parts in found if parts is not None]
        if blocks:
            for name, module, gate, holder, bias_name in blocks:
                yield MoEBlock(name, module, gate, holder, bias_name, count_experts(module.get_submodule("experts")))
            return

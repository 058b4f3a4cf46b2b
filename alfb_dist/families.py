"""Where a transformers model keeps its gates, selection biases and experts. Found by structure, not by family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

GATE_NAMES = ("gate", "router")
BIAS_NAMES = ("e_score_correction_bias", "expert_bias")


@dataclass(frozen=True)
class MoEBlock:
    """One MoE block of a model: the module that calls its gate, then its experts with the gate's choice."""

    name: str  # in model.named_modules()
    module: Any  # an nn.Module; Any, since what it holds depends on the family
    gate: Any
    bias_name: str  # of the gate's selection bias
    num_experts: int


def _find_gate(module: nn.Module) -> tuple[nn.Module, str] | None:
    for gate_name in GATE_NAMES:
        gate = getattr(module, gate_name, None)
        for bias_name in BIAS_NAMES:
            if isinstance(gate, nn.Module) and isinstance(getattr(gate, bias_name, None), Tensor):
                return gate, bias_name
    return None


def moe_blocks(model: nn.Module) -> Iterator[MoEBlock]:
    """Every block of the model with experts and a gate that carries a selection bias, in the model's order."""
    for name, module in model.named_modules():
        found = _find_gate(module) if isinstance(getattr(module, "experts", None), nn.Module) else None
        if found is not None:
            gate, bias_name = found
            yield MoEBlock(name, module, gate, bias_name, getattr(gate, bias_name).numel())


def is_fused(experts: nn.Module) -> bool:
    """Whether the experts are SwiGLU experts in transformers' fused form: (E, 2F, D) and (E, D, F), no biases."""
    gate_up, down = getattr(experts, "gate_up_proj", None), getattr(experts, "down_proj", None)
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor) and gate_up.dim() == down.dim() == 3):
        return False
    num_experts, double, width = gate_up.shape
    others = {name for name, _ in experts.named_parameters()} - {"gate_up_proj", "down_proj"}
    return not others and down.shape == (num_experts, width, double // 2) and callable(getattr(experts, "act_fn", None))

"""The slow, obvious form of the experts' compute, with which tests compare all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def is_silu(act: Any) -> bool:
    """Return whether the activation is a SiLU module of torch or transformers."""
    return type(act).__name__ in ("SiLU", "SiLUActivation")


def expert_mlp_reference(
    x_RD: Tensor, expert_ids_RK: Tensor, weights_RK: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, act: Activation
) -> Tensor:
    """Return what `expert_mlp` returns, expert by expert on all rows, through autograd only."""
    out_RD = x_RD * 0
    for expert, (gate_up_2FD, down_DF) in enumerate(zip(gate_up_e2FD, down_eDF)):
        gate_RF, up_RF = (x_RD @ gate_up_2FD.T).chunk(2, dim=-1)
        y_RD = (act(gate_RF) * up_RF) @ down_DF.T
        out_RD = out_RD + y_RD * (weights_RK * (expert_ids_RK == expert)).sum(-1, keepdim=True).to(y_RD.dtype)
    return out_RD

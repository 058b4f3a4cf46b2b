"""The computations between the grouped products, in plain torch: for devices without Triton, and to test its kernels.

Arithmetic is in float32 (float64 for float64) and rounded once, when a result is written. Unused places hold anything
and are never read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alfb_dist.moe.experts.slots import Slots


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gather_rows(x_RD: Tensor, slots: Slots) -> Tensor:
    """Return the row of each place: (S, D)."""
    return x_RD.index_select(0, slots.slot_S // slots.place_RK.shape[1])


def combine_rows(y_SD: Tensor, slots: Slots) -> Tensor:
    """Return for each row the sum over its filled slots, slot after slot: (R, D), in y's type."""
    total_RD = _wide(y_SD.new_zeros(slots.place_RK.shape[0], y_SD.shape[1]))
    for place_R in slots.place_RK.T:
        filled_R1 = (place_R >= 0)[:, None]
        total_RD += torch.where(filled_R1, y_SD[place_R.clamp_min(0)], 0) if len(y_SD) else 0
    return total_RD.to(y_SD.dtype)


def swiglu(gate_up_S2F: Tensor, weights_RK: Tensor, slots: Slots) -> Tensor:
    """Return silu(gate) * up * weight: (S, F)."""
    gate_SF, up_SF = _wide(gate_up_S2F).chunk(2, dim=-1)
    weight_S1 = weights_RK.flatten().index_select(0, slots.slot_S)[:, None].to(gate_SF.dtype)
    return (torch.nn.functional.silu(gate_SF) * up_SF * weight_S1).to(gate_up_S2F.dtype)


def swiglu_backward(
    gate_up_S2F: Tensor, grad_h_SF: Tensor, weights_RK: Tensor, slots: Slots
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (weight * h, dL/d(gate_up), dL/dweights) for h = silu(gate) * up and grad_h = dL/d(weight * h).

    dL/dweights: (R, K), 0 for empty slots.
    """
    gate_SF, up_SF = _wide(gate_up_S2F).chunk(2, dim=-1)
    grad_SF, slot_S = _wide(grad_h_SF), slots.slot_S.long()
    weight_S1 = weights_RK.flatten().index_select(0, slot_S)[:, None].to(gate_SF.dtype)
    sigmoid_SF = gate_SF.sigmoid()
    silu_SF = gate_SF * sigmoid_SF
    silu_slope_SF = sigmoid_SF * (1 + gate_SF * (1 - sigmoid_SF))
    h_SF, grad_w_SF = silu_SF * up_SF, grad_SF * weight_S1
    grad_gate_up_S2F = torch.cat([grad_w_SF * up_SF * silu_slope_SF, grad_w_SF * silu_SF], dim=-1)
    grad_weights_N = torch.zeros_like(weights_RK).flatten()
    in_use_S = torch.arange(len(slot_S), device=slot_S.device) < slots.ends_e[-1]
    grad_weights_N.scatter_(0, slot_S, torch.where(in_use_S, (grad_SF * h_SF).sum(-1), 0).to(weights_RK.dtype))
    narrow = gate_up_S2F.dtype
    return (h_SF * weight_S1).to(narrow), grad_gate_up_S2F.to(narrow), grad_weights_N.view_as(weights_RK)

"""The experts' compute on accelerators: grouped products, with one fused kernel between each two of them.

The host never waits for the device unless the products do (see grouped_gemm.py): sizes and offsets stay on it.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from alfb_dist.moe.experts import torch_kernels
from alfb_dist.moe.experts.grouped_gemm import MAX_GROUPS, grouped_mm, grouped_outer
from alfb_dist.moe.experts.reference import is_silu
from alfb_dist.moe.experts.slots import Slots, sort_slots

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def kernels(device_type: str) -> ModuleType:
    """Return the module of Triton kernels on a CUDA device with Triton, else the same functions in plain torch."""
    if device_type != "cuda":
        return torch_kernels
    try:
        from alfb_dist.moe.experts import triton_kernels
    except ImportError:
        return torch_kernels
    return triton_kernels


def supported(x_RD: Tensor, weights_RK: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, act: Any) -> bool:
    """Return whether `GroupedMLP` computes these: on a CUDA device, one of DTYPES, SiLU, fewer than 2^31 slots."""
    tensors = (x_RD, gate_up_e2FD, down_eDF)
    return (
        all(t.device.type == "cuda" and t.dtype == x_RD.dtype for t in tensors)
        and x_RD.dtype in DTYPES
        and is_silu(act)
        and weights_RK.numel() < 2**31
        and len(down_eDF) <= MAX_GROUPS
    )


class GroupedMLP(torch.autograd.Function):
    """`expert_mlp`; keeps its arguments and the first product for the backward, (S, 2F).

    The gathered rows and the activation are cheaper to recompute than to keep; the second product is not needed in the
    backward, since dL/dweight = (dy W_down) . h. The routing weight scales the narrower factor of the second product.
    Sums over slots are in the order of the slots, without atomic additions: two calls give the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weights_RK: Tensor,
        gate_up_e2FD: Tensor,
        down_eDF: Tensor,
        expert_ids_RK: Tensor,
        num_places: int | None = None,
    ) -> Tensor:
        x_RD, weights_RK = x_RD.contiguous(), weights_RK.contiguous()
        gate_up_e2FD, down_eDF = gate_up_e2FD.contiguous(), down_eDF.contiguous()
        slots, fused = sort_slots(expert_ids_RK, len(down_eDF), num_places), kernels(x_RD.device.type)
        gate_up_S2F = grouped_mm(fused.gather_rows(x_RD, slots), gate_up_e2FD.transpose(1, 2), slots.ends_e)
        h_SF = fused.swiglu(gate_up_S2F, weights_RK, slots)
        ctx.save_for_backward(x_RD, weights_RK, gate_up_e2FD, down_eDF, gate_up_S2F, *slots)
        return fused.combine_rows(grouped_mm(h_SF, down_eDF.transpose(1, 2), slots.ends_e), slots)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x_RD, weights_RK, gate_up_e2FD, down_eDF, gate_up_S2F, *kept = ctx.saved_tensors
        slots, fused = Slots(*kept), kernels(x_RD.device.type)
        needs_x, needs_weights, needs_gate_up, needs_down = ctx.needs_input_grad[:4]
        grad_x_RD = grad_gate_up_e2FD = grad_down_eDF = None
        grad_SD = fused.gather_rows(grads[0].contiguous(), slots)
        grad_h_SF = grouped_mm(grad_SD, down_eDF, slots.ends_e)
        h_SF, grad_S2F, grad_weights_RK = fused.swiglu_backward(gate_up_S2F, grad_h_SF, weights_RK, slots)
        del grad_h_SF
        if needs_down:
            grad_down_eDF = grouped_outer(grad_SD, h_SF, slots.ends_e)
        del grad_SD, h_SF
        if needs_gate_up:
            grad_gate_up_e2FD = grouped_outer(grad_S2F, fused.gather_rows(x_RD, slots), slots.ends_e)
        if needs_x:
            grad_x_RD = fused.combine_rows(grouped_mm(grad_S2F, gate_up_e2FD, slots.ends_e), slots)
        return grad_x_RD, grad_weights_RK if needs_weights else None, grad_gate_up_e2FD, grad_down_eDF, None, None

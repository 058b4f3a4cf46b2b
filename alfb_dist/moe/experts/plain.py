"""The experts' compute in plain torch, for any type, device and activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alfb_dist.moe.experts.reference import Activation, is_silu


def _act_backward(act: Activation, gate_SF: Tensor, up_SF: Tensor, grad_SF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (h, dL/dgate, dL/dup) for h = act(gate) * up."""
    if is_silu(act):
        a_SF = torch.nn.functional.silu(gate_SF)
        return a_SF * up_SF, torch.ops.aten.silu_backward(grad_SF * up_SF, gate_SF), grad_SF * a_SF
    with torch.enable_grad():
        gate_SF, up_SF = gate_SF.detach().requires_grad_(), up_SF.detach().requires_grad_()
        h_SF = act(gate_SF) * up_SF
    grad_gate_SF, grad_up_SF = torch.autograd.grad(h_SF, (gate_SF, up_SF), grad_SF)
    return h_SF.detach(), grad_gate_SF, grad_up_SF


class _PlainMLP(torch.autograd.Function):
    """Expert by expert: gather, product, activation, product, weight, scatter.

    Only the first product is kept for the backward; the gathered rows and the activation are cheaper to recompute. The
    second product is not needed there: dL/dweight = (dy W_down) . h.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        weight_S: Tensor,
        gate_up_e2FD: Tensor,
        down_eDF: Tensor,
        row_S: Tensor,
        sizes_e: list[int],
        act: Activation,
    ) -> Tensor:
        keep = any(ctx.needs_input_grad)
        out_RD = x_RD.new_zeros(x_RD.shape[0], down_eDF.shape[1], dtype=torch.promote_types(x_RD.dtype, torch.float32))
        gate_up_S2F = x_RD.new_empty(row_S.numel() if keep else 0, gate_up_e2FD.shape[1])
        start = 0
        for expert, size in enumerate(sizes_e):
            part, start = slice(start, start + size), start + size
            if size == 0:
                continue
            row_s, x_sD = row_S[part], x_RD.index_select(0, row_S[part])
            if keep:
                gate_up_s2F = torch.mm(x_sD, gate_up_e2FD[expert].T, out=gate_up_S2F[part])
            else:
                gate_up_s2F = x_sD @ gate_up_e2FD[expert].T
            gate_sF, up_sF = gate_up_s2F.chunk(2, dim=-1)
            h_sF = act(gate_sF) * up_sF
            # The weight scales the narrower factor of the second product.
            y_sD = (h_sF * weight_S[part, None].to(h_sF.dtype)) @ down_eDF[expert].T
            out_RD.index_add_(0, row_s, y_sD.to(out_RD.dtype))
        ctx.save_for_backward(x_RD, weight_S, gate_up_e2FD, down_eDF, row_S, gate_up_S2F)
        ctx.sizes_e, ctx.act = sizes_e, act
        return out_RD.to(x_RD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x_RD, weight_S, gate_up_e2FD, down_eDF, row_S, gate_up_S2F = ctx.saved_tensors
        grad_RD = grads[0]
        wide = torch.promote_types(x_RD.dtype, torch.float32)
        grad_x_RD = torch.zeros_like(x_RD, dtype=wide)
        grad_weight_S = torch.zeros_like(weight_S)
        grad_gate_up_e2FD, grad_down_eDF = torch.zeros_like(gate_up_e2FD), torch.zeros_like(down_eDF)
        start = 0
        for expert, size in enumerate(ctx.sizes_e):
            part, start = slice(start, start + size), start + size
            if size == 0:
                continue
            row_s, w_s1 = row_S[part], weight_S[part, None].to(x_RD.dtype)
            grad_sD = grad_RD.index_select(0, row_s)
            grad_h_sF = grad_sD @ down_eDF[expert]
            gate_sF, up_sF = gate_up_S2F[part].chunk(2, dim=-1)
            h_sF, grad_gate_sF, grad_up_sF = _act_backward(ctx.act, gate_sF, up_sF, grad_h_sF * w_s1)
            grad_weight_S[part] = (grad_h_sF * h_sF).sum(-1, dtype=wide)
            torch.mm(grad_sD.T, h_sF * w_s1, out=grad_down_eDF[expert])
            grad_gate_up_s2F = torch.cat([grad_gate_sF, grad_up_sF], dim=-1)
            torch.mm(grad_gate_up_s2F.T, x_RD.index_select(0, row_s), out=grad_gate_up_e2FD[expert])
            grad_x_RD.index_add_(0, row_s, (grad_gate_up_s2F @ gate_up_e2FD[expert]).to(wide))
        return grad_x_RD.to(x_RD.dtype), grad_weight_S, grad_gate_up_e2FD, grad_down_eDF, None, None, None


def plain_mlp(
    x_RD: Tensor, expert_ids_RK: Tensor, weights_RK: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, act: Activation
) -> Tensor:
    """Return what `expert_mlp` returns."""
    num_experts, top_k = gate_up_e2FD.shape[0], expert_ids_RK.shape[1]
    flat_ids = expert_ids_RK.flatten()
    sizes_e: list[int] = torch.bincount(flat_ids, minlength=num_experts + 1)[:num_experts].tolist()
    slot_S = flat_ids.argsort(stable=True)[: sum(sizes_e)]
    weight_S = weights_RK.flatten().index_select(0, slot_S)
    return _PlainMLP.apply(x_RD, weight_S, gate_up_e2FD, down_eDF, slot_S // top_k, sizes_e, act)

"""Shared experts, which compute every token, on a CPU in float32 (csrc/experts.c)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alfb_dist.cpu.allocator import allocate
from alfb_dist.cpu.experts import EXPERTS, PAD, PIECE_ROWS, computable, intercepted


class _SharedMLP(torch.autograd.Function):
    """Keeps gate(x) and up(x) for the backward, (R, 2F). The gradients of gate and up are the halves of one tensor."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        x_RD, *weights = (t.contiguous() for t in (x_RD, gate_FD, up_FD, down_DF))
        width_D, width_F = weights[2].shape
        piece = min(PIECE_ROWS, max(1, len(x_RD)))
        kept_R2F, out_RD = allocate((len(x_RD), 2 * width_F), x_RD), allocate(x_RD.shape, x_RD)
        scratch = allocate((piece * (width_F + PAD),), x_RD)
        ctx.shape = (len(x_RD), width_D, width_F, piece)
        EXPERTS.call("shared_forward", *ctx.shape, x_RD, *weights, kept_R2F, out_RD, scratch)
        ctx.save_for_backward(x_RD, *weights, kept_R2F)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x_RD, *_, down_DF, _ = tensors = ctx.saved_tensors
        _, width_D, width_F, piece = ctx.shape
        x_needs, gate_needs, up_needs, down_needs = ctx.needs_input_grad
        grad_x_RD = allocate(x_RD.shape, x_RD) if x_needs else None
        grad_gate_up_2FD = allocate((2 * width_F, width_D), x_RD) if gate_needs or up_needs else None
        grad_down_DF = allocate(down_DF.shape, x_RD) if down_needs else None
        scratch = allocate((piece * (4 * width_F + PAD),), x_RD)
        outputs = (grad_x_RD, grad_gate_up_2FD, grad_down_DF, scratch)
        EXPERTS.call("shared_backward", *ctx.shape, *tensors, grads[0].contiguous(), *outputs)
        halves = (None, None) if grad_gate_up_2FD is None else grad_gate_up_2FD.split(width_F)
        return grad_x_RD, *halves, grad_down_DF


def shared_mlp(x: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor | None:
    """Return down(silu(gate(x)) * up(x)) for x of (..., D), in its shape; differentiable.

    None unless all are float32 in memory and of these shapes, and torch neither traces nor casts.
    """
    if intercepted() or not computable(x, gate_FD, up_FD, down_DF):
        return None
    if not gate_FD.shape == up_FD.shape == down_DF.shape[::-1] or x.shape[-1] != gate_FD.shape[-1]:
        return None
    return _SharedMLP.apply(x.reshape(-1, x.shape[-1]), gate_FD, up_FD, down_DF).view(x.shape)

"""A gate's logits on a CPU in float32: torch's own product, whose backward is compiled (csrc/experts.c)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from alfb_dist.cpu.allocator import allocate
from alfb_dist.cpu.experts import EXPERTS, computable, intercepted


class _Logits(torch.autograd.Function):
    """The forward is torch's, since its bits decide which experts are chosen."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD.contiguous(), weight_ED.contiguous())
        return functional.linear(x_TD, weight_ED)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x_TD, weight_ED = ctx.saved_tensors
        x_needs, weight_needs = ctx.needs_input_grad
        grad_x_TD = allocate(x_TD.shape, x_TD) if x_needs else None
        grad_weight_ED = torch.empty_like(weight_ED) if weight_needs else None
        sizes = (len(x_TD), *weight_ED.shape)
        EXPERTS.call("linear_backward", *sizes, x_TD, weight_ED, grads[0].contiguous(), grad_x_TD, grad_weight_ED)
        return grad_x_TD, grad_weight_ED


def gate_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor | None:
    """Return x weight^T with the bits of torch's linear: (T, E); differentiable.

    None unless both are float32 in memory, and torch neither traces nor casts.
    """
    if intercepted() or not computable(x_TD, weight_ED):
        return None
    return _Logits.apply(x_TD, weight_ED)

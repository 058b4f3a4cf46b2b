"""SwiGLU experts on a CPU in float32 (csrc/experts.c)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alfb_dist.cpu.allocator import allocate
from alfb_dist.cpu.build import Library

PIECE_ROWS = 512
"""Rows of one expert that are computed together: enough to make packing a weight pay, few enough for the cache."""

PAD = 16
"""As in csrc/experts.c."""

EXPERTS = Library(
    "experts.c",
    {
        "sort_slots": (2, 3),
        "forward": (6, 9),
        "backward": (6, 13),
        "shared_forward": (4, 7),
        "shared_backward": (4, 10),
        "linear_backward": (3, 5),
    },
    returning=("sort_slots",),
)


def has_kernels() -> bool:
    """Return whether the experts' kernels are compiled and loaded, compiling them the first time."""
    return EXPERTS.available()


def computable(*tensors: Tensor) -> bool:
    """Return whether the kernels can read the tensors: float32 in this machine's memory, of no subclass that keeps its
    data elsewhere or only traces it."""
    plain = all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype == torch.float32 for t in tensors)
    return plain and EXPERTS.available()


def intercepted() -> bool:
    """Return whether torch traces, transforms or casts what runs, none of which works on a kernel."""
    transformed = torch._C._are_functorch_transforms_active()
    return transformed or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")


class _ExpertMLP(torch.autograd.Function):
    """Keeps the first product for the backward, (S, 2F)."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weights_RK: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor, expert_ids_RK: Tensor
    ) -> Tensor:
        x_RD, weights_RK, ids_RK = x_RD.contiguous(), weights_RK.contiguous(), expert_ids_RK.contiguous()
        gate_up_e2FD, down_eDF = gate_up_e2FD.contiguous(), down_eDF.contiguous()
        num_experts, width_D, width_F = down_eDF.shape
        sizes = torch.empty(num_experts + 1, dtype=torch.int64)
        slots = torch.empty(ids_RK.numel(), dtype=torch.int32)
        num_rows = EXPERTS.call("sort_slots", ids_RK.numel(), num_experts, ids_RK, sizes, slots)
        if num_rows < 0:
            raise IndexError(f"expert ids must be in [0, {num_experts}], got {ids_RK.min()} to {ids_RK.max()}")
        piece = min(PIECE_ROWS, max(1, num_rows))
        kept_S2F = allocate((num_rows, 2 * width_F), x_RD)
        out_RD = allocate(x_RD.shape, x_RD)
        scratch = allocate((piece * (width_D + width_F + 2 * PAD + 2),), x_RD)
        shape = (len(x_RD), num_experts, ids_RK.shape[1], width_D, width_F, piece)
        tensors = (sizes, slots, weights_RK, x_RD, gate_up_e2FD, down_eDF, kept_S2F)
        EXPERTS.call("forward", *shape, *tensors, out_RD, scratch)
        ctx.save_for_backward(*tensors)
        ctx.shape = shape
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        tensors = ctx.saved_tensors
        _, _, weights_RK, x_RD, gate_up_e2FD, down_eDF, _ = tensors
        *_, width_D, width_F, piece = ctx.shape
        needed = zip((x_RD, gate_up_e2FD, down_eDF), (ctx.needs_input_grad[i] for i in (0, 2, 3)))
        grad_x_RD, grad_gate_up_e2FD, grad_down_eDF = (allocate(t.shape, t) if need else None for t, need in needed)
        grad_weights_RK = torch.empty_like(weights_RK)
        scratch = allocate((piece * (width_D + 4 * width_F + 2 * PAD + 3),), x_RD)
        outputs = (grad_x_RD, grad_weights_RK, grad_gate_up_e2FD, grad_down_eDF, scratch)
        EXPERTS.call("backward", *ctx.shape, *tensors, grads[0].contiguous(), *outputs)
        return grad_x_RD, grad_weights_RK, grad_gate_up_e2FD, grad_down_eDF, None


def expert_mlp(
    x_RD: Tensor, expert_ids_RK: Tensor, weights_RK: Tensor, gate_up_e2FD: Tensor, down_eDF: Tensor
) -> Tensor | None:
    """Return for each row the sum over its slots of weight * down(silu(gate(x)) * up(x)): (R, D); differentiable.

    expert_ids_RK: int64 in [0, e]; e marks an empty slot. None unless all others are float32 in memory, with fewer than
    2^31 slots. Raises IndexError for other ids.
    """
    if not computable(x_RD, weights_RK, gate_up_e2FD, down_eDF) or weights_RK.numel() >= 2**31:
        return None
    return _ExpertMLP.apply(x_RD, weights_RK, gate_up_e2FD, down_eDF, expert_ids_RK)

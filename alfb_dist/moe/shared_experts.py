"""Shared experts, which every token visits, by the compiled kernels of the routed ones (csrc/experts.c)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from alfb_dist.cpu import allocator as arena
from alfb_dist.cpu import experts as native
from alfb_dist.moe.families.experts import CPU, FAILURES, activation

NAMES = ("shared_experts", "shared_expert", "shared_mlp")
WEIGHTS = ("gate_proj", "up_proj", "down_proj")


def shared_name(block: nn.Module) -> str | None:
    """The name of a block's shared experts, or None if it has none that are known."""
    return next((name for name in NAMES if isinstance(getattr(block, name, None), nn.Module)), None)


class SharedMLP(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) on float32 rows on a CPU; keeps gate(x) and up(x) for the backward, (R, 2F).

    The gradients of gate and up are the halves of one tensor.
    """

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> Tensor:
        x_RD, *weights = (t.contiguous() for t in (x_RD, gate_FD, up_FD, down_DF))
        width_D, width_F = weights[2].shape
        piece = min(native.PIECE_ROWS, max(1, len(x_RD)))
        kept_R2F, out_RD = arena.empty((len(x_RD), 2 * width_F), x_RD), arena.empty(x_RD.shape, x_RD)
        scratch = arena.empty((piece * (width_F + native.PAD),), x_RD)
        ctx.shape = (len(x_RD), width_D, width_F, piece)
        native.call("shared_forward", *ctx.shape, x_RD, *weights, kept_R2F, out_RD, scratch)
        ctx.save_for_backward(x_RD, *weights, kept_R2F)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x_RD, *_, down_DF, _ = tensors = ctx.saved_tensors
        _, width_D, width_F, piece = ctx.shape
        x_needs, gate_needs, up_needs, down_needs = ctx.needs_input_grad
        grad_x_RD = arena.empty(x_RD.shape, x_RD) if x_needs else None
        grad_gate_up_2FD = arena.empty((2 * width_F, width_D), x_RD) if gate_needs or up_needs else None
        grad_down_DF = arena.empty(down_DF.shape, x_RD) if down_needs else None
        scratch = arena.empty((piece * (4 * width_F + native.PAD),), x_RD)
        made = (grad_x_RD, grad_gate_up_2FD, grad_down_DF, scratch)
        native.call("shared_backward", *ctx.shape, *tensors, grads[0].contiguous(), *made)
        halves = (None, None) if grad_gate_up_2FD is None else grad_gate_up_2FD.split(width_F)
        return grad_x_RD, *halves, grad_down_DF


def _plain(linear: Any) -> bool:
    """Whether it is a Linear that does nothing else: nobody has wrapped it, quantised it or hooked into it since."""
    if type(linear) is not nn.Linear or linear.bias is not None or "forward" in vars(linear):
        return False
    hooks = (linear._forward_pre_hooks, linear._forward_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return not any(hooks)


class CompiledShared(nn.Module):
    """What is mixed into the class of a block's shared experts. Not used on its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the family's, to rounding."""
        weights = self._weights()
        if weights is None or kwargs or len(args) != 1 or native.traced() or not native.readable(*args, *weights):
            return super().forward(*args, **kwargs)
        (x,), (gate_FD, up_FD, down_DF) = args, weights
        if not gate_FD.shape == up_FD.shape == down_DF.shape[::-1] or x.shape[-1] != gate_FD.shape[-1]:
            return super().forward(x)
        return SharedMLP.apply(x.reshape(-1, x.shape[-1]), *weights).view(x.shape)

    def _weights(self) -> list[Tensor] | None:
        """Of gate, up and down, or None if the module is not what it was."""
        linears = [getattr(self, name, None) for name in WEIGHTS]
        if type(activation(self)).__name__ not in native.SILU or not all(map(_plain, linears)):
            return None
        return [linear.weight for linear in linears]  # type: ignore[union-attr]


@torch.no_grad()
def is_shared_swiglu(shared: nn.Module) -> bool:
    """Whether the module is down(silu(gate(x)) * up(x)) of three plain Linears and nothing more. Tried on random
    weights and values small and large, in training and out of it."""
    if {name for name, _ in shared.named_parameters()} != {f"{name}.weight" for name in WEIGHTS}:
        return False
    if type(activation(shared)).__name__ not in native.SILU:
        return False
    generator = torch.Generator(CPU).manual_seed(0)
    shapes = {"gate_proj": (3, 5), "up_proj": (3, 5), "down_proj": (5, 3)}
    weights = {n: torch.randn(s, generator=generator, device=CPU, dtype=torch.float64) * 3 for n, s in shapes.items()}
    x = (
        torch.randn(90, 5, generator=generator, device=CPU, dtype=torch.float64)
        * torch.logspace(-2, 3, 90, device=CPU)[:, None]
    )
    gate, up, down = weights.values()
    expected = functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)
    modes = [m.training for m in shared.modules()]
    try:
        for training in (False, True):
            theirs = torch.func.functional_call(
                shared.train(training), {f"{n}.weight": w for n, w in weights.items()}, x
            )
            if not torch.allclose(theirs, expected, rtol=1e-9, atol=1e-12):
                return False
    except FAILURES:
        return False
    finally:
        for module, mode in zip(shared.modules(), modes):
            module.training = mode
    return True

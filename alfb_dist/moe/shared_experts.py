"""A block's shared experts: where they are, and their compiled form on a CPU (cpu/shared_experts.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from alfb_dist import cpu
from alfb_dist.moe.experts.reference import is_silu
from alfb_dist.moe.families.experts import CPU, FAILURES, activation

NAMES = ("shared_experts", "shared_expert", "shared_mlp")
WEIGHTS = ("gate_proj", "up_proj", "down_proj")


def shared_name(block: nn.Module) -> str | None:
    """Return the name of a block's shared experts, or None if it has none of a known name."""
    return next((name for name in NAMES if isinstance(getattr(block, name, None), nn.Module)), None)


def _is_plain_linear(linear: Any) -> bool:
    """Return whether it is a Linear without a bias that nobody has wrapped, quantised or hooked."""
    if type(linear) is not nn.Linear or linear.bias is not None or "forward" in vars(linear):
        return False
    hooks = (linear._forward_pre_hooks, linear._forward_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return not any(hooks)


class CompiledShared(nn.Module):
    """Mixin for the class of a block's shared experts, for modules that `is_shared_swiglu`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the family's forward returns, to rounding."""
        weights = self._weights()
        if weights is not None and len(args) == 1 and not kwargs:
            out = cpu.shared_mlp(*args, *weights)
            if out is not None:
                return out
        return super().forward(*args, **kwargs)

    def _weights(self) -> list[Tensor] | None:
        """Return the weights of gate, up and down, or None if the module has changed since it was tried."""
        linears = [getattr(self, name, None) for name in WEIGHTS]
        if not is_silu(activation(self)) or not all(map(_is_plain_linear, linears)):
            return None
        return [linear.weight for linear in linears]  # type: ignore[union-attr]


@torch.no_grad()
def is_shared_swiglu(shared: nn.Module) -> bool:
    """Return whether the module computes down(silu(gate(x)) * up(x)) with three plain Linears and nothing more.

    Tried on random weights and on small and large values, in training and in evaluation mode.
    """
    if {name for name, _ in shared.named_parameters()} != {f"{name}.weight" for name in WEIGHTS}:
        return False
    if not is_silu(activation(shared)):
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
            out = torch.func.functional_call(shared.train(training), {f"{n}.weight": w for n, w in weights.items()}, x)
            if not torch.allclose(out, expected, rtol=1e-9, atol=1e-12):
                return False
    except FAILURES:
        return False
    finally:
        for module, mode in zip(shared.modules(), modes):
            module.training = mode
    return True

"""Classes that are mixed into a family's module, in place, so that transformers still knows it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def mix(module: nn.Module, *mixins: type[nn.Module]) -> None:
    """Replace the module's class by a subclass of the mixins and of it."""
    family = type(module)
    module.__class__ = type(f"Balanced{family.__name__}", (*mixins, family), {"__module__": __name__})


class BiasHolder(nn.Module):
    """Mixin for a module that holds a selection bias: the bias stays float32 whatever the module is cast to."""

    held_bias: str  # the bias's name in this module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move and cast everything as asked, except that the bias stays float32 with all its bits."""
        bias = getattr(self, self.held_bias)
        exact = bias.detach().clone() if bias.dtype == torch.float32 else None
        super()._apply(fn, recurse)
        bias = getattr(self, self.held_bias)
        if bias.dtype != torch.float32:
            bias.data = bias.float() if exact is None else exact.to(bias.device)
        return self

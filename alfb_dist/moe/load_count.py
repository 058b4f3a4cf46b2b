"""Loads that count once for each token: when the backward of its routing weights runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class CountsLoad(Protocol):
    """An accumulator of loads."""

    def add_load(self, load_E: Tensor) -> None:
        """Add load_E to the load of the next bias update."""


@dataclass
class Commit:
    """A load that is added to `gate` by the first call, and not again: a second backward through the same graph
    (retain_graph) brings no new tokens."""

    gate: CountsLoad
    load_E: Tensor | None

    def __call__(self) -> None:
        if self.load_E is not None:
            self.gate.add_load(self.load_E)
        self.load_E = None


class _CommitLoad(torch.autograd.Function):
    """The identity; its backward commits the load."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, commit: Commit) -> Tensor:
        ctx.commit = commit
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.commit()
        return grads[0], None


def commit_in_backward(weights: Tensor, gate: CountsLoad, load_E: Tensor) -> Tensor:
    """Return the routing weights with a backward that adds load_E to the gate's load, also where the router and its
    inputs are frozen."""
    if not weights.requires_grad:
        weights = weights.detach().requires_grad_()
    return _CommitLoad.apply(weights, Commit(gate, load_E))

"""Shared experts that run while rows are on their way to other ranks, though the family's block calls them later.

A block that calls its experts and then, with the same tokens, its shared experts, loses nothing if these run earlier.
Their output is kept until the block calls them; called with anything else, they run as usual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alfb_dist.moe.families.experts import FAILURES
from alfb_dist.moe.gate import BalancedGate
from alfb_dist.moe.mixin import mix
from alfb_dist.moe.shared_experts import shared_name


@dataclass(frozen=True)
class _Tokens:
    """A tensor as it is now. It is kept alive, or another could come to lie at its address."""

    x: Tensor
    version: int

    @classmethod
    def of(cls, x: Tensor) -> _Tokens:
        """Return the current state of a tensor with a version counter, which one of inference mode does not have."""
        return cls(x, x._version)

    def same_as(self, x: Tensor) -> bool:
        """Return whether x is this tensor in any shape, unchanged and with the same path for gradients."""
        kept, given = ((t.data_ptr(), t.numel(), t.dtype, t.requires_grad, t.is_contiguous()) for t in (self.x, x))
        return kept == given and not x.is_inference() and x._version == self.version


class OverlappedSharedExperts(nn.Module):
    """Mixin for the class of a block's shared experts."""

    early: tuple[_Tokens, Tensor] | None = None  # input and output

    def run_early(self, x_TD: Tensor) -> None:
        """Run on the tokens with which the block will call next. Does nothing in inference mode."""
        if not x_TD.is_inference():
            self.early = _Tokens.of(x_TD), super().forward(x_TD)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the early output, if it is of the same tokens, or run the family's forward."""
        early, self.early = self.early, None
        if early is None or args or kwargs or not early[0].same_as(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        return early[1].view(*hidden_states.shape[:-1], early[1].shape[-1])


class _Call(NamedTuple):
    name: str
    tokens: _Tokens
    num_others: int


class _Recorder(nn.Module):
    """Stands in for a part of a block in a trial, and records its calls."""

    def __init__(self, name: str, calls: list[_Call]) -> None:
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros, as a part of a sum."""
        self.calls.append(_Call(self.name, _Tokens.of(hidden_states), len(args) + len(kwargs)))
        return torch.zeros_like(hidden_states)


@torch.no_grad()
def _called_last(block: nn.Module, hidden: Tensor) -> str | None:
    """Return the name of the shared experts if the block calls its experts and then these, once each, with the same
    tokens, and these with nothing else."""
    name = shared_name(block)
    if name is None:
        return None
    parts = {part: block.get_submodule(part) for part in ("experts", name)}
    calls: list[_Call] = []
    try:
        for part in parts:
            setattr(block, part, _Recorder(part, calls))
        with torch.random.fork_rng(devices=[]):
            block(hidden)
    except FAILURES:
        return None
    finally:
        for part, module in parts.items():
            setattr(block, part, module)
    if [call.name for call in calls] != ["experts", name]:
        return None
    experts, shared = calls
    return name if shared.num_others == 0 and experts.tokens.same_as(shared.tokens.x) else None


def overlap_shared_experts(block: nn.Module, gate: BalancedGate) -> tuple[nn.Module, str] | None:
    """Let the block's shared experts run early; return the block and their name, or None if it calls none last.

    Found by a trial of the block on a few tokens.
    """
    if not gate.weight_name:
        return None
    weight_ED = gate.get_parameter(gate.weight_name)
    name = _called_last(block, torch.zeros(1, 4, weight_ED.shape[1], dtype=weight_ED.dtype, device=weight_ED.device))
    if name is None:
        return None
    mix(block.get_submodule(name), OverlappedSharedExperts)
    block.register_forward_hook(_drop_early, always_call=True)
    return block, name


def _drop_early(block: nn.Module, *_: Any) -> None:
    """Drop the output that a forward, which ended before its shared experts as a recompute does, left behind."""
    for module in block.children():
        if isinstance(module, OverlappedSharedExperts):
            module.early = None

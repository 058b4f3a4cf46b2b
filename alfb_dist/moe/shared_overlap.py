"""Shared experts run while the tokens are on their way to other ranks, though the family's block calls them afterwards.

A block that calls its experts and then, with the same tokens, its shared experts, loses nothing if these run earlier.
What they made is handed out when the block asks for it; asked with anything else, they run as ever.
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
    """Tokens as they are now. They are kept, or others could come to lie at their address."""

    x: Tensor
    version: int

    @classmethod
    def of(cls, x: Tensor) -> _Tokens:
        """Of a tensor that counts its changes, which one of inference mode does not."""
        return cls(x, x._version)

    def are(self, x: Tensor) -> bool:
        """Whether x is these tokens, in whatever shape, unchanged and with the same way back for gradients."""
        mine, theirs = ((t.data_ptr(), t.numel(), t.dtype, t.requires_grad, t.is_contiguous()) for t in (self.x, x))
        return mine == theirs and not x.is_inference() and x._version == self.version


class RunsEarly(nn.Module):
    """What is mixed into the class of a block's shared experts. Not used on its own."""

    early: tuple[_Tokens, Tensor] | None = None

    def run_early(self, x_TD: Tensor) -> None:
        """The block will ask for what these tokens become. Nothing happens in inference mode."""
        if not x_TD.is_inference():
            self.early = _Tokens.of(x_TD), super().forward(x_TD)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The family's own, unless it ran early on the same tokens."""
        early, self.early = self.early, None
        if early is None or args or kwargs or not early[0].are(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        return early[1].view(*hidden_states.shape[:-1], early[1].shape[-1])


class _Call(NamedTuple):
    name: str
    tokens: _Tokens
    num_others: int


class _Recorder(nn.Module):
    """Stands in for a part of a block in a trial, and notes what it is called with."""

    def __init__(self, name: str, calls: list[_Call]) -> None:
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros, as a part of a sum."""
        self.calls.append(_Call(self.name, _Tokens.of(hidden_states), len(args) + len(kwargs)))
        return torch.zeros_like(hidden_states)


@torch.no_grad()
def _asked_last(block: nn.Module, hidden: Tensor) -> str | None:
    """The name of the shared experts that the block calls after its experts, once each, with the same tokens and with
    nothing else."""
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
    return name if shared.num_others == 0 and experts.tokens.are(shared.tokens.x) else None


def shared_to_run_early(block: nn.Module, gate: BalancedGate) -> tuple[nn.Module, str] | None:
    """The block and the name of its shared experts, which can run early from now on; None if it has none of that kind.

    Found by trying the block on a few tokens.
    """
    if not gate.weight_name:
        return None
    weight_ED = gate.get_parameter(gate.weight_name)
    name = _asked_last(block, torch.zeros(1, 4, weight_ED.shape[1], dtype=weight_ED.dtype, device=weight_ED.device))
    if name is None:
        return None
    mix(block.get_submodule(name), RunsEarly)
    block.register_forward_hook(_forget, always_call=True)
    return block, name


def _forget(block: nn.Module, *_: Any) -> None:
    """Nothing is left of a forward that ended before it asked, as a recompute does."""
    for module in block.children():
        if isinstance(module, RunsEarly):
            module.early = None

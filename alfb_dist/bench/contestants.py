"""The contestants of a benchmark, all with the same weights, and the bare matrix products as their lower bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alfb_dist.bench import moe_layer
from alfb_dist.bench.block import transformers_block
from alfb_dist.bench.sizes import Case
from alfb_dist.distributed.collectives import group_rank, size, world_group

OURS = "alfb_dist"
THEIRS = {"transformers eager": "eager", "transformers grouped_mm": "grouped_mm"}
"""transformers' expert implementations by the contestant's name. On several ranks each rank holds all experts."""


@dataclass(frozen=True)
class World:
    """The number of ranks, and which of them this process is."""

    size: int
    rank: int


@dataclass(frozen=True)
class Run:
    """A forward pass, and the backward pass of what it returned."""

    forward: Callable[[], Any]
    backward: Callable[[Any], Any]


def make_weights(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Draw float32 weights of the block, equal on every rank. Rows of the gate have norm 1, so logits are N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    width, inner, num_experts = case.hidden, case.inter, case.experts
    gate = torch.randn(num_experts, width, generator=generator)
    gate = torch.linalg.qr(gate.T)[0].T if num_experts <= width else gate / gate.norm(dim=1, keepdim=True)
    return {
        "gate": gate.contiguous(),
        "gate_up": rand(num_experts, 2 * inner, width),
        "down": rand(num_experts, width, inner),
        "shared_gate": rand(inner, width),
        "shared_up": rand(inner, width),
        "shared_down": rand(width, inner),
    }


def make_tokens(case: Case, weights: dict[str, Tensor], rank: int) -> Tensor:
    """Draw this rank's tokens, float32 (1, T, D), so that they are routed as the case says."""
    generator = torch.Generator().manual_seed(1000 + rank)
    x_TD = torch.randn(case.tokens, case.hidden, generator=generator)
    hot_T1 = torch.rand(case.tokens, 1, generator=generator) < 0.5
    if case.routing == "hot_expert":
        x_TD = x_TD + hot_T1 * 8.0 * weights["gate"][0]
    elif case.routing == "hot_rank":
        x_TD = x_TD + hot_T1 * 8.0 * weights["gate"][: case.experts // 2].sum(0)
    return x_TD.unsqueeze(0)


def build(name: str, case: Case, weights: dict[str, Tensor], device: torch.device) -> nn.Module:
    """Build the contestant's block on the device, in the case's dtype; collective for ours."""
    block: Any
    if name == OURS:
        group = world_group()
        block, _ = moe_layer(case, weights, World(size(group), group_rank(group)))
    else:
        block = transformers_block(case, weights, THEIRS[name])
    return block.to(device=device, dtype=getattr(torch, case.dtype))


def make_run(block: nn.Module, x: Tensor, grad: Tensor) -> Run:
    """Return the block's forward and backward on `x`; each forward first drops the gradients of the one before."""
    parameters = list(block.parameters())

    def forward() -> Any:
        x.grad = None
        for p in parameters:
            p.grad = None
        return block(x)

    return Run(forward, lambda out: out.backward(grad))


def products(case: Case, device: torch.device) -> Run:
    """Return dense matrix products with as many multiply-adds as the block has on each rank."""
    shapes = [
        (case.rows, case.hidden, 2 * case.inter),
        (case.rows, case.inter, case.hidden),
        (case.tokens, case.hidden, 2 * case.inter),
        (case.tokens, case.inter, case.hidden),
        (case.tokens, case.hidden, case.experts),
    ]
    options: Any = {"device": device, "dtype": getattr(torch, case.dtype)}
    data = [
        (torch.randn(m, k, **options), torch.randn(k, n, **options), torch.randn(m, n, **options)) for m, k, n in shapes
    ]

    def forward() -> None:
        for a, b, _ in data:
            a @ b

    def backward(_: None) -> None:
        for a, b, grad in data:
            grad @ b.T
            a.T @ grad

    return Run(forward, backward)

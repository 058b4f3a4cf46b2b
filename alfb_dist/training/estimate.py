"""The parameters, memory and traffic of a configuration, computed without training."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Any

import torch

from alfb_dist.config import Config
from alfb_dist.moe.families.blocks import moe_blocks
from alfb_dist.report.wording import count, human
from alfb_dist.training.model import meta_model


@dataclass(frozen=True)
class Estimate:
    """Sizes of a run. Bytes are per rank."""

    parameters: int  # of the whole model
    active_parameters: int  # used by one token
    rank_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int  # float32 moments, and the float32 weights that ZeRO and bfloat16 need
    exchange_bytes: int  # sent to other ranks per optimizer step if routing is uniform; forward and backward
    moe_layers: int
    tokens_per_step: int  # over all ranks
    accumulation_steps: int

    @property
    def state_bytes(self) -> int:
        """Weights, gradients and optimizer together, without activations."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def remote_ranks(num_experts: int, top_k: int, ep_degree: int) -> float:
    """Return the mean number of other ranks that a token is sent to if its K experts are drawn uniformly.

    A rank gets none of the token's experts with probability C(E - E/P, K) / C(E, K).
    """
    elsewhere = num_experts - num_experts // ep_degree
    return (ep_degree - 1) * (1 - comb(elsewhere, top_k) / comb(num_experts, top_k))


def estimate(config: Config, world_size: int) -> Estimate:
    """Return the sizes of a run on `world_size` ranks. The model is built on the meta device."""
    model: Any = meta_model(config)
    zero: Any = config.deepspeed.get("zero_optimization", {})
    ep_degree, stage = config.parallel.ep_degree, int(zero.get("stage", 0))
    blocks = list(moe_blocks(model))
    experts = sum(p.numel() for block in blocks for p in block.module.experts.parameters())
    total = sum(p.numel() for p in model.parameters())
    top_k, num_experts = blocks[0].gate.top_k, blocks[0].num_experts
    dense_here, experts_here = total - experts, experts // ep_degree
    width = torch.bfloat16.itemsize if config.model.dtype == "bfloat16" else torch.float32.itemsize
    states = 12 if width == 2 or stage >= 1 else 8
    dense_ranks, expert_ranks = (world_size, world_size // ep_degree) if stage >= 1 else (1, 1)
    shares = dense_here / dense_ranks + experts_here / expert_ranks
    tokens = config.train.global_batch * config.data.sequence_length
    sent = tokens / world_size * len(blocks) * remote_ranks(num_experts, top_k, ep_degree)
    hidden = int(model.config.hidden_size)
    return Estimate(
        parameters=total,
        active_parameters=total - experts + experts * top_k // num_experts,
        rank_parameters=dense_here + experts_here,
        weight_bytes=(dense_here + experts_here) * width,
        gradient_bytes=int((shares if stage == 2 else dense_here + experts_here) * width),
        optimizer_bytes=int(shares * states),
        exchange_bytes=int(sent * hidden * width * 4),
        moe_layers=len(blocks),
        tokens_per_step=tokens,
        accumulation_steps=config.gradient_accumulation(world_size),
    )


def table_rows(e: Estimate, world_size: int, config: Config) -> list[tuple[str, str]]:
    """Return the estimate as (label, value) rows."""
    return [
        (
            "ranks",
            f"{world_size} = {config.parallel.ep_degree} expert-parallel x {world_size // config.parallel.ep_degree}",
        ),
        ("MoE layers", str(e.moe_layers)),
        ("parameters in all", count(e.parameters)),
        ("parameters per token", count(e.active_parameters)),
        ("parameters per rank", count(e.rank_parameters)),
        ("weights per rank", human(e.weight_bytes)),
        ("gradients per rank", human(e.gradient_bytes)),
        ("optimizer per rank", human(e.optimizer_bytes)),
        ("together, without activations", human(e.state_bytes)),
        ("tokens per optimizer step", f"{e.tokens_per_step:,}"),
        ("micro-batches per step and rank", str(e.accumulation_steps)),
        ("exchanged per step and rank", f"{human(e.exchange_bytes)} sent, if routing is even"),
    ]

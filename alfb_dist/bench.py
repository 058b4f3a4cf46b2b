"""The product's own layer and training step for benchmarks, built by the path that users take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alfb_dist.engine import initialize, quiet
from alfb_dist.sharding import parallelize


def moe_layer(
    case: Any, weights: dict[str, Tensor], world: Any
) -> tuple[Callable[[Tensor], Tensor], list[nn.Parameter]]:
    """(forward, parameters) of one sigmoid-gated MoE block over `world.size` expert-parallel ranks.

    case: tokens, hidden, inter, experts, topk. weights: gate (E, D), gate_up (E, 2F, D), down (E, D, F), shared_gate
    and shared_up (F, D), shared_down (D, F). forward: (1, T, D) to the same shape; collective.
    """
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=case.hidden,
        moe_intermediate_size=case.inter,
        n_shared_experts=1,
        n_routed_experts=case.experts,
        num_experts_per_tok=case.topk,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    block = DeepseekV3MoE(config)
    shared = block.shared_experts
    given = {
        block.gate.weight: "gate",
        block.experts.gate_up_proj: "gate_up",
        block.experts.down_proj: "down",
        shared.gate_proj.weight: "shared_gate",
        shared.up_proj.weight: "shared_up",
        shared.down_proj.weight: "shared_down",
    }
    with torch.no_grad():
        for parameter, name in given.items():
            parameter.copy_(weights[name])
    parallelize(block, ep_degree=world.size)
    return block, list(block.parameters())


def train_step(model: nn.Module, ids: Tensor, lr: float, world: Any) -> Callable[[], Tensor]:
    """A function that takes one optimizer step on `ids` (B, S) through the engine and returns the loss; collective."""
    quiet()
    ds_config = {
        "train_micro_batch_size_per_gpu": ids.shape[0],
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": lr}},
    }
    engine, balancer = initialize(model, ds_config, ep_degree=world.size)

    def run() -> Tensor:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        balancer.step()
        return loss

    return run

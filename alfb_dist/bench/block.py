"""transformers' MoE block, from which every contestant is built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def transformers_block(case: Any, weights: dict[str, Tensor], implementation: str = "eager") -> nn.Module:
    """Build transformers' DeepSeek-V3 block with the given weights.

    implementation: transformers' name of how the experts are computed.
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
        experts_implementation=implementation,
    )
    block: Any = DeepseekV3MoE(config)
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
    return block

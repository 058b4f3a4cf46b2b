"""The families that DeepSpeed's AutoEP shards as transformers computes them, and a model converted by it."""

from __future__ import annotations

from typing import Any

from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_presets.base import AutoEPConfig
from torch import nn

PRESETS: dict[str, str] = {
    **dict.fromkeys(
        (
            "axk2",
            "bailing_hybrid",
            "beam",
            "deepseek_v3",
            "deepseek_v32",
            "dots1",
            "dots3_note_text",
            "exaone_moe",
            "glm4_moe",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "kimi_linear",
            "mimo_v2_flash",
            "solar_open",
        ),
        "deepseek_v3",
    ),
    **dict.fromkeys(("flex_olmo", "mellum", "minimax", "olmoe", "qwen3_moe"), "mixtral"),
    **dict.fromkeys(("mixtral", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text"), "qwen3_moe"),
    "deepseek_v2": "deepseek_v2",
}
"""`expert_parallel.preset_model` with which AutoEP computes what transformers does, by family."""


def converted(model: nn.Module, **config: Any) -> nn.Module:
    """The model with its MoE layers replaced by AutoEP's, in place, on one rank. config: of `expert_parallel`."""
    auto_ep = AutoEP(model, AutoEPConfig(enabled=True, use_grouped_mm=False, **config))
    auto_ep.replace_moe_layers(auto_ep.ep_parser(), ep_size=1, ep_rank=0)
    return model

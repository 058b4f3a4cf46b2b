"""The transformers model of a configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from alfb_dist.config import Config


def _transformers_config(config: Config) -> Any:
    from transformers import AutoConfig

    if config.model.path:
        return AutoConfig.from_pretrained(config.model.path)
    return AutoConfig.for_model(config.model.family, **config.model.config)


def meta_model(config: Config) -> nn.Module:
    """The model with shapes but without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(_transformers_config(config))
    return model


def build_model(config: Config) -> nn.Module:
    """The model in float32, initialised from run.seed (the same on every rank) or read from model.path.

    DeepSpeed casts it to model.dtype. Activation checkpointing is on as train.activation_checkpointing says.
    Raises ValueError for a family that transformers does not know.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(config.run.seed)
    options = {"attn_implementation": config.model.attention, "dtype": torch.float32}
    if config.model.path:
        model = AutoModelForCausalLM.from_pretrained(config.model.path, **options)
    else:
        model = AutoModelForCausalLM.from_config(_transformers_config(config), **options)
    model.config.use_cache = False
    if config.train.activation_checkpointing != "none":
        reentrant = config.train.activation_checkpointing == "reentrant"
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()  # one that was read comes in evaluation mode, in which no gate counts


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; vectors (norms, biases) without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay, "name": "decayed"},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "name": "not_decayed"},
    ]

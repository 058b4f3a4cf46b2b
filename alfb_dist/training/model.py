"""The transformers model of a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from alfb_dist import pretrained
from alfb_dist.config import Config, ConfigError
from alfb_dist.config.tables import ModelConfig
from alfb_dist.moe.sharded_experts import sharded_experts
from alfb_dist.pretrained.loading import load_model
from alfb_dist.training.settings import sharding_of


def transformers_config(model: ModelConfig) -> Any:
    """Return transformers' configuration of the model, from model.path or model.config. No weights are read."""
    from transformers import AutoConfig

    if model.path:
        return pretrained.read_config(Path(model.path))[0]
    return AutoConfig.for_model(model.family, **model.config)


def meta_model(config: Config) -> nn.Module:
    """Return the model on the meta device."""
    model: nn.Module = pretrained.meta_model(transformers_config(config.model))
    return model


def build_model(config: Config, *, resumed: bool = False) -> nn.Module:
    """Return the model in float32 and training mode: initialised from run.seed, equal on all ranks, or from model.path.

    A model from model.path is parallelised, and each rank has read its own experts only. So is a resumed one: it has
    room for the rank's share, and a checkpoint brings the weights. Both are collective. DeepSpeed casts the model to
    model.dtype. train.activation_checkpointing is applied.
    Raises ConfigError if model.path cannot be read, ValueError if transformers does not know the family.
    """
    torch.manual_seed(config.run.seed)
    model = _read(config) if config.model.path else _empty(config) if resumed else _initialised(config)
    model.config.use_cache = False
    if config.train.activation_checkpointing != "none":
        reentrant = config.train.activation_checkpointing == "reentrant"
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    trained: nn.Module = model.train()  # a model that was read is in evaluation mode, where no gate counts
    return trained


def _initialised(config: Config) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(
        transformers_config(config.model), attn_implementation=config.model.attention, dtype=torch.float32
    )


def _empty(config: Config) -> Any:
    model = pretrained.meta_model(transformers_config(config.model), torch.float32, config.model.attention)
    pretrained.make_room(model, torch.float32, sharding_of(config))
    return model


def _read(config: Config) -> Any:
    try:
        return load_model(config.model.path, sharding_of(config), torch.float32, config.model.attention)
    except ValueError as error:  # the same on every rank
        raise ConfigError(f"model.path: {error}") from error


def count_parameters(model: nn.Module) -> int:
    """Return the number of the model's parameters, the experts of all ranks included."""
    local = sum(p.numel() for p in model.parameters())
    return local + sum((m.ep_size - 1) * p.numel() for _, m in sharded_experts(model) for p in m.parameters())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: matrices with weight decay, vectors (norms, biases) without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay, "name": "decayed"},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "name": "not_decayed"},
    ]

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
    """transformers' configuration of the model: that of model.path, or the given one. Weights need not be there."""
    from transformers import AutoConfig

    if model.path:
        return pretrained.read_config(Path(model.path))[0]
    return AutoConfig.for_model(model.family, **model.config)


def meta_model(config: Config) -> nn.Module:
    """The model with shapes but without memory."""
    model: nn.Module = pretrained.meta_model(transformers_config(config.model))
    return model


def build_model(config: Config, *, resumed: bool = False) -> nn.Module:
    """The model in float32 and training mode: initialised from run.seed, the same on every rank, or from model.path.

    A model from model.path comes parallelised, each rank having read its own experts only; collective then. So does one
    that is resumed: it has room for the rank's share, and its weights are to be read from a checkpoint. DeepSpeed casts
    it to model.dtype. Activation checkpointing is on as train.activation_checkpointing says.
    Raises ConfigError for a folder that cannot be read, and ValueError for a family that transformers does not know.
    """
    torch.manual_seed(config.run.seed)
    model = _read(config) if config.model.path else _roomy(config) if resumed else _initialised(config)
    model.config.use_cache = False
    if config.train.activation_checkpointing != "none":
        reentrant = config.train.activation_checkpointing == "reentrant"
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    trained: nn.Module = model.train()  # one that was read comes in evaluation mode, in which no gate counts
    return trained


def _initialised(config: Config) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(
        transformers_config(config.model), attn_implementation=config.model.attention, dtype=torch.float32
    )


def _roomy(config: Config) -> Any:
    model = pretrained.meta_model(transformers_config(config.model), torch.float32, config.model.attention)
    pretrained.make_room(model, torch.float32, sharding_of(config))
    return model


def _read(config: Config) -> Any:
    try:
        return load_model(config.model.path, sharding_of(config), torch.float32, config.model.attention)
    except ValueError as error:  # the same on every rank
        raise ConfigError(f"model.path: {error}") from error


def count_parameters(model: nn.Module) -> int:
    """How many parameters the model has with the experts of all ranks."""
    here = sum(p.numel() for p in model.parameters())
    return here + sum((m.ep_size - 1) * p.numel() for _, m in sharded_experts(model) for p in m.parameters())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; vectors (norms, biases) without."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay, "name": "decayed"},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "name": "not_decayed"},
    ]

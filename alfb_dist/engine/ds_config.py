"""The DeepSpeed configuration: checked for what expert parallelism excludes, or derived from ours."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch

from alfb_dist.config import Config, read_section
from alfb_dist.config.deepspeed_json import SECTION, read_deepspeed_json
from alfb_dist.config.keys import DEEPSPEED_KEYS, DERIVED_KEYS
from alfb_dist.config.text import nearest
from alfb_dist.engine.balancing import Balancing
from alfb_dist.moe.sharding import Sharding

Part = TypeVar("Part", Sharding, Balancing)


def read_ds_config(ds_config: dict[str, Any] | str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return DeepSpeed's configuration and our section `alf_lb` of it, from a dict or a file.

    Raises ValueError if the file holds no JSON object or the section has an unknown key.
    """
    given = ds_config if isinstance(ds_config, dict) else read_deepspeed_json(Path(ds_config))
    return {key: value for key, value in given.items() if key != SECTION}, read_section(given.get(SECTION, {}))


def with_section(settings: Part, section: dict[str, Any]) -> Part:
    """Return the settings with the section's values in place of defaults.

    Raises ValueError if a setting differs both from its default and from the section.
    """
    found: dict[str, Any] = {}
    for field in fields(settings):
        key, given = field.name, getattr(settings, field.name)
        if key not in section:
            continue
        if given not in (field.default, section[key]):
            raise ValueError(
                f"{key} ({given!r}) and {SECTION}.{key} ({section[key]!r}) contradict each other: give one"
            )
        found[key] = "train" if (key, section[key]) == ("mode", "auto") else section[key]
    return replace(settings, **found)


def check_ds_config(ds_config: dict[str, Any]) -> None:
    """Raise ValueError if expert parallelism excludes a value, or a key looks like a misspelt one of DeepSpeed."""
    known = (*DEEPSPEED_KEYS, *DERIVED_KEYS)
    for key in ds_config.keys() - set(known):
        if near := nearest(key, known):  # DeepSpeed ignores keys that it does not know
            raise ValueError(f"{key}: unknown key of DeepSpeed; did you mean {near}?")
    clipping = ds_config.get("gradient_clipping", 0.0)
    if isinstance(clipping, int | float) and not clipping >= 0:
        raise ValueError(f"gradient_clipping ({clipping}) must be at least 0; 0 is no limit")
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2):
        raise ValueError(
            f"zero_optimization.stage must be 0, 1 or 2, got {stage}: stage 3 partitions parameters that expert "
            "parallelism already shards; use stage 1 or 2 and a larger ep_degree"
        )
    if ds_config.get("expert_parallel", {}).get("enabled"):
        raise ValueError("expert_parallel.enabled must be off: the experts are sharded by alfb_dist (ep_degree)")
    if ds_config.get("fp16", {}).get("enabled"):
        raise ValueError("fp16.enabled must be off: use bf16 or float32, whose norms and skipped steps are tested")
    if ds_config.get("use_data_before_expert_parallelism"):
        raise ValueError(
            "use_data_before_expert_parallelism must be off: alfb_dist places expert-parallel ranks next to each other"
        )


def with_defaults(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy in which Adam on CPU is torch's fused one; DeepSpeed's default compiles its own at start."""
    config = copy.deepcopy(ds_config)
    optimizer = config.get("optimizer", {})
    on_cpu = deepspeed.get_accelerator().device_name() == "cpu"
    if on_cpu and optimizer.get("type", "").lower() in ("adam", "adamw"):
        parameters = optimizer.setdefault("params", {})
        if parameters.setdefault("torch_adam", True):
            parameters.setdefault("fused", not parameters.get("foreach"))
    return config


def derive_ds_config(config: Config, world_size: int) -> dict[str, Any]:
    """Return the DeepSpeed dict of a run: what our tables decide, and the `deepspeed` table as it is."""
    optimizer = config.optimizer
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.gradient_accumulation(world_size),
        "gradient_clipping": optimizer.clip,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            # weight_decay is set in the parameter groups. Torch's fused kernel needs no compiler, on CPU or CUDA.
            "params": {
                "lr": optimizer.lr,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "torch_adam": True,
                "fused": True,
            },
        },
        **copy.deepcopy(config.deepspeed),
    }


def lr_factor(config: Config, step: int) -> float:
    """Return a step's learning rate (the first is 0) over the peak: linear warm-up, then constant or cosine."""
    warmup, optimizer = config.optimizer.warmup_steps, config.optimizer
    if step < warmup:
        return (step + 1) / warmup
    if optimizer.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, config.train.steps - warmup))
    return optimizer.min_lr_ratio + (1 - optimizer.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def lr_schedule(config: Config) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LambdaLR]:
    """Return a function from an optimizer to its scheduler, which DeepSpeed steps after each applied step."""
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(config, step))

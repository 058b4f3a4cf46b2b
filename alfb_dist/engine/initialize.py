"""A DeepSpeed engine around a model with sharded experts, and its Balancer, in one call.

ZeRO, gradient reduction and the optimizer are DeepSpeed's; patches.py corrects them. On CPU nothing is compiled at
start.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import deepspeed
from torch import nn

from alfb_dist.balance.update_rule import Schedule
from alfb_dist.distributed.collectives import known_groups, set_timeouts
from alfb_dist.engine.attention import choose_attention
from alfb_dist.engine.balancer import Balancer, rate_of
from alfb_dist.engine.balancing import Balancing
from alfb_dist.engine.ds_config import check_ds_config, read_ds_config, with_defaults, with_section
from alfb_dist.moe.parallelize import shard_model
from alfb_dist.moe.sharded_experts import sharded_experts
from alfb_dist.moe.sharding import Sharding


def start_without_compiler() -> None:
    """Keep DeepSpeed's CPU backend from compiling its shared-memory operator: a minute, and it needs a compiler."""
    if deepspeed.get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _check_trained(model: nn.Module, model_parameters: Any, optimizer: Any) -> None:
    """Raise ValueError if a parameter to train is not in the model: sharding has replaced those of the experts."""
    in_model = {id(p) for p in model.parameters()}
    given = list(model_parameters or []) + list(getattr(optimizer, "param_groups", []))
    for group in given:
        for p in group["params"] if isinstance(group, dict) else [group]:
            if id(p) not in in_model:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is to be trained but not in the model: sharding replaces "
                    "the experts' parameters; pass model_parameters or optimizer as a function"
                )


def _check_sharded(model: nn.Module, sharding: Sharding) -> None:
    """Raise ValueError if the model's experts are sharded differently."""
    for name, experts in sharded_experts(model):
        had = experts.sharding
        if sharding.ep_degree != had.ep_degree:
            raise ValueError(
                f"ep_degree ({sharding.ep_degree}) must be the one that the model was parallelised with "
                f"({had.ep_degree}): pass the same to both, or parallelise a new model"
            )
        if sharding.max_rows not in (0, had.max_rows):
            raise ValueError(
                f"max_rows ({sharding.max_rows}) must be the one that the model was parallelised with "
                f"({had.max_rows}): pass it to from_pretrained or parallelize"
            )
        if any(sharding.alphas) and sharding.alphas != had.alphas:
            raise ValueError(
                f"sequence_loss_alpha and batch_loss_alpha {sharding.alphas} must be those that the model was "
                f"parallelised with {had.alphas}: pass them to from_pretrained or parallelize"
            )
        if experts.grid is None:
            raise ValueError(
                f"{name} was parallelised before torch.distributed was up: call "
                "alfb_dist.init_distributed() first, then from_pretrained or parallelize"
            )


def initialize(
    model: nn.Module,
    ds_config: dict[str, Any] | str | Path,
    *,
    ep_degree: int | None = None,
    rule: str = "sign",
    rate: float | Schedule = 1e-3,
    centered: bool = False,
    mode: str | Sequence[str] = "train",
    sequence_loss_alpha: float = 0.0,
    batch_loss_alpha: float = 0.0,
    max_rows: int = 0,
    timeout_seconds: float = 600,
    model_parameters: Any = None,
    **deepspeed_arguments: Any,
) -> tuple[Any, Balancer]:
    """Return a DeepSpeed engine around the model with its experts sharded, and its Balancer; collective.

    Equals `parallelize`, `deepspeed.initialize` and `Balancer` in turn; see those for the arguments.
    model: a parallelised one, as `from_pretrained` returns, is used as it is; ep_degree, and max_rows and the alphas if
        given, must be its own. The model is put in training mode: in evaluation mode no gate counts.
    ds_config: a DeepSpeed configuration with ZeRO stage 0, 1 or 2, or its path. Its section `alf_lb` may hold
        ep_degree, rule, rate, centered, mode and the other keys of [parallel] and [balance] instead of arguments.
        Steps whose gradients are not finite are skipped, in float32 too. On CPU, Adam and AdamW are torch's fused ones.
    model_parameters: the parameters to train, or groups of them with names; or a function from the parallelised model,
        whose experts are new parameters, to these. By default all that require gradients.
    deepspeed_arguments: further ones of `deepspeed.initialize`, such as optimizer or lr_scheduler.
    timeout_seconds: how long a collective waits for other ranks, in all groups made here, DeepSpeed's included.
    Raises ValueError before any collective if the configuration, the sizes or the rule are not valid.
    """
    ds_config, section = read_ds_config(ds_config)
    ep_degree = section.get("ep_degree") if ep_degree is None else ep_degree
    if ep_degree is None:
        raise ValueError("ep_degree is missing: pass it as an argument, or in the section alf_lb of ds_config")
    sharding = Sharding(
        ep_degree=ep_degree,
        max_rows=max_rows,
        sequence_loss_alpha=sequence_loss_alpha,
        batch_loss_alpha=batch_loss_alpha,
        timeout_seconds=timeout_seconds,
    )
    balancing = Balancing(rule=rule, rate=rate, centered=centered, mode=mode)
    return start_engine(
        model,
        ds_config,
        with_section(sharding, section),
        with_section(balancing, section),
        model_parameters=model_parameters,
        **deepspeed_arguments,
    )


def start_engine(
    model: nn.Module,
    ds_config: dict[str, Any],
    sharding: Sharding,
    balancing: Balancing,
    *,
    model_parameters: Any = None,
    **deepspeed_arguments: Any,
) -> tuple[Any, Balancer]:
    """Return what `initialize` returns, from settings. ds_config has no section `alf_lb`. Collective."""
    check_ds_config(ds_config)
    rate_of(balancing)
    if sharded_experts(model):
        _check_sharded(model, sharding)
    else:
        shard_model(model, sharding)
    if not model.training:
        model.train()
    if callable(model_parameters):
        model_parameters = model_parameters(model)
    _check_trained(model, model_parameters, deepspeed_arguments.get("optimizer"))
    start_without_compiler()
    choose_attention(model)
    before = known_groups()
    engine = deepspeed.initialize(
        model=model, config=with_defaults(ds_config), model_parameters=model_parameters, **deepspeed_arguments
    )[0]
    set_timeouts(sharding.timeout_seconds, known_groups() - before)
    return engine, Balancer.from_settings(engine, balancing)


def quiet(level: int = logging.WARNING) -> None:
    """Let DeepSpeed log from this level on, and silence torch's warning about a name that DeepSpeed still calls."""
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
    deepspeed.utils.logging.logger.setLevel(level)

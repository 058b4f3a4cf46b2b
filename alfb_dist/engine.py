"""The DeepSpeed seam: an engine that treats sharded experts rightly, made in one call.

ZeRO, gradient reduction and the optimizer are DeepSpeed's. Three things are mended here, each pinned by a test:
on CPU no operator is compiled at start; without ZeRO the clip norm counts each expert once; a step whose gradients are
not finite is skipped at every ZeRO stage and in float32 too.
"""

from __future__ import annotations

import logging
import math
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import deepspeed
import torch
from torch import nn

from alfb_dist.balance import Schedule, check_rule
from alfb_dist.balancer import Balancer, check_mode
from alfb_dist.collectives import all_sum
from alfb_dist.ds_config import check_ds_config, with_defaults
from alfb_dist.moe import sharded_experts
from alfb_dist.sharding import parallelize


def start_without_compiler() -> None:
    """DeepSpeed's CPU backend will not compile its shared-memory operator, which takes a minute and a compiler."""
    if deepspeed.get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def global_grad_norm(engine: Any) -> float:
    """The L2 norm of the reduced gradients over the whole model, each expert counted once; collective.

    Reads `param.grad`, so it is for engines without ZeRO. inf or nan if any gradient on any rank is.
    """
    experts = {id(p) for _, m in sharded_experts(engine.module) for p in m.parameters()}
    grid = sharded_experts(engine.module)[0][1].grid
    assert grid is not None
    dense, expert = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for p in engine.module.parameters():
        if p.grad is not None:
            square = torch.linalg.vector_norm(p.grad, dtype=torch.float32).to(torch.float64).square()
            if id(p) in experts:
                expert += square
            else:
                dense += square
    # The dense gradients are equal on all ranks up to rounding; their mean makes the norm equal to the last bit.
    world = grid.world_group.size()
    sums = all_sum(torch.stack([dense / world, expert * grid.ep_degree / world]), grid.world_group)
    return math.sqrt(total) if math.isfinite(total := float(sums.sum())) else total


def _guard_plain_optimizer(engine: Any) -> None:
    """Without ZeRO in float32: the true norm clips, and a step that is not finite is skipped on all ranks.

    DeepSpeed would clip by the mean over ranks of each rank's norm, in which an expert counts by the ranks it is not
    on, and would step into NaN.
    """
    optimizer, max_norm = engine.optimizer, engine.gradient_clipping()
    inner: Callable[[], Any] = optimizer.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        norm = global_grad_norm(engine)
        self._global_grad_norm, self.overflow = norm, not math.isfinite(norm)
        if self.overflow:
            return None
        if max_norm > 0 and norm > max_norm:
            for p in engine.module.parameters():
                if p.grad is not None:
                    p.grad.mul_(max_norm / (norm + 1e-6))
        return inner(*args, **kwargs)

    optimizer.step = types.MethodType(step, optimizer)
    engine.clip_fp32_gradients = lambda: None


def _guard_bf16_optimizer(engine: Any) -> None:
    """Without ZeRO in bfloat16: the true norm clips, and training starts at Adam's first step.

    DeepSpeed's norm leaves the experts out. To allocate its states it takes a step with zero gradients, which counts in
    Adam's bias correction and decays the weights; both are undone here.
    """
    optimizer = engine.optimizer
    optimizer.optimizer.state.clear()
    for wide, narrow in zip(optimizer.fp32_groups, optimizer.fp16_groups):
        for fp32, bf16 in zip(wide, narrow):
            fp32.data.copy_(bf16.data)
    inner = optimizer.unscale_and_clip_grads

    def unscale_and_clip_grads(self: Any, total_norm: Any, apply_scale: bool = True) -> Any:
        self._global_grad_norm = global_grad_norm(engine)
        return inner(self._global_grad_norm, apply_scale)

    optimizer.unscale_and_clip_grads = types.MethodType(unscale_and_clip_grads, optimizer)


def _mend(engine: Any) -> None:
    if engine.zero_optimization():
        if engine.bfloat16_enabled() and hasattr(engine.optimizer, "check_grad_overflow"):
            engine.optimizer.check_grad_overflow = True  # float32 is checked by its norm
    elif engine.bfloat16_enabled():
        _guard_bf16_optimizer(engine)
    elif not engine.fp16_enabled():
        _guard_plain_optimizer(engine)


def _check_trained(model: nn.Module, model_parameters: Any, optimizer: Any) -> None:
    """Nothing, or ValueError if parameters are to be trained that the model no longer holds: its unsharded experts."""
    held = {id(p) for p in model.parameters()}
    given = list(model_parameters or []) + list(getattr(optimizer, "param_groups", []))
    for group in given:
        for p in group["params"] if isinstance(group, dict) else [group]:
            if id(p) not in held:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} is to be trained but not in the model: sharding replaces "
                    "the experts' parameters; give model_parameters or optimizer as a function"
                )


def initialize(
    model: nn.Module,
    ds_config: dict[str, Any],
    *,
    ep_degree: int,
    rule: str = "sign",
    rate: float | Schedule = 1e-3,
    centered: bool = False,
    mode: str | Sequence[str] = "train",
    sequence_loss_alpha: float = 0.0,
    batch_loss_alpha: float = 0.0,
    timeout_seconds: float = 600,
    model_parameters: Any = None,
    **deepspeed_arguments: Any,
) -> tuple[Any, Balancer]:
    """A DeepSpeed engine around the model with its experts sharded, and its Balancer; collective.

    The same as `parallelize`, `deepspeed.initialize` and `Balancer` after each other; see those for the arguments.
    ds_config: a DeepSpeed configuration with ZeRO stage 0, 1 or 2. Steps whose gradients are not finite are skipped,
        with float32 too. On CPU, Adam and AdamW are torch's.
    model_parameters: what to train, as parameters or groups of them with names; or a function that makes these from
        the parallelised model, whose experts are new parameters. All that require gradients unless given.
    deepspeed_arguments: more for `deepspeed.initialize`, such as optimizer or lr_scheduler.
    Raises ValueError before anything starts if the configuration, the sizes or the rule are not valid.
    """
    check_ds_config(ds_config)
    check_rule(rule, rate(0) if callable(rate) else rate)
    check_mode(mode)
    parallelize(
        model,
        ep_degree=ep_degree,
        sequence_loss_alpha=sequence_loss_alpha,
        batch_loss_alpha=batch_loss_alpha,
        timeout_seconds=timeout_seconds,
    )
    if callable(model_parameters):
        model_parameters = model_parameters(model)
    _check_trained(model, model_parameters, deepspeed_arguments.get("optimizer"))
    start_without_compiler()
    engine = deepspeed.initialize(
        model=model, config=with_defaults(ds_config), model_parameters=model_parameters, **deepspeed_arguments
    )[0]
    _mend(engine)
    return engine, Balancer(engine, rule=rule, rate=rate, centered=centered, mode=mode)


def quiet(level: int = logging.WARNING) -> None:
    """DeepSpeed logs only what matters, and its calls of what torch renames are not warned about once a process."""
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
    deepspeed.utils.logging.logger.setLevel(level)

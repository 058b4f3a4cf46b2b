"""Patches of a DeepSpeed 0.19 engine that has sharded experts. A test pins each of them.

Without ZeRO the clip norm counts each expert once. A step whose gradients are not finite is skipped at every ZeRO
stage, in float32 too. Training in bfloat16 without ZeRO starts at Adam's first step.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import torch

from alfb_dist.distributed.collectives import all_sum
from alfb_dist.moe.sharded_experts import sharded_experts


def global_grad_norm(engine: Any) -> float:
    """Return the L2 norm of the reduced gradients of the whole model, each expert counted once; collective.

    Reads `param.grad`, so the engine must be without ZeRO. Returns inf or nan if a gradient on any rank has one.
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
    # Dense gradients are equal on all ranks up to rounding; their mean makes the norm equal to the last bit.
    world = grid.world_group.size()
    sums = all_sum(torch.stack([dense / world, expert * grid.ep_degree / world]), grid.world_group)
    return math.sqrt(total) if math.isfinite(total := float(sums.sum())) else total


def _guard_plain_optimizer(engine: Any) -> None:
    """Clip by the true norm and skip steps that are not finite, in float32 without ZeRO.

    DeepSpeed would clip by the mean of the ranks' norms, each with its own experts only, and would step into NaN.
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
    """Clip by the true norm and start at Adam's first step, in bfloat16 without ZeRO.

    DeepSpeed's norm leaves the experts out. To allocate Adam's state it takes a step with zero gradients, which counts
    in the bias correction and decays the weights; both are undone here.
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


def patch_engine(engine: Any) -> None:
    """Make the engine clip by the true norm and skip steps that are not finite, at every ZeRO stage.

    Idempotent. An engine without sharded experts is left as it is.
    """
    if getattr(engine, "_alfb_patched", False) or not sharded_experts(engine.module):
        return
    engine._alfb_patched = True
    if engine.zero_optimization():
        if engine.bfloat16_enabled() and hasattr(engine.optimizer, "check_grad_overflow"):
            engine.optimizer.check_grad_overflow = True  # float32 is checked by its norm
    elif engine.bfloat16_enabled():
        _guard_bf16_optimizer(engine)
    elif not engine.fp16_enabled():
        _guard_plain_optimizer(engine)

"""The update rules of auxiliary-loss-free load balancing, and schedules for their rate. Pure functions.

A rule turns the loads of one finished step into a direction per expert, which `update_bias` scales by the rate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rule = Callable[[Tensor], Tensor]
Schedule = Callable[[int], float]


def _sign(load_LE: Tensor) -> Tensor:
    """Return sign(mean - load), exact in integers. Source: arXiv:2408.15664, algorithm 1."""
    return torch.sign(load_LE.sum(-1, keepdim=True) - load_LE.shape[-1] * load_LE).to(torch.float64)


def _share_error(load_LE: Tensor) -> Tensor:
    """Return each expert's target share of the load, 1 / E, minus its share; 0 where a layer has no load."""
    total = load_LE.sum(-1, keepdim=True)
    share = load_LE.to(torch.float64) / total.clamp(min=1).to(torch.float64)
    return torch.where(total > 0, 1.0 / load_LE.shape[-1] - share, 0.0)


def _proportional(load_LE: Tensor) -> Tensor:
    """Return the share error. Sources: LongCat-Flash; the proportional rule of arXiv:2408.15664 up to scale."""
    return _share_error(load_LE)


def _rms(load_LE: Tensor) -> Tensor:
    """Return the share error over its root mean square, a move of one rate on average. Source: kexue.fm 10757."""
    error = _share_error(load_LE)
    rms = error.square().mean(-1, keepdim=True).sqrt()
    return torch.where(rms > 0, error / rms.clamp(min=1e-300), 0.0)


RULES: dict[str, Rule] = {"sign": _sign, "proportional": _proportional, "rms": _rms}


def check_rule(rule: str, rate: float) -> None:
    """Raise ValueError if the rule is unknown or the rate is negative or not finite."""
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not 0 <= rate < float("inf"):
        raise ValueError(f"rate must be a finite number >= 0, got {rate}")


def update_bias(bias_LE: Tensor, load_LE: Tensor, *, rate: float, rule: str = "sign", centered: bool = False) -> Tensor:
    """Return the routing biases, moved one step toward equal expert load.

    bias_LE: float32, score units, any leading dimensions; decides selection only, never combine weights.
    load_LE: int64, same shape: tokens per expert over the global batch, already summed over ranks.
    rate: score units per optimizer step, >= 0; 0 freezes the bias.
    rule: "sign" moves every expert by one rate, "proportional" by the rate times its share error (1/E - share),
        "rms" by the rate times that error over its root mean square.
    centered: subtract the mean of the move, so that the mean of the bias never drifts.
    Raises ValueError for any other shape, dtype, rule or rate. Source: arXiv:2408.15664, algorithm 1.
    """
    check_rule(rule, rate)
    if bias_LE.shape != load_LE.shape:
        raise ValueError(f"bias {tuple(bias_LE.shape)} and load {tuple(load_LE.shape)} must have the same shape")
    if bias_LE.dtype != torch.float32:
        raise ValueError(f"bias must be float32 (smaller types lose the update), got {bias_LE.dtype}")
    if load_LE.dtype != torch.int64:
        raise ValueError(f"load must be int64 (floats lose counts and flip signs), got {load_LE.dtype}")
    direction = RULES[rule](load_LE)
    if centered:
        direction = direction - direction.mean(-1, keepdim=True)
    return bias_LE + (rate * direction).to(torch.float32)


def rate_schedule(rate: float, *, warmup_steps: int = 0, zero_at_step: int | None = None) -> Schedule:
    """Return a function from the optimizer step (the first is 0) to its rate.

    The rate rises linearly over `warmup_steps`, stays, and is 0 from `zero_at_step` on, as in the last 500B tokens of
    DeepSeek-V3. Raises ValueError if `warmup_steps` is negative or `zero_at_step` not beyond it.
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be >= 0, got {warmup_steps}")
    if zero_at_step is not None and zero_at_step <= warmup_steps:
        raise ValueError(f"zero_at_step ({zero_at_step}) must be greater than warmup_steps ({warmup_steps})")

    def at(step: int) -> float:
        if zero_at_step is not None and step >= zero_at_step:
            return 0.0
        return rate * min(1.0, (step + 1) / warmup_steps) if warmup_steps else rate

    return at

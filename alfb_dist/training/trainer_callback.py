"""Balancing in transformers' Trainer: one callback, with or without DeepSpeed."""

from __future__ import annotations

import base64
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.trainer_callback import CallbackHandler, ExportableState, TrainerCallback

from alfb_dist.balance import metrics
from alfb_dist.engine.autoep import watch_autoep
from alfb_dist.engine.balancer import Balancer, rate_of
from alfb_dist.engine.balancing import Balancing
from alfb_dist.moe.parallelize import watch
from alfb_dist.pretrained.origins import find_origins


class BalanceCallback(TrainerCallback, ExportableState):
    """A callback that balances the experts of a Trainer's model: `Trainer(..., callbacks=[BalanceCallback()])`.

    rule, rate, centered, mode: see `Balancer`, which is made when training begins and acts after each applied optimizer
        step. Tokens of every micro-batch count once, those of evaluations never. rate: a number.
    warmup_steps, zero_at_step: see `alfb_dist.balance.update_rule.rate_schedule`.

    Works in one process, with DistributedDataParallel and with DeepSpeed, AutoEP included, if every rank has distinct
    tokens. Adds max_violation_batch, bias_range and dead_experts to each training log. A resumed training continues
    with the biases and the schedule's step of its checkpoint.
    Raises ValueError if an argument is not valid, and when training begins if the model has no selection bias.
    """

    def __init__(
        self,
        *,
        rule: str = "sign",
        rate: float = 1e-3,
        centered: bool = False,
        mode: str | Sequence[str] = "train",
        warmup_steps: int = 0,
        zero_at_step: int | None = None,
    ) -> None:
        if callable(rate):
            raise ValueError("rate must be a number, since Trainer saves it; see warmup_steps and zero_at_step")
        self.balancing = Balancing(
            rule=rule,
            rate=rate,
            centered=centered,
            mode=mode if isinstance(mode, str) else list(mode),
            warmup_steps=warmup_steps,
            zero_at_step=zero_at_step,
        )
        rate_of(self.balancing)
        self.balancer: Balancer | None = None
        """Made when training begins."""
        self.saved: dict[str, Any] | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Make the biases float32 before anything casts them, and let a checkpoint be loaded with its experts."""
        if isinstance(model, nn.Module) and watch(model):
            model.register_load_state_dict_pre_hook(_before_load)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Make the Balancer; collective."""
        if args.n_gpu > 1:
            raise ValueError(
                f"one process with {args.n_gpu} GPUs trains copies of the model, whose loads are lost: "
                "start one process for each GPU with torchrun, accelerate launch or deepspeed"
            )
        _move_before_reports(self)
        self.balancer = Balancer.from_settings(model, self.balancing)
        if state.global_step > 0:
            self._restore(self.saved or _found(state, type(self).__name__))

    def _restore(self, saved: dict[str, Any] | None) -> None:
        balancer = self.balancer
        assert balancer is not None
        if saved is None:  # a checkpoint of a training without this callback
            return
        values = np.frombuffer(base64.b64decode(saved["bias"]), dtype="<f4").astype(np.float32)
        bias_LE = torch.from_numpy(values).reshape(saved["shape"])
        load_LE = torch.zeros_like(bias_LE, dtype=torch.int64)
        balancer.load_state_dict({"num_steps": saved["num_steps"], "bias_LE": bias_LE, "load_LE": load_LE})

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Update the biases, unless the step was skipped (a gradient overflow); collective."""
        assert self.balancer is not None
        self.balancer.step(applied=not getattr(optimizer, "step_was_skipped", False))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Add the balance to each log of the training loss, and to Trainer's history."""
        if self.balancer is None or logs is None or "loss" not in logs:
            return
        load_LE = self.balancer.load_LE
        figures = {
            "max_violation_batch": float(metrics.max_violation(load_LE).mean()),
            "bias_range": metrics.bias_range(self.balancer.bias_LE),
            "dead_experts": metrics.dead_experts(load_LE),
        }
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)

    def state(self) -> dict[str, Any]:
        """Return what Trainer saves in trainer_state.json, biases included: a cast may have rounded the model's."""
        saved = None if self.balancer is None else _packed(self.balancer)
        return {"args": asdict(self.balancing), "attributes": {"saved": saved}}


def _packed(balancer: Balancer) -> dict[str, Any]:
    bias_LE = balancer.bias_LE.cpu()
    text = base64.b64encode(bias_LE.numpy().astype("<f4").tobytes()).decode("ascii")
    return {"num_steps": balancer.num_steps, "shape": list(bias_LE.shape), "bias": text}


def _before_load(model: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Give AutoEP's routers their biases and stack the experts, so that the whole state dict fits the model."""
    watch_autoep(model)
    _stack_experts(model, state_dict)


def _stack_experts(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Stack the experts of a state dict that has them one by one, as the model has them.

    transformers 5.23 writes them so. Its Trainer then looks for the model's names, finds none, and keeps the experts
    that the model had. A state dict that is not the whole model is left as it is, for transformers to report.
    """
    try:
        origins = find_origins(model, {name: tuple(x.shape) for name, x in state_dict.items()})
    except ValueError:
        return
    for name, origin in origins.items():
        if origin.whole is None and origin.stacked and all(origin.parts):
            parts = [torch.cat([state_dict.pop(n) for n in names]) for names in origin.parts]
            state_dict[name] = torch.stack(parts)
        elif origin.whole not in (None, name):
            state_dict[name] = state_dict.pop(origin.whole)


def _found(state: Any, name: str) -> dict[str, Any] | None:
    """Return what a callback of this name saved in the checkpoint that Trainer resumes from, or None."""
    kept = state.stateful_callbacks.get(name)
    return None if not isinstance(kept, dict) else kept.get("attributes", {}).get("saved")


def _move_before_reports(callback: TrainerCallback) -> None:
    """Move the callback ahead of those that report, so that wandb and others see what it adds to a log.

    Trainer puts its own reporting callbacks first and gives the list to no one: it is found in the calling frame. If
    that changes, the additions reach only later callbacks, such as the progress bar, and Trainer's history.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is not None:
        callbacks = frame.f_locals["self"].callbacks
        if callback in callbacks[2:]:  # index 1: right after the one that decides when to log
            callbacks.remove(callback)
            callbacks.insert(1, callback)

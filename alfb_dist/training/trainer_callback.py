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
    """Keeps the experts of the model that a Trainer trains in balance: `Trainer(..., callbacks=[BalanceCallback()])`.

    rule, rate, centered, mode: see `Balancer`, which this makes as training begins and steps after each optimizer step
        that was applied. Tokens of every micro-batch count once; those of evaluations do not.
    warmup_steps, zero_at_step: see `alfb_dist.balance.update_rule.rate_schedule`.
    Works in one process, in DistributedDataParallel and on DeepSpeed, AutoEP included, with every rank holding distinct
    tokens. Each training log gets max_violation_batch, bias_range and dead_experts. A resumed training goes on with the
    biases and the step of the schedule that its checkpoint was saved with.
    Raises ValueError if an argument is not valid, and as training begins if the model has no selection bias.
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
        """Made as training begins."""
        self.saved: dict[str, Any] | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The biases are float32 from now on, before anything casts them or a checkpoint is read into them; which is
        read whole, experts included."""
        if isinstance(model, nn.Module) and watch(model):
            model.register_load_state_dict_pre_hook(_make_ready)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The Balancer is made; collective."""
        if args.n_gpu > 1:
            raise ValueError(
                f"one process with {args.n_gpu} GPUs trains copies of the model, whose loads are lost; "
                "start one process for each GPU with torchrun, accelerate launch or deepspeed"
            )
        _move_before_reports(self)
        self.balancer = Balancer.from_settings(model, self.balancing)
        if state.global_step > 0:
            self._go_on(self.saved or _found(state, type(self).__name__))

    def _go_on(self, saved: dict[str, Any] | None) -> None:
        balancer = self.balancer
        assert balancer is not None
        if saved is None:  # the checkpoint of a training without this callback
            return
        values = np.frombuffer(base64.b64decode(saved["bias"]), dtype="<f4").astype(np.float32)
        bias_LE = torch.from_numpy(values).reshape(saved["shape"])
        load_LE = torch.zeros_like(bias_LE, dtype=torch.int64)
        balancer.load_state_dict({"num_steps": saved["num_steps"], "bias_LE": bias_LE, "load_LE": load_LE})

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """The biases have moved, unless the step was skipped (a gradient overflow); collective."""
        assert self.balancer is not None
        self.balancer.step(applied=not getattr(optimizer, "step_was_skipped", False))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """A log of the training loss tells of the balance too, as does Trainer's history."""
        if self.balancer is None or logs is None or "loss" not in logs:
            return
        load_LE = self.balancer.load_LE
        told = {
            "max_violation_batch": float(metrics.max_violation(load_LE).mean()),
            "bias_range": metrics.bias_range(self.balancer.bias_LE),
            "dead_experts": metrics.dead_experts(load_LE),
        }
        logs.update(told)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(told)

    def state(self) -> dict[str, Any]:
        """What Trainer writes into trainer_state.json; the biases too, since a cast may have rounded the model's."""
        saved = None if self.balancer is None else _packed(self.balancer)
        return {"args": asdict(self.balancing), "attributes": {"saved": saved}}


def _packed(balancer: Balancer) -> dict[str, Any]:
    bias_LE = balancer.bias_LE.cpu()
    text = base64.b64encode(bias_LE.numpy().astype("<f4").tobytes()).decode("ascii")
    return {"num_steps": balancer.num_steps, "shape": list(bias_LE.shape), "bias": text}


def _make_ready(model: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """All of a state dict has its place in the model: biases that AutoEP's routers get here, and experts."""
    watch_autoep(model)
    _stack_experts(model, state_dict)


def _stack_experts(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """Experts that stand one by one in a state dict are put together as the model has them.

    So transformers 5.23 writes them; its Trainer then loads them by the model's names, finds none, and goes on with
    the experts that the model had. What is not the whole of the model is left as it is, for transformers to tell.
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
    """What a callback of this name had saved in the checkpoint that the Trainer resumes from."""
    kept = state.stateful_callbacks.get(name)
    return None if not isinstance(kept, dict) else kept.get("attributes", {}).get("saved")


def _move_before_reports(callback: TrainerCallback) -> None:
    """The callback is called ahead of those that report, so that what it adds to a log reaches wandb and the others.

    Trainer puts its own reporting callbacks first and hands the list to no one: it is found in the calling frame. Where
    that changes, the additions reach only what comes later, such as the progress bar, and Trainer's history.
    """
    frame: Any = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is not None:
        callbacks = frame.f_locals["self"].callbacks
        if callback in callbacks[2:]:  # now right behind the one that decides when to log; none is passed over
            callbacks.remove(callback)
            callbacks.insert(1, callback)

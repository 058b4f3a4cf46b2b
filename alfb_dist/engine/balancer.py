"""The Balancer: after each optimizer step, one all-reduce of all loads and the same bias update on every rank."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alfb_dist.balance.update_rule import Schedule, check_rule, rate_schedule, update_bias
from alfb_dist.config.settings import Balancing
from alfb_dist.distributed.collectives import Group, all_sum, broadcast_, size, world_group
from alfb_dist.engine.autoep import watch_autoep
from alfb_dist.engine.patches import mend
from alfb_dist.moe.parallelize import watch
from alfb_dist.moe.sharded_experts import sharded_experts
from alfb_dist.profiling import span


def rate_of(balancing: Balancing) -> Schedule:
    """Return the function from the optimizer step (the first is 0) to its rate.

    Raises ValueError if the rule is unknown, the rate is not a finite number >= 0, or the schedule's steps cross.
    """
    rate = balancing.rate
    if callable(rate):
        check_rule(balancing.rule, rate(0))
        return rate
    check_rule(balancing.rule, rate)
    return rate_schedule(rate, warmup_steps=balancing.warmup_steps, zero_at_step=balancing.zero_at_step)


def _mode_of_layers(mode: str | Sequence[str], num_layers: int) -> list[str]:
    modes = [mode] * num_layers if isinstance(mode, str) else list(mode)
    if len(modes) != num_layers:
        raise ValueError(f"mode must be given for each of the {num_layers} MoE layers or for all, got {len(modes)}")
    return modes


def _check_adapters(model: nn.Module) -> None:
    """Nothing, or ValueError if sharded experts carry adapters, which DeepSpeed would average over unlike experts."""
    for name, experts in sharded_experts(model):
        if name.endswith("base_layer") and experts.ep_size > 1:
            raise ValueError(
                f"{name}: adapters of experts need ep_degree 1, got {experts.ep_size}; leave the experts frozen "
                "(target attention only), or train them in full"
            )


class Balancer:
    """Keeps the selection biases of a model's gates in balance.

    engine_or_model: a DeepSpeed engine, with experts sharded by `parallelize` or by DeepSpeed's own AutoEP; or a model
        trained by another loop.
    rule, rate, centered: see `update_bias`. `rate` is a number, or a function from the step (the first is 0) to one,
        such as `alfb_dist.balance.update_rule.rate_schedule` makes.
    mode: what happens to the biases, for all MoE layers or one for each in the model's order. "train" moves them from
        where they are; "freeze" never moves them, while loads are counted and reported all the same; "recentre" takes
        each layer's mean out of its bias once, now, and trains. That leaves the routing as it was and brings back the
        bits that a bias far from 0 has no room for.
    group: the ranks that hold distinct tokens; all ranks unless given.
    An engine with sharded experts is mended where DeepSpeed mistakes them (see mend.py).
    Making one is collective: the biases become those of the group's first rank. Raises ValueError if the model has no
    gate with a selection bias, or its gates differ in their number of experts, or the rule, rate or mode is not valid,
    or peft's adapters sit on experts that are sharded over several ranks.
    """

    def __init__(
        self,
        engine_or_model: Any,
        *,
        rule: str = "sign",
        rate: float | Schedule = 1e-3,
        centered: bool = False,
        mode: str | Sequence[str] = "train",
        group: Group = None,
    ) -> None:
        self._start(engine_or_model, Balancing(rule=rule, rate=rate, centered=centered, mode=mode), group)

    @classmethod
    def from_settings(cls, engine_or_model: Any, balancing: Balancing, group: Group = None) -> Balancer:
        """Return the Balancer of these settings; collective."""
        balancer = cls.__new__(cls)
        balancer._start(engine_or_model, balancing, group)
        return balancer

    def _start(self, engine_or_model: Any, balancing: Balancing, group: Group) -> None:
        self.balancing, self._rate = balancing, rate_of(balancing)
        self.group = group or world_group()
        self.engine: Any = engine_or_model if hasattr(engine_or_model, "was_step_applied") else None
        model: nn.Module = engine_or_model if self.engine is None else self.engine.module
        if self.engine is not None:
            mend(self.engine)
        _check_adapters(model)
        self.gates = watch_autoep(model, group) or watch(model)
        if not self.gates:
            raise ValueError(f"{type(model).__name__} has no MoE block with a gate that carries a selection bias")
        sizes = {gate.bias_E.numel() for gate in self.gates}
        if len(sizes) > 1:
            raise ValueError(f"all MoE layers must have the same number of experts, got {sorted(sizes)}")
        self.modes = _mode_of_layers(balancing.mode, len(self.gates))
        self._told_idle = False
        self.num_steps = 0
        """Optimizer steps so far; skipped steps do not count."""
        self.load_LE = torch.zeros(len(self.gates), sizes.pop(), dtype=torch.int64, device=self.gates[0].bias_E.device)
        """int64: the global load of the last finished step, zero before the first."""
        self._seen_steps = 0 if self.engine is None else self.engine.global_steps
        self.start_from(self.bias_LE)

    @property
    def bias_LE(self) -> Tensor:
        """float32: the biases as they are now, a copy."""
        return torch.stack([gate.bias_E.detach().flatten() for gate in self.gates]).float()

    def start_from(self, bias_LE: Tensor) -> None:
        """The biases are the first rank's of these, in layers to recentre without their mean; collective.

        bias_LE: float32, what a training begins with; it is the first rank's afterwards.
        """
        broadcast_(bias_LE, self.group)
        exact_LE = bias_LE.double()
        centred_LE = (exact_LE - exact_LE.mean(-1, keepdim=True)).float()
        self._set_bias(torch.where(self._has_mode("recentre"), centred_LE, bias_LE))

    def _has_mode(self, mode: str) -> Tensor:
        """Whether each layer has this mode: (L, 1)."""
        return torch.tensor([[one == mode] for one in self.modes], device=self.load_LE.device)

    def _set_bias(self, bias_LE: Tensor) -> None:
        with torch.no_grad():
            for gate, bias_E in zip(self.gates, bias_LE):
                gate.bias_E.copy_(bias_E.view_as(gate.bias_E))

    def _take_pending(self) -> Tensor:
        """This rank's loads since the last optimizer step; the gates start over from 0."""
        pending = [gate.pending_load_E for gate in self.gates]
        for gate in self.gates:
            gate.pending_load_E = None
        zero_E = torch.zeros_like(self.load_LE[0])
        return torch.stack([zero_E if load_E is None else load_E for load_E in pending])

    def _step_happened(self) -> bool:
        """Whether the engine took an optimizer step since the last call: False between accumulation boundaries."""
        if self.engine is None:
            return True
        seen, self._seen_steps = self._seen_steps, self.engine.global_steps
        return self._seen_steps != seen

    @torch.no_grad()
    def step(self, *, applied: bool | None = None) -> bool:
        """The biases have moved by the loads of the optimizer step just taken; whether they did. Collective.

        Call it after every engine.step(), or after every optimizer.step() of another loop. Between accumulation
        boundaries of an engine it does nothing. A step that was not applied (overflow, NaN) drops its loads and leaves
        biases and `load_LE` as they were. applied: what the loop knows of that; an engine knows itself.
        Raises RuntimeError on every rank if some ranks applied the step and others did not.
        """
        with span("bias"):
            return self._step(applied)

    def _step(self, applied: bool | None) -> bool:
        if not self._step_happened():
            return False
        if applied is None:
            applied = True if self.engine is None else bool(self.engine.was_step_applied())
        flag = torch.full((1,), int(applied), dtype=torch.int64, device=self.load_LE.device)
        total = all_sum(torch.cat([self._take_pending().flatten(), flag]), self.group)
        num_applied = int(total[-1])
        if num_applied not in (0, size(self.group)):
            raise RuntimeError(f"{num_applied} of {size(self.group)} ranks applied the optimizer step, the others not")
        if not num_applied:
            return False
        self.load_LE = total[:-1].view_as(self.load_LE)
        if not self.load_LE.any() and not self._told_idle:
            self._told_idle = True
            warnings.warn(
                "no token was counted in this step: is the model in training mode (model.train())?", stacklevel=2
            )
        rate, bias_LE = self._rate(self.num_steps), self.bias_LE
        rule, centered = self.balancing.rule, self.balancing.centered
        moved_LE = update_bias(bias_LE, self.load_LE, rate=rate, rule=rule, centered=centered)
        self._set_bias(torch.where(self._has_mode("freeze"), bias_LE, moved_LE))
        self.num_steps += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's own buffers."""
        return {"num_steps": self.num_steps, "bias_LE": self.bias_LE, "load_LE": self.load_LE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The state is as it was saved. Raises ValueError if the shapes do not fit this model."""
        if state["bias_LE"].shape != self.load_LE.shape:
            saved, here = tuple(state["bias_LE"].shape), tuple(self.load_LE.shape)
            raise ValueError(f"the saved biases {saved} do not fit this model's (layers, experts) {here}")
        self.num_steps = int(state["num_steps"])
        self.load_LE = state["load_LE"].to(self.load_LE)
        self._set_bias(state["bias_LE"].to(self.load_LE.device))
        self._take_pending()
        self._seen_steps = 0 if self.engine is None else self.engine.global_steps

"""The Balancer: after each optimizer step one all-reduce of all loads, and the same bias update on every rank."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from alfb_dist.balance.update_rule import Schedule, check_rule, rate_schedule, update_bias
from alfb_dist.distributed.collectives import Group, all_sum, broadcast_, size, world_group
from alfb_dist.engine.autoep import watch_autoep
from alfb_dist.engine.balancing import Balancing
from alfb_dist.engine.patches import patch_engine
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
    """Raise ValueError if sharded experts carry adapters, which DeepSpeed would average over different experts."""
    for name, experts in sharded_experts(model):
        if name.endswith("base_layer") and experts.ep_size > 1:
            raise ValueError(
                f"{name}: adapters of experts need ep_degree 1, got {experts.ep_size}; leave the experts frozen "
                "(target attention only), or train them in full"
            )


class Balancer:
    """The loads of a model's MoE layers, and the selection biases that follow them.

    engine_or_model: a DeepSpeed engine, with experts sharded by `parallelize` or by DeepSpeed's own AutoEP; or a model
        trained by another loop. An engine with sharded experts is patched (see patches.py).
    rule, rate, centered: see `update_bias`. `rate` is a number or a function from the optimizer step (the first is 0)
        to one, such as `alfb_dist.balance.update_rule.rate_schedule` returns.
    mode: what happens to the biases, for all MoE layers or one mode for each in the model's order. "train" moves them
        from where they are. "freeze" never moves them; loads are counted and reported all the same. "recentre"
        subtracts each layer's mean from its bias once, now, and then trains: the routing stays, and the bias regains
        the low bits that float32 cannot hold far from 0.
    group: the ranks that hold distinct tokens; all ranks by default.

    The constructor is collective: the biases become those of the group's first rank. Raises ValueError if the model
    has no gate with a selection bias, its gates differ in their number of experts, the rule, rate or mode is not
    valid, or peft's adapters sit on experts that are sharded over several ranks.
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
        self.rule, self.centered = balancing.rule, balancing.centered
        schedule = rate_of(balancing)
        plain = not balancing.warmup_steps and balancing.zero_at_step is None
        self.rate: float | Schedule = balancing.rate if plain else schedule
        self.group = group or world_group()
        self.engine: Any = engine_or_model if hasattr(engine_or_model, "was_step_applied") else None
        model: nn.Module = engine_or_model if self.engine is None else self.engine.module
        if self.engine is not None:
            patch_engine(self.engine)
        _check_adapters(model)
        self.gates = watch_autoep(model, group) or watch(model)
        if not self.gates:
            raise ValueError(f"{type(model).__name__} has no MoE block with a gate that carries a selection bias")
        sizes = {gate.bias_E.numel() for gate in self.gates}
        if len(sizes) > 1:
            raise ValueError(f"all MoE layers must have the same number of experts, got {sorted(sizes)}")
        self.modes = _mode_of_layers(balancing.mode, len(self.gates))
        self._warned_idle = False
        self.num_steps = 0
        """Updates so far. Skipped optimizer steps do not count."""
        self.load_LE = torch.zeros(len(self.gates), sizes.pop(), dtype=torch.int64, device=self.gates[0].bias_E.device)
        """The load of the last applied optimizer step over all ranks, int64 (L, E); 0 before the first."""
        self._last_update_LE: Tensor | None = None
        self._seen_steps = 0 if self.engine is None else self.engine.global_steps
        self.start_from(self.bias_LE)

    @property
    def bias_LE(self) -> Tensor:
        """A copy of the biases, float32 (L, E)."""
        return torch.stack([gate.bias_E.detach().flatten() for gate in self.gates]).float()

    def start_from(self, bias_LE: Tensor) -> None:
        """Set the biases to the first rank's bias_LE, without its mean in layers to recentre; collective.

        bias_LE: float32, overwritten with the first rank's.
        """
        broadcast_(bias_LE, self.group)
        exact_LE = bias_LE.double()
        recentred_LE = (exact_LE - exact_LE.mean(-1, keepdim=True)).float()
        self._set_bias(torch.where(self._has_mode("recentre"), recentred_LE, bias_LE))

    def _has_mode(self, mode: str) -> Tensor:
        """Return which layers have the mode, bool (L, 1)."""
        return torch.tensor([[m == mode] for m in self.modes], device=self.load_LE.device)

    def _set_bias(self, bias_LE: Tensor) -> None:
        with torch.no_grad():
            for gate, bias_E in zip(self.gates, bias_LE):
                gate.bias_E.copy_(bias_E.view_as(gate.bias_E))

    def _take_pending(self) -> Tensor:
        """Return this rank's loads since the last optimizer step and reset the gates to 0."""
        pending = [gate.pending_load_E for gate in self.gates]
        for gate in self.gates:
            gate.pending_load_E = None
        zero_E = torch.zeros_like(self.load_LE[0])
        return torch.stack([zero_E if load_E is None else load_E for load_E in pending])

    def _step_happened(self) -> bool:
        """Return whether the engine has reached an accumulation boundary since the last call."""
        if self.engine is None:
            return True
        seen, self._seen_steps = self._seen_steps, self.engine.global_steps
        return self._seen_steps != seen

    def step(self, *, applied: bool | None = None) -> bool:
        """Reduce the loads of the optimizer step just taken and update the biases; collective.

        Call it after every engine.step(), or after every optimizer.step() of another loop. Returns False, with nothing
        changed, where `reduce_loads` returns None. applied, errors: see there.
        """
        with span("bias"):
            return self.update(self.reduce_loads(applied=applied))

    def reduce_loads(self, *, applied: bool | None = None) -> Tensor | None:
        """Return the load of each expert in the optimizer step just taken: int64 (L, E), over all ranks; collective.

        One all-reduce serves all layers. The load is `load_LE` from then on. Returns None and leaves `load_LE` as it
        was between accumulation boundaries of an engine, without communication, and after a step that was not applied
        (overflow, NaN), whose loads are dropped.
        applied: whether the step was applied, where there is no engine to ask.
        Raises RuntimeError on every rank if some ranks applied the step and others did not.
        """
        if not self._step_happened():
            return None
        if applied is None:
            applied = True if self.engine is None else bool(self.engine.was_step_applied())
        flag = torch.full((1,), int(applied), dtype=torch.int64, device=self.load_LE.device)
        total = all_sum(torch.cat([self._take_pending().flatten(), flag]), self.group)
        num_applied, num_ranks = int(total[-1]), size(self.group)
        if num_applied not in (0, num_ranks):
            raise RuntimeError(f"{num_applied} of {num_ranks} ranks applied the optimizer step, the others did not")
        if not num_applied:
            return None
        self.load_LE = total[:-1].view_as(self.load_LE)
        if not self.load_LE.any() and not self._warned_idle:
            self._warned_idle = True
            warnings.warn(
                "no token was counted in this step: is the model in training mode (model.train())?", stacklevel=2
            )
        return self.load_LE

    def update(self, load_LE: Tensor | None) -> bool:
        """Move the biases by the load of one optimizer step. Return whether there was one: None changes nothing.

        load_LE: what `reduce_loads` returned: int64 (L, E), the same on every rank. Not collective.
        Raises ValueError for another shape or dtype, or if this tensor has already moved the biases.
        """
        if load_LE is None:
            return False
        if load_LE is self._last_update_LE:
            raise ValueError("this load has already moved the biases: call reduce_loads() after every optimizer step")
        rate = self.rate(self.num_steps) if callable(self.rate) else self.rate
        bias_LE = self.bias_LE
        moved_LE = update_bias(bias_LE, load_LE, rate=rate, rule=self.rule, centered=self.centered)
        self._set_bias(torch.where(self._has_mode("freeze"), bias_LE, moved_LE))
        self.num_steps += 1
        self._last_update_LE = load_LE
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the model's own buffers."""
        return {"num_steps": self.num_steps, "bias_LE": self.bias_LE, "load_LE": self.load_LE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned and drop pending loads. Raises ValueError if the shapes do not fit."""
        if state["bias_LE"].shape != self.load_LE.shape:
            saved, expected = tuple(state["bias_LE"].shape), tuple(self.load_LE.shape)
            raise ValueError(f"the saved biases {saved} do not fit this model's (layers, experts) {expected}")
        self.num_steps = int(state["num_steps"])
        self.load_LE = state["load_LE"].to(self.load_LE)
        self._set_bias(state["bias_LE"].to(self.load_LE.device))
        self._take_pending()
        self._seen_steps = 0 if self.engine is None else self.engine.global_steps

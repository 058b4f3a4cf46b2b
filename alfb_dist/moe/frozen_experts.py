"""Experts that do not train, such as those beside LoRA on attention, under DeepSpeed's ZeRO."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def allow_frozen_experts() -> None:
    """ZeRO stages 1 and 2 take a model with expert layers of which no expert trains; once, later calls do nothing.

    DeepSpeed 0.19 fails on a group of the optimizer in which nothing trains, and asserts that one group holds experts.
    Here such groups of experts are left out. Where none stays, nothing that is reduced, partitioned or counted in the
    norm is an expert's, so the path for dense models is the right one. All else is as it was.
    """
    inner = DeepSpeedZeroOptimizer._configure_moe_settings
    if getattr(inner, "_alfb_patched", False):
        return

    def _configure_moe_settings(self: Any) -> None:
        groups = self.optimizer.param_groups
        groups[:] = [g for g in groups if not self.is_moe_group(g) or any(p.requires_grad for p in g["params"])]
        del self.real_dp_process_group[len(groups) :], self.partition_count[len(groups) :]  # all alike so far
        if any(self.is_moe_group(group) for group in groups):
            inner(self)
        else:
            self.has_moe_layers, self.is_moe_param_group = False, [False] * len(groups)

    _configure_moe_settings._alfb_patched = True  # type: ignore[attr-defined]
    DeepSpeedZeroOptimizer._configure_moe_settings = _configure_moe_settings

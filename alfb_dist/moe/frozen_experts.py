"""Experts that do not train, as with LoRA on attention only, under DeepSpeed's ZeRO."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer


def allow_frozen_experts() -> None:
    """Patch ZeRO stages 1 and 2 to accept a model whose experts do not train; idempotent.

    DeepSpeed 0.19 fails on an optimizer group in which nothing trains, and asserts that one group holds experts. The
    patch drops such groups of experts. If none is left, no expert is reduced, partitioned or counted in the norm, and
    the path for dense models is right. A model with trained experts takes DeepSpeed's own path.
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

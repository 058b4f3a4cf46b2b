"""How the biases follow the loads: the settings of a Balancer, passed on as one object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from alfb_dist.config.tables import MODES


@dataclass(frozen=True, kw_only=True)
class Balancing:
    """How the selection biases follow the loads; see `alfb_dist.Balancer` and `rate_schedule` for the fields.

    Raises ValueError for an unknown mode, or a schedule's steps together with a rate that is a function.
    `engine.balancer.rate_of` checks the rule's name and the numbers.
    """

    rule: str = "sign"
    rate: float | Callable[[int], float] = 1e-3
    centered: bool = False
    mode: str | Sequence[str] = "train"
    warmup_steps: int = 0
    zero_at_step: int | None = None

    def __post_init__(self) -> None:
        for mode in (self.mode,) if isinstance(self.mode, str) else self.mode:
            if mode not in MODES:
                raise ValueError(
                    f"mode must be one of {', '.join(MODES)}, or one of them for each MoE layer, got {mode!r}"
                )
        if callable(self.rate) and (self.warmup_steps or self.zero_at_step is not None):
            raise ValueError("rate is a function: leave warmup_steps and zero_at_step out")

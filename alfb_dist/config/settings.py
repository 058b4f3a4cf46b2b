"""Two sets of settings that pass through the package as one object each: how experts are sharded, how biases move.

The public functions build them from their arguments; all code behind these passes the objects on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from alfb_dist.config.tables import MODES, Config

START_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How the experts of a model are sharded over ranks; see `alfb_dist.parallelize` for the fields.

    Raises ValueError if a value is not valid for any model.
    """

    ep_degree: int
    max_rows: int = 0
    sequence_loss_alpha: float = 0.0
    batch_loss_alpha: float = 0.0
    timeout_seconds: float = 600

    def __post_init__(self) -> None:
        if not isinstance(self.ep_degree, int) or self.ep_degree < 1:
            raise ValueError(f"ep_degree must be an integer >= 1, got {self.ep_degree!r}")
        if self.max_rows != 0 and self.max_rows < self.ep_degree:
            raise ValueError(f"max_rows must be 0 or at least ep_degree ({self.ep_degree}), got {self.max_rows}")
        for name in ("sequence_loss_alpha", "batch_loss_alpha"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if not 0 < self.timeout_seconds < inf:
            raise ValueError(f"timeout_seconds must be > 0, got {self.timeout_seconds}")

    @property
    def alphas(self) -> tuple[float, float]:
        """The coefficients of the two auxiliary losses."""
        return self.sequence_loss_alpha, self.batch_loss_alpha


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


def start_patience(config: Config) -> float:
    """Return the seconds that ranks wait for each other until training begins: they do not start at the same time."""
    return max(config.run.timeout_seconds, START_SECONDS)


def sharding_of(config: Config) -> Sharding:
    """Return the sharding of a run, with `start_patience` as its timeout: set the run's own when it starts."""
    return Sharding(
        ep_degree=config.parallel.ep_degree,
        max_rows=config.parallel.max_rows,
        sequence_loss_alpha=config.balance.sequence_loss_alpha,
        batch_loss_alpha=config.balance.batch_loss_alpha,
        timeout_seconds=start_patience(config),
    )


def balancing_of(config: Config) -> Balancing:
    """Return the balancing of a run; mode "auto" freezes the biases of a released model and trains a new one's."""
    balance = config.balance
    return Balancing(
        rule=balance.rule,
        rate=balance.rate,
        centered=balance.centered,
        mode=balance.mode if balance.mode != "auto" else "freeze" if config.model.path else "train",
        warmup_steps=balance.warmup_steps,
        zero_at_step=balance.zero_at_step,
    )

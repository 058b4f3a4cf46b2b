"""The settings of the layer and of the Balancer, from a run's configuration."""

from __future__ import annotations

from alfb_dist.config import Config
from alfb_dist.engine.balancing import Balancing
from alfb_dist.moe.sharding import Sharding

START_SECONDS = 120.0


def start_patience(config: Config) -> float:
    """Return the seconds that ranks wait for each other until training begins: they do not start at the same time."""
    return max(config.run.timeout_seconds, START_SECONDS)


def sharding_of(config: Config) -> Sharding:
    """Return the sharding of a run, with `start_patience` as its timeout: `run.start` sets the run's own at the end."""
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

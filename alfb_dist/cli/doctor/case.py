"""What doctor checks: this machine and, if given, the hosts and the configuration of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from alfb_dist.config import Config

if TYPE_CHECKING:
    from alfb_dist.training.estimate import Estimate


@dataclass(frozen=True)
class Case:
    """The configuration and the hosts to check.

    config_problems: why a configuration does not load. hosts: number of ranks by host, empty without a hostfile.
    hostfile_error: why a hostfile cannot be read.
    """

    config: Config | None = None
    config_problems: tuple[str, ...] = ()
    hosts: Mapping[str, int] = field(default_factory=dict)
    hostfile_error: str = ""

    @property
    def world_size(self) -> int:
        """The number of ranks on the hosts, or else the smallest that the configuration allows."""
        return sum(self.hosts.values()) or (self.config.parallel.ep_degree if self.config else 1)

    @property
    def local_ranks(self) -> int:
        """The largest number of ranks on a host."""
        return max(self.hosts.values(), default=self.world_size)

    @cached_property
    def estimate(self) -> Estimate | None:
        """The sizes of the configured run, or None without a configuration."""
        if self.config is None:
            return None
        from alfb_dist.training.estimate import estimate

        return estimate(self.config, self.world_size)

"""What doctor is asked about: this machine, and the hosts and the configuration of a run if they are given."""

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
    """What is given.

    refused: what is wrong with a configuration that does not load. hosts: ranks by host, none without a hostfile.
    """

    config: Config | None = None
    refused: tuple[str, ...] = ()
    hosts: Mapping[str, int] = field(default_factory=dict)
    bad_hostfile: str = ""

    @property
    def world_size(self) -> int:
        """The ranks of the hosts, or the fewest that the configuration takes."""
        return sum(self.hosts.values()) or (self.config.parallel.ep_degree if self.config else 1)

    @property
    def local_ranks(self) -> int:
        """The most ranks that one machine has."""
        return max(self.hosts.values(), default=self.world_size)

    @cached_property
    def estimate(self) -> Estimate | None:
        """The sizes of the configuration's run, or None without one."""
        if self.config is None:
            return None
        from alfb_dist.training.estimate import estimate

        return estimate(self.config, self.world_size)

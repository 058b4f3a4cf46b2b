"""How the experts of a model are sharded: the settings that `parallelize` takes, as one object for those behind it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf


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

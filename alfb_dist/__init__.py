"""Auxiliary-loss-free load balancing (ALF-LB) for expert-parallel Mixture-of-Experts training on DeepSpeed.

Shape suffixes, used all over the package:
    T tokens on this rank        E routed experts            K experts chosen per token (top-k)
    D model width                e experts on this rank      N (token, rank) pairs sent by this rank
    F expert width               L MoE layers                R rows received by this rank
    B sequences, S positions     P ranks of an expert-parallel group
"""

from __future__ import annotations

import importlib
from importlib.machinery import PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "update_bias": "balance.update_rule",
    "BalanceCallback": "training.trainer_callback",
    "Balancer": "engine.balancer",
    "max_violation": "balance.metrics",
    "parallelize": "moe.parallelize",
    "init_distributed": "distributed.topology",
    "initialize": "engine.initialize",
    "from_pretrained": "pretrained",
    "save_pretrained": "pretrained",
}
__all__ = [
    "BalanceCallback",
    "Balancer",
    "from_pretrained",
    "init_distributed",
    "initialize",
    "max_violation",
    "parallelize",
    "save_pretrained",
    "update_bias",
]

if TYPE_CHECKING:
    from alfb_dist.balance.metrics import max_violation
    from alfb_dist.balance.update_rule import update_bias
    from alfb_dist.distributed.topology import init_distributed
    from alfb_dist.engine.balancer import Balancer
    from alfb_dist.engine.initialize import initialize
    from alfb_dist.moe.parallelize import parallelize
    from alfb_dist.pretrained import from_pretrained, save_pretrained
    from alfb_dist.training.trainer_callback import BalanceCallback


class _WithoutCpu(ModuleType):
    """Stands in for `cpu` where its directory is missing: every function returns None, as where it does not apply."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None


def _import_cpu() -> ModuleType:
    # Looked for in this package's own directory: an editable installation elsewhere is not meant.
    spec = PathFinder.find_spec("alfb_dist.cpu", __path__)
    if spec is None or spec.origin is None:
        globals()["cpu"] = _WithoutCpu("alfb_dist.cpu")
        return globals()["cpu"]
    return importlib.import_module("alfb_dist.cpu")


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import alfb_dist` and the command line start without torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"alfb_dist.{_HOMES[name]}"), name)
    if name == "cpu":  # Python asks here before it imports the package
        return _import_cpu()
    raise AttributeError(f"module 'alfb_dist' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

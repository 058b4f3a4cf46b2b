"""Checkpoints of a run: saved all or nothing, verified before use, loadable at another EP size, DP size and ZeRO stage.

A save is a directory `step-00000100` of safetensors files keyed by global parameter and global expert, small JSON files
and `manifest.json`. Only a manifest that verifies makes a save good; `latest` is a hint for people.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "save": "saving",
    "load": "loading",
    "agree_on_newest": "loading",
    "SaveError": "folder",
    "newest_good": "folder",
    "prune": "folder",
    "step_folder": "folder",
    "describe": "verification",
    "verify": "verification",
}
__all__ = [
    "SaveError",
    "agree_on_newest",
    "describe",
    "load",
    "newest_good",
    "prune",
    "save",
    "step_folder",
    "verify",
]

if TYPE_CHECKING:
    from alfb_dist.checkpoint.folder import SaveError, newest_good, prune, step_folder
    from alfb_dist.checkpoint.loading import agree_on_newest, load
    from alfb_dist.checkpoint.saving import save
    from alfb_dist.checkpoint.verification import describe, verify


def __getattr__(name: str) -> Any:
    """Import a name on first use, so that inspecting a save does not need torch."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"alfb_dist.checkpoint.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'alfb_dist.checkpoint' has no attribute {name!r}")

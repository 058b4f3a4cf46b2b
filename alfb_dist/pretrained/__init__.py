"""Models as transformers directories: read and written by ranks that hold a share each, and converted.

A directory has config.json and safetensors files. Nothing is fetched from a network, and no code in it is run.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "describe_folder": "inspection",
    "from_hf": "importing",
    "from_pretrained": "loading",
    "make_room": "loading",
    "meta_model": "folder",
    "read_config": "folder",
    "relayout": "conversion",
    "save_pretrained": "saving",
    "to_hf": "conversion",
}
__all__ = [
    "describe_folder",
    "from_hf",
    "from_pretrained",
    "make_room",
    "meta_model",
    "read_config",
    "relayout",
    "save_pretrained",
    "to_hf",
]

if TYPE_CHECKING:
    from alfb_dist.pretrained.conversion import relayout, to_hf
    from alfb_dist.pretrained.folder import meta_model, read_config
    from alfb_dist.pretrained.importing import from_hf
    from alfb_dist.pretrained.inspection import describe_folder
    from alfb_dist.pretrained.loading import from_pretrained, make_room
    from alfb_dist.pretrained.saving import save_pretrained


def __getattr__(name: str) -> Any:
    """Import a name on first use."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"alfb_dist.pretrained.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'alfb_dist.pretrained' has no attribute {name!r}")

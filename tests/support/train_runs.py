"""The configuration of a small run in a test's own folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from alfb_dist.config import load_config

TEST_CONFIG = Path(__file__).parents[2] / "configs" / "test.toml"


def config_of(folder: Path, *settings: str) -> Any:
    places = (f"run.folder='{folder}/runs'", f"data.cache='{folder}/cache'", "train.eval_interval=0")
    return load_config(TEST_CONFIG, [*places, *settings], world_size=dist.get_world_size())
